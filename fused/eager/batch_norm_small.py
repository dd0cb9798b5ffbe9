"""Small batch norms on the CPU by PyTorch's own kernels: where calls cost more than arithmetic.

With t = (n - 1) / n, Bessel's correction is the biased form with gamma * sqrt(t) and eps * t
(docs/derivations.md), so these kernels, which know only the biased form, serve it too.
"""

import torch
from torch import Tensor

from fused.eager.activation import IN_PLACE, activation_backward


def is_small(x: Tensor) -> bool:
    """Whether calls cost more than arithmetic: PyTorch's own kernels take the fewest."""
    return (
        x.dim() == 2 and x.numel() <= 2**15 and x.shape[0] <= 1024
        and x.dtype.itemsize >= 4 and x.device.type == "cpu" and x.is_contiguous()
    )  # fmt: skip


def small_fwd(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    correction: int,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """batch_norm_fwd by PyTorch's kernel, or None where that is not exact."""
    n, c = x.shape
    t = (n - 1) / n if correction else 1.0
    if correction:
        gamma = x.new_full((c,), t**0.5) if gamma is None else gamma * t**0.5
    batch = x.new_zeros(2, c)  # becomes the mean and the unbiased variance
    batch_mean, batch_var = batch.unbind()
    y, mean, rstd = torch.native_batch_norm(
        x, gamma, beta, batch_mean, batch_var, True, 1.0, eps * t
    )
    # Its sums are plain ones in float32: a mean of R standard deviations is off by R * n**0.5 /
    # 2**24 of one, and the variance of values near 1e30 overflows.
    if not (mean * rstd).abs_().max() < 16.0 or not rstd.min() > 0.0:
        return None
    if running_mean is not None:
        running_mean.lerp_(batch_mean, momentum)
    if running_var is not None:
        running_var.lerp_(batch_var, momentum)
    if residual is not None:
        y.add_(residual)
    if activation is not None:
        IN_PLACE[activation](y)
    return y, mean, rstd.mul_(t**0.5) if correction else rstd


def small_bwd(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    correction: int,
    activation: str | None,
    y: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgamma and dbeta by PyTorch's kernels, with the forward's identity"""
    if activation is not None:
        assert y is not None
        dz = torch.empty_like(dy)
        activation_backward(activation, dy, y, dz)
        dy = dz
    root = ((x.shape[0] - 1) / x.shape[0]) ** 0.5 if correction else 1.0
    if correction:
        gamma = x.new_full(mean.shape, root) if gamma is None else gamma * root
        rstd = rstd / root
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dy, x, gamma, None, None, mean, rstd, True, 0.0, [True, True, True]
    )
    return dx, dgamma.mul_(root) if correction else dgamma, dbeta
