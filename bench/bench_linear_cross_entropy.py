"""Linear layer and cross-entropy, mean: from input (N, D) and weight (C, D) to the loss.

A case is N x C, with D as its variant: its one large tensor is the logits. `scaled` has another
upstream gradient than 1.

pytest-benchmark: python -m pytest bench/bench_linear_cross_entropy.py
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from bench import bench_cross_entropy
from bench.cases import (
    Case,
    Contender,
    Phase,
    Unavailable,
    compiled,
    differentiable,
    generator,
    in_graph,
    require_liger,
    upstream_of_loss,
)

OPERATION = "linear_cross_entropy"
BYTES = {
    "fwd": "no bound by bytes: one matrix product, and nothing of the logits' size",
    "fwd_bwd": "no bound by bytes: three matrix products, and nothing of the logits' size",
}
_FULL = [(4096, 128256, 4096), (8192, 128256, 2048), (8192, 32000, 2048), (4096, 32000, 256)]
_QUICK = [(4096, 32000, 256)]


def cases(suite: str) -> list[Case]:
    quick = suite == "quick"
    dtype = torch.float32 if quick else torch.bfloat16
    found = [
        Case(OPERATION, (n, c), dtype, f"d{d}", headline=True)
        for n, c, d in (_QUICK if quick else _FULL)
    ]
    n, c, d = _QUICK[0]
    return [*found, Case(OPERATION, (n, c), dtype, f"d{d}-scaled")]


def kernel_cases() -> list[Case]:
    """cross_entropy's, over a chunk of logits, whose rows begin at multiples of 16 bytes: of a
    mean, of losses that are not reduced, and without gradients."""
    found = [
        Case(OPERATION, shape, torch.bfloat16, variant)
        for shape in ((4096, 50257), (4096, 128256))
        for variant in ("d64", "d64-none", "d64-evaluation")
    ]
    return [*found, Case(OPERATION, (4096, 50257), torch.float16, "d64-weighted")]


def traffic_case(case: Case) -> Case:
    return case


def least_bytes(case: Case) -> dict[str, int]:
    return {}


def launch(case: Case, device: torch.device) -> None:
    n, c = case.shape
    width, *variant = case.variant.split("-")
    d = int(width.removeprefix("d"))
    x, w = (torch.empty(rows, d, dtype=case.dtype, device=device) for rows in (n, c))
    if "evaluation" not in variant:
        x.requires_grad_()
        w.requires_grad_()
    loss = fused.linear_cross_entropy(
        x,
        w,
        torch.empty(n, dtype=torch.int64, device=device),
        weight=torch.empty(c, device=device, dtype=case.dtype) if "weighted" in variant else None,
        reduction="none" if "none" in variant else "mean",
        memory_budget_bytes=2 * case.bytes,  # one chunk
    )
    if loss.requires_grad:
        loss.sum().backward()


def contenders(case: Case, device: torch.device) -> dict[str, Callable[[], Contender]]:
    n, c = case.shape
    width, *scaled = case.variant.split("-")
    d = int(width.removeprefix("d"))
    numbers = generator(device)
    x = torch.randn(n, d, device=device, generator=numbers).to(case.dtype).requires_grad_()
    w = (torch.randn(c, d, device=device, generator=numbers) / d**0.5).to(case.dtype)
    w.requires_grad_()
    target = torch.randint(0, c, (n,), device=device, generator=numbers)
    upstream = upstream_of_loss(bool(scaled), case.dtype, device, numbers)

    def pair(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), target)

    def autograd(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
        leaves = {"input": x, "weight": w}
        both = differentiable(lambda: function(x, w, target), leaves, upstream)
        # No "bwd": some have formed the gradients by then.
        return Contender(both.outputs, {name: both.phases[name] for name in ("fwd", "fwd_bwd")})

    def written_out() -> Contender:
        """The notebook's cross-entropy between the products."""

        @torch.no_grad()
        def forward(_: Any = None) -> Tensor:
            z = x @ w.T
            return bench_cross_entropy.chunked(z, target, upstream).phases["fwd"].run(None)[0]

        @torch.no_grad()
        def both(_: Any = None) -> tuple[Tensor, Tensor]:
            z = x @ w.T
            dz = bench_cross_entropy.chunked(z, target, upstream).phases["fwd_bwd"].run(None)
            return dz @ w, dz.T @ x

        def outputs() -> dict[str, Tensor]:
            dx, dw = both()
            return {"output": forward(), "dinput": dx, "dweight": dw}

        return Contender(outputs, {"fwd": Phase(forward), "fwd_bwd": Phase(both)})

    def products() -> Contender:
        """The matrix products alone, each of all rows: what no implementation can do without."""
        z = torch.empty(n, c, dtype=case.dtype, device=device)
        dx, dw = torch.empty_like(x), torch.empty_like(w)

        @torch.no_grad()
        def one(_: Any = None) -> None:
            torch.mm(x, w.T, out=z)

        @torch.no_grad()
        def three(_: Any) -> None:
            one()
            torch.mm(z, w, out=dx)
            torch.mm(z.T, x, out=dw)

        return Contender(dict, {"fwd": Phase(one), "fwd_bwd": Phase(three)})

    def torch_chunked() -> Contender:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Unavailable("torch has it from 2.13 on")
        options = torch.nn.LinearCrossEntropyOptions()
        return autograd(lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options))

    def liger() -> Contender:
        require_liger(device)
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
            # It forms gradients of what requires them, whether a graph is recorded or not.
            if not torch.is_grad_enabled():
                x, w = x.detach(), w.detach()
            # Its loss is float32 whatever its input is.
            return liger_fused_linear_cross_entropy(x, w, target).to(x.dtype)

        return autograd(loss)

    def torch_compiled(mode: str | None) -> Callable[[], Contender]:
        return compiled(lambda wrap: autograd(wrap(pair)), mode)

    return {
        "torch": lambda: autograd(pair),
        "chunked": written_out,
        "fused": lambda: autograd(fused.linear_cross_entropy),
        "torch chunked": torch_chunked,
        "products": products,
        "torch graph": in_graph(lambda: autograd(pair), device),
        "fused graph": in_graph(lambda: autograd(fused.linear_cross_entropy), device),
        "compile": torch_compiled(None),
        "compile max": torch_compiled("max-autotune-no-cudagraphs"),
        "liger": liger,
    }


def test_linear_cross_entropy(benchmark: Any, phase: Phase) -> None:
    benchmark.pedantic(phase.run, setup=lambda: ((phase.prepare(),), {}), rounds=3)
