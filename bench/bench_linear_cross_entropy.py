"""Linear layer and cross-entropy, mean: from input (N, D) and weight (C, D) to the loss.

A case is N x C, with D as its variant: its one large tensor is the logits.

pytest-benchmark: python -m pytest bench/bench_linear_cross_entropy.py
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from bench.cases import (
    Case,
    Contender,
    Phase,
    Unavailable,
    compiled,
    differentiable,
    generator,
    require,
)

OPERATION = "linear_cross_entropy"
BYTES = {"fwd_bwd": "no bound by bytes: three matrix products, and nothing of the logits' size"}
_FULL = [(4096, 128256, 4096), (8192, 128256, 2048), (8192, 32000, 2048), (4096, 32000, 256)]
_QUICK = [(4096, 32000, 256)]


def cases(suite: str) -> list[Case]:
    quick = suite == "quick"
    dtype = torch.float32 if quick else torch.bfloat16
    return [
        Case(OPERATION, (n, c), dtype, f"d{d}", headline=True)
        for n, c, d in (_QUICK if quick else _FULL)
    ]


def kernel_cases() -> list[Case]:
    """None of its own: cross_entropy's, on a chunk of logits."""
    return []


def traffic_case(case: Case) -> Case:
    return case


def least_bytes(case: Case) -> dict[str, int]:
    return {}


def launch(case: Case, device: torch.device) -> None:
    raise NotImplementedError("no kernel of its own")


def contenders(case: Case, device: torch.device) -> dict[str, Callable[[], Contender]]:
    n, c = case.shape
    d = int(case.variant.removeprefix("d"))
    numbers = generator(device)
    x = torch.randn(n, d, device=device, generator=numbers).to(case.dtype).requires_grad_()
    w = (torch.randn(c, d, device=device, generator=numbers) / d**0.5).to(case.dtype)
    w.requires_grad_()
    target = torch.randint(0, c, (n,), device=device, generator=numbers)
    upstream = torch.ones((), dtype=case.dtype, device=device)

    def pair(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), target)

    def autograd(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
        leaves = {"input": x, "weight": w}
        both = differentiable(lambda: function(x, w, target), leaves, upstream)
        return Contender(both.outputs, {"fwd_bwd": both.phases["fwd_bwd"]})

    def products() -> Contender:
        """The three matrix products alone: what no implementation can do without."""
        z = torch.empty(min(n, 2048), c, dtype=case.dtype, device=device)
        dx, dw = torch.empty_like(x), torch.empty_like(w)

        @torch.no_grad()
        def run(_: Any) -> None:
            for rows in torch.arange(n).split(len(z)):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                chunk = z[: len(rows)]
                torch.mm(x[part], w.T, out=chunk)
                torch.mm(chunk, w, out=dx[part])
                torch.mm(chunk.T, x[part], out=dw)

        return Contender(dict, {"fwd_bwd": Phase(run)})

    def torch_chunked() -> Contender:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Unavailable("torch has it from 2.13 on")
        options = torch.nn.LinearCrossEntropyOptions()
        return autograd(lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options))

    def liger() -> Contender:
        require("liger_kernel")
        if device.type != "cuda":
            raise Unavailable("Liger's kernels need a GPU")
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        # Its loss is float32 whatever its input is.
        return autograd(lambda x, w, t: liger_fused_linear_cross_entropy(x, w, t).to(x.dtype))

    return {
        "torch": lambda: autograd(pair),
        "fused": lambda: autograd(fused.linear_cross_entropy),
        "torch chunked": torch_chunked,
        "three products": products,
        "compile": compiled(lambda wrap: autograd(wrap(pair)), None),
        "liger": liger,
    }


def test_linear_cross_entropy(benchmark: Any, phase: Phase) -> None:
    benchmark.pedantic(phase.run, setup=lambda: ((phase.prepare(),), {}), rounds=3)
