"""Batch norm in training, with running statistics, float32 parameters and an activation behind it.

pytest-benchmark: python -m pytest bench/bench_batch_norm.py
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from bench.cases import (
    Case,
    Contender,
    Phase,
    compiled,
    differentiable,
    generator,
    in_graph,
    require,
)

OPERATION = "batch_norm"
BYTES = {
    "fwd": "1 read of x and 1 write of y",
    "bwd": "1 read of dy, 1 read of x and 1 write of dx",
    "fwd_bwd": "the two together: 3 reads and 2 writes",
}
_SHAPES = [
    (32, 64),
    (32, 200),
    (4096, 1024),
    (4096, 16384),
    (65536, 1024),
    (125000, 50),
    (32, 64, 56, 56),
    (256, 64, 112, 112),
    (64, 256, 56, 56),
    (32, 2048, 7, 7),
    (20, 6, 65536),
]
_QUICK = [(32, 64), (32, 200), (4096, 1024), (65536, 256), (32, 64, 56, 56), (32, 2048, 7, 7)]
_EPS = 1e-5
_MOMENTUM = 0.1
_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "tanh": torch.tanh,
    "relu": partial(F.relu, inplace=True),  # as networks have it: less time than a new tensor
}


def cases(suite: str) -> list[Case]:
    """Without an activation, and with tanh or relu; images in both memory formats."""
    quick = suite == "quick"
    found = []
    for shape in _QUICK if quick else _SHAPES:
        image = len(shape) == 4
        headline = shape in ((4096, 1024), (32, 64, 56, 56), (65536, 1024))
        activations = ["relu" if image else "tanh"]
        if not quick:
            activations.insert(0, "")
        elif image and headline:
            activations.append("tanh")
        for format in ["", "channels_last"] if image else [""]:
            for activation in activations:
                variant = "-".join(filter(None, (format, activation)))
                few = quick and not headline
                dtypes = [torch.float32] if few else [torch.float32, torch.bfloat16]
                first = headline and activation != ""
                found += [Case(OPERATION, shape, d, variant, first) for d in dtypes]
    return found


def kernel_cases() -> list[Case]:
    return [
        Case(OPERATION, shape, dtype, variant)
        for shape in _SHAPES
        for variant in _kernel_variants(shape)
        for dtype in (torch.bfloat16, torch.float32)
    ]


def _kernel_variants(shape: tuple[int, ...]) -> tuple[str, ...]:
    """At one shape of each kind also evaluation, and of images a residual."""
    if len(shape) != 4:
        return ("tanh", "eval-tanh") if shape == (4096, 1024) else ("tanh",)
    variants = ("relu", "channels_last-relu")
    if shape != (64, 256, 56, 56):
        return variants
    with_residual = tuple(f"{variant}-residual" for variant in variants)
    return variants + with_residual + ("eval-relu", "eval-channels_last-relu")


def traffic_case(case: Case) -> Case:
    return case


def least_bytes(case: Case) -> dict[str, int]:
    if "residual" in case.variant:  # read and its gradient written, and the signs written and read
        forward, backward = (n * case.bytes + case.bytes // 16 for n in (3, 4))
    else:
        forward, backward = 2 * case.bytes, 3 * case.bytes
    return {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}


def launch(case: Case, device: torch.device) -> None:
    n, c, *inner = case.shape
    x = torch.empty(
        n, c, *inner, dtype=case.dtype, device=device, memory_format=_format(case),
        requires_grad=True,
    )  # fmt: skip
    channels = [torch.ones(c, device=device) for _ in range(4)]
    mean, var, weight, bias = channels
    weight.requires_grad_(), bias.requires_grad_()
    residual = torch.empty_like(x).requires_grad_() if "residual" in case.variant else None
    y = fused.batch_norm(
        x, mean, var, weight, bias, "eval" not in case.variant, _MOMENTUM, _EPS,
        activation=_activation(case), residual=residual,
    )  # fmt: skip
    y.backward(torch.empty_like(y))


def contenders(case: Case, device: torch.device) -> dict[str, Callable[[], Contender]]:
    c, activation = case.shape[1], _activation(case)
    numbers = generator(device)
    x, dy = (
        _formatted(torch.randn(case.shape, device=device, generator=numbers).to(case.dtype), case)
        for _ in range(2)
    )
    x.requires_grad_()
    weight, bias = (
        torch.randn(c, device=device, generator=numbers).requires_grad_() for _ in range(2)
    )
    act = _ACTIVATIONS[activation]
    leaves = {"input": x, "weight": weight, "bias": bias}

    def torch_norm(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return act(F.batch_norm(x, mean, var, weight, bias, True, _MOMENTUM, _EPS))

    def fused_norm(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused.batch_norm(
            x, mean, var, weight, bias, True, _MOMENTUM, _EPS, activation=activation
        )

    def autograd(norm: Callable[..., Tensor]) -> Contender:
        mean, var = torch.zeros(c, device=device), torch.ones(c, device=device)
        return differentiable(lambda: norm(x, mean, var, weight, bias), leaves, dy)

    def corrected() -> Contender:
        """With Bessel's correction, of n / (n - 1) times eps and the square root of that times
        weight: its output is the others'."""
        n = x.numel() // c
        t = n / (n - 1)
        root = (weight.detach() * t**0.5).requires_grad_()
        mean, var = torch.zeros(c, device=device), torch.ones(c, device=device)
        found = differentiable(
            lambda: fused.batch_norm(
                x, mean, var, root, bias, True, _MOMENTUM, _EPS * t,
                correction=1, activation=activation,
            ),
            {**leaves, "weight": root},
            dy,
        )  # fmt: skip

        def outputs() -> dict[str, Tensor]:
            computed = found.outputs()
            return {**computed, "dweight": computed["dweight"] * t**0.5}

        return replace(found, outputs=outputs)

    return {
        "torch": lambda: autograd(torch_norm),
        "chunked": lambda: chunked(x.detach(), weight.detach(), bias.detach(), dy, activation),
        "fused": lambda: autograd(fused_norm),
        "fused correction=1": corrected,
        "torch graph": in_graph(lambda: autograd(torch_norm), device),
        "fused graph": in_graph(lambda: autograd(fused_norm), device),
        "compile": compiled(lambda wrap: autograd(wrap(torch_norm)), None),
        "compile max": compiled(
            lambda wrap: autograd(wrap(torch_norm)), "max-autotune-no-cudagraphs"
        ),
        "jax": lambda: _jax(x.detach(), weight.detach(), bias.detach(), dy, activation),
    }


