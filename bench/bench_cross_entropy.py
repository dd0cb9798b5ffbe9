"""Cross-entropy of logits (N, C), or of images, with class indices, mean, in the logits' dtype.

pytest-benchmark: python -m pytest bench/bench_cross_entropy.py
"""

import math
from collections.abc import Callable
from dataclasses import replace
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
    in_graph,
    require,
    require_liger,
    upstream_of_loss,
)

OPERATION = "cross_entropy"
BYTES = {
    "fwd": "1 read of the logits",
    "bwd": "1 read and 1 write of the logits",
    "fwd_bwd": "1 read and 1 write of the logits: the gradient can be formed in the forward",
}
_SHAPES = [
    (32, 27),
    (4096, 27),
    (8192, 1000),
    (8192, 32000),
    (8192, 50257),
    (8192, 128256),
    (4096, 151936),
    (16384, 32000),
    (2048, 262144),
]
_IMAGES = [(8, 21, 512, 512), (8, 150, 128, 128)]  # of segmentation
_PROCESSES = 8  # of a vocabulary split over them
_QUICK = [(32, 27), (4096, 27), (8192, 1000), (2048, 32000), (512, 128256)]


def cases(suite: str) -> list[Case]:
    """Upstream gradient 1, as `loss.backward()` gives it; and a random one, as of a loss scale;
    images in both memory formats."""
    shapes = _QUICK if suite == "quick" else _SHAPES
    headline = {(8192, 1000), (2048, 32000), (8192, 32000), (8192, 128256), (512, 128256)}
    found = [
        Case(OPERATION, shape, dtype, headline=shape in headline)
        for shape in shapes
        for dtype in (torch.float32, torch.bfloat16)
    ]
    images = [(8, 21, 256, 256)] if suite == "quick" else _IMAGES
    found += [
        Case(OPERATION, shape, dtype, format)
        for shape in images
        for format in ("", "channels_last")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    scaled = (2048 if suite == "quick" else 8192, 32000)
    return [*found, Case(OPERATION, scaled, torch.bfloat16, "scaled")]


def kernel_cases() -> list[Case]:
    """The gradient formed in the forward; of losses that are not reduced, in the backward; a slice
    of a vocabulary that 8 processes share; and few rows shared by clusters, where the installed
    Triton can."""
    from fused.kernels import tuning  # not where only the benchmarks run, without Triton

    variants: list[tuple[tuple[int, ...], str]] = [(shape, "") for shape in [*_SHAPES, *_IMAGES]]
    variants += [(shape, "none") for shape in _SHAPES if shape[0] == 8192]
    variants.append(((8192, 128256 // _PROCESSES), "slice"))
    if tuning.clusters_reduce(torch.device("meta")):
        variants += [(shape, "clusters") for shape in [(16, 32000), (16, 50257), (8, 128256)]]
    return [
        Case(OPERATION, shape, dtype, variant)
        for shape, variant in variants
        for dtype in (torch.bfloat16, torch.float32)
    ]


def traffic_case(case: Case) -> Case:
    """Every program with as many tiles as any other: two, or as many as take a launch that counts
    rows, where the case takes it."""
    from fused.kernels import tuning

    n, c, *inner = case.shape
    x = torch.empty(n, c, math.prod(inner), dtype=case.dtype, device="meta")
    plan, n = tuning.cross_entropy(x), x.shape[0] * x.shape[2]
    at_once, least = min(plan.n_programs * plan.BLOCK_N, n), 2
    if n > plan.max_rows_to_count:
        least = max(least, plan.max_rows_to_count // at_once + 1)
    fewer = min(n // at_once, least) * at_once
    return replace(case, shape=(1, c, fewer)) if inner else case.with_rows(fewer)


def least_bytes(case: Case) -> dict[str, int]:
    labels = 8 * (math.prod(case.shape) // case.shape[1])
    if case.variant == "slice":  # which does not stay on chip while the processes meet
        return {"fwd_bwd": 3 * case.bytes + labels}
    late = case.variant == "none"  # its upstream gradients are not known in the forward
    return {
        "fwd": case.bytes + labels,
        "bwd": 2 * case.bytes + labels,
        "fwd_bwd": (3 if late else 2) * case.bytes + labels,
    }


def launch(case: Case, device: torch.device) -> None:
    from fused.kernels import tuning

    n, _, *inner = case.shape
    x = torch.empty(case.shape, dtype=case.dtype, device=device, requires_grad=True)
    if case.variant == "slice":
        return _launch_slice(x.detach())
    target = torch.zeros(n, *inner, dtype=torch.int64, device=device)
    reduction = "none" if case.variant == "none" else "mean"
    before, tuning.CLUSTERS = tuning.CLUSTERS, case.variant == "clusters"
    try:
        loss = fused.cross_entropy(x, target, reduction=reduction)
        loss.backward(torch.ones_like(loss))
    finally:
        tuning.CLUSTERS = before


def _launch_slice(x: Tensor) -> None:
    """What `fused.vocab_parallel_cross_entropy` does in one process, as if all had the same."""
    from fused.kernels import vocab_parallel_cross_entropy as kernels

    n, c = x.shape
    target = torch.zeros(n, dtype=torch.int64, device=x.device)
    shard, numbers = (0, _PROCESSES * c), (-100, 0.0, 0.0, 1.0)  # no smoothing, cap or scale
    layout = 0
    own = kernels.shard_fwd(x, target, shard, layout, *numbers)
    loss, stats, scale = kernels.merged(
        own.repeat(_PROCESSES, 1), x, target, shard[1], layout, -100, "mean", 0.0, x.dtype
    )
    kernels.shard_bwd(loss, x, target, shard, stats, scale, *numbers, inplace=False)


def contenders(case: Case, device: torch.device) -> dict[str, Callable[[], Contender]]:
    n, c, *inner = case.shape
    numbers = generator(device)
    x = torch.randn(case.shape, device=device, generator=numbers).to(case.dtype)
    if case.variant == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    target = torch.randint(0, c, (n, *inner), device=device, generator=numbers)
    upstream = upstream_of_loss(case.variant == "scaled", case.dtype, device, numbers)

    def autograd(function: Callable[[Tensor, Tensor], Tensor]) -> Contender:
        return differentiable(lambda: function(x, target), {"input": x}, upstream)

    def torch_compiled(mode: str | None) -> Callable[[], Contender]:
        return compiled(lambda wrap: autograd(wrap(F.cross_entropy)), mode)

    return {
        "torch": lambda: autograd(F.cross_entropy),
        "chunked": lambda: chunked(x.detach(), target, upstream),
        "fused": lambda: autograd(fused.cross_entropy),
        "torch graph": in_graph(lambda: autograd(F.cross_entropy), device),
        "fused graph": in_graph(lambda: autograd(fused.cross_entropy), device),
        "compile": torch_compiled(None),
        "compile max": torch_compiled("max-autotune-no-cudagraphs"),
        "liger": lambda: _liger(x, target, upstream),
        "jax": lambda: _jax(x, target, upstream),
    }


def chunked(x: Tensor, target: Tensor, upstream: Tensor) -> Contender:
    """The notebook's: every intermediate tensor written down, forward and backward."""
    classes, n = target.unsqueeze(1), target.numel()

    def forward(_: Any = None) -> tuple[Tensor, ...]:
        norm_logits = x - x.max(1, keepdim=True).values
        counts = norm_logits.exp()
        counts_sum = counts.sum(1, keepdim=True)
        probs = counts * counts_sum**-1
        logprobs = probs.log()
        return -logprobs.gather(1, classes).mean(), counts, counts_sum, probs, logprobs

    def backward(tensors: tuple[Tensor, ...]) -> Tensor:
        _, counts, counts_sum, probs, logprobs = tensors
        dlogprobs = torch.zeros_like(logprobs)
        dlogprobs.scatter_(1, classes, (-upstream / n).expand_as(classes))
        dprobs = dlogprobs / probs
        dcounts_sum_inv = (counts * dprobs).sum(1, keepdim=True)
        dcounts_sum = -(counts_sum**-2) * dcounts_sum_inv
        dcounts = counts_sum**-1 * dprobs + dcounts_sum
        dnorm_logits = counts * dcounts
        # The maximum's gradient is 0 up to rounding; the notebook carries it, and so does this.
        dlogits = dnorm_logits.clone()
        dmaxes = -dnorm_logits.sum(1, keepdim=True)
        return dlogits.scatter_add_(1, x.max(1, keepdim=True).indices, dmaxes)

    def outputs() -> dict[str, Tensor]:
        tensors = forward()
        return {"output": tensors[0], "dinput": backward(tensors)}

    return Contender(
        outputs,
        {
            "fwd": Phase(forward),
            "bwd": Phase(backward, forward),
            "fwd_bwd": Phase(lambda _: backward(forward())),
        },
    )


def _liger(x: Tensor, target: Tensor, upstream: Tensor) -> Contender:
    require_liger(x.device)
    if x.dim() > 2:
        raise Unavailable("Liger takes (N, C)")
    from liger_kernel.transformers.functional import liger_cross_entropy

    # It writes the gradient over the logits, so it has its own; from the second call on it takes
    # its own gradient for logits, which lasts as long.
    own = x.detach().clone().requires_grad_()

    def loss() -> Tensor:
        # Of logits that require a gradient it forms one, whether a graph is recorded or not.
        return liger_cross_entropy(own if torch.is_grad_enabled() else own.detach(), target)

    return differentiable(loss, {"input": own}, upstream)


def _jax(x: Tensor, target: Tensor, upstream: Tensor) -> Contender:
    require("jax")
    import jax
    import jax.numpy as jnp

    x_jax = jax.dlpack.from_dlpack(x.detach())
    y_jax = jax.dlpack.from_dlpack(target.int())
    scale = float(upstream)

    def loss(logits: Any, labels: Any) -> Any:
        wide = logits.astype(jnp.float32)
        picked = jnp.take_along_axis(wide, jnp.expand_dims(labels, 1), 1).squeeze(1)
        return jnp.mean(jax.nn.logsumexp(wide, axis=1) - picked).astype(logits.dtype)

    forward = jax.jit(loss)
    both = jax.jit(jax.value_and_grad(lambda a, b: scale * loss(a, b)))

    def outputs() -> dict[str, Tensor]:
        value = torch.from_dlpack(forward(x_jax, y_jax))
        return {"output": value, "dinput": torch.from_dlpack(both(x_jax, y_jax)[1])}

    return Contender(
        outputs,
        {
            "fwd": Phase(lambda _: jax.block_until_ready(forward(x_jax, y_jax)), waits=True),
            "fwd_bwd": Phase(lambda _: jax.block_until_ready(both(x_jax, y_jax)), waits=True),
        },
    )


def test_cross_entropy(benchmark: Any, phase: Phase) -> None:
    benchmark.pedantic(phase.run, setup=lambda: ((phase.prepare(),), {}), rounds=10)