def _activation(case: Case) -> str | None:
    return next((a for a in ("tanh", "relu") if a in case.variant), None)


def _formatted(x: Tensor, case: Case) -> Tensor:
    return x.contiguous(memory_format=_format(case))


def _format(case: Case) -> torch.memory_format:
    last = "channels_last" in case.variant
    return torch.channels_last if last else torch.contiguous_format


def chunked(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, activation: str | None
) -> Contender:
    """The notebook's: every intermediate tensor written down, forward and backward."""
    dims = [d for d in range(x.dim()) if d != 1]
    n = x.numel() // x.shape[1]
    gamma, beta = (v.to(x.dtype).view(-1, *[1] * (x.dim() - 2)) for v in (weight, bias))
    running_mean, running_var = torch.zeros_like(weight), torch.ones_like(weight)

    def forward(_: Any = None) -> tuple[Tensor, ...]:
        mean = x.float().sum(dims, keepdim=True) / n
        diff = (x - mean).to(x.dtype)
        diff2 = diff**2
        var = diff2.float().sum(dims, keepdim=True) / n
        rstd = ((var + _EPS) ** -0.5).to(x.dtype)
        xhat = diff * rstd
        z = gamma * xhat + beta
        running_mean.lerp_(mean.flatten(), _MOMENTUM)
        running_var.lerp_(var.flatten() * (n / (n - 1)), _MOMENTUM)
        return _ACTIVATIONS[activation](z), diff, rstd, xhat

    def backward(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, diff, rstd, xhat = tensors
        dz = dy
        if activation == "tanh":
            dz = dy * (1 - y**2)
        elif activation == "relu":
            dz = dy * (y > 0)
        dbias = dz.float().sum(dims)
        dweight = (dz * xhat).float().sum(dims)
        dxhat = dz * gamma
        drstd = (dxhat * diff).float().sum(dims, keepdim=True)
        ddiff = dxhat * rstd
        dvar = -0.5 * rstd.float() ** 3 * drstd
        ddiff2 = (dvar / n).to(x.dtype) * torch.ones_like(diff)
        ddiff = ddiff + 2 * diff * ddiff2
        dmean = -ddiff.float().sum(dims, keepdim=True)
        return ddiff + (dmean / n).to(x.dtype), dweight, dbias

    def outputs() -> dict[str, Tensor]:
        tensors = forward()
        dx, dweight, dbias = backward(tensors)
        return {"output": tensors[0], "dinput": dx, "dweight": dweight, "dbias": dbias}

    return Contender(
        outputs,
        {
            "fwd": Phase(forward),
            "bwd": Phase(backward, forward),
            "fwd_bwd": Phase(lambda _: backward(forward())),
        },
    )


def _jax(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, activation: str | None) -> Contender:
    require("jax")
    import jax
    import jax.numpy as jnp

    inputs = [jax.dlpack.from_dlpack(t.contiguous()) for t in (x, weight, bias)]
    dy_jax = jax.dlpack.from_dlpack(dy.contiguous())
    dims = tuple(d for d in range(x.dim()) if d != 1)
    shape = (-1, *[1] * (x.dim() - 2))
    act = {None: lambda y: y, "tanh": jnp.tanh, "relu": jax.nn.relu}[activation]

    def norm(x: Any, weight: Any, bias: Any) -> Any:
        wide = x.astype(jnp.float32)
        mean, var = wide.mean(dims, keepdims=True), wide.var(dims, keepdims=True)
        xhat = (wide - mean) * jax.lax.rsqrt(var + _EPS)
        y = act(xhat * weight.reshape(shape) + bias.reshape(shape)).astype(x.dtype)
        return y, (mean, var)

    def gradients(dy: Any, *inputs: Any) -> Any:
        y, pullback, statistics = jax.vjp(norm, *inputs, has_aux=True)
        return y, pullback(dy), statistics

    forward, both = jax.jit(norm), jax.jit(gradients)

    def outputs() -> dict[str, Tensor]:
        y, gradients, _ = both(dy_jax, *inputs)
        named = zip(("output", "dinput", "dweight", "dbias"), (y, *gradients), strict=True)
        return {name: torch.from_dlpack(t) for name, t in named}

    return Contender(
        outputs,
        {
            "fwd": Phase(lambda _: jax.block_until_ready(forward(*inputs)), waits=True),
            "fwd_bwd": Phase(lambda _: jax.block_until_ready(both(dy_jax, *inputs)), waits=True),
        },
    )


def test_batch_norm(benchmark: Any, phase: Phase) -> None:
    benchmark.pedantic(phase.run, setup=lambda: ((phase.prepare(),), {}), rounds=10)
