"""Small batch norms on the CPU by PyTorch's own operations, which take fewer calls: as long as
everything stays in the cache that is what counts.

With t = (n - 1) / n, Bessel's correction is the biased form with gamma * sqrt(t) and eps * t
(docs/derivations.md), so PyTorch's kernel, which knows only the biased form, serves it too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fused.eager.activation import NEW, activation_backward


def is_small(x: Tensor) -> bool:
    return (
        x.dim() == 2 and 0 < x.numel() <= 2**18 and x.shape[0] <= 1024
        and x.dtype.itemsize >= 4 and x.is_cpu and x.is_contiguous()
    )  # fmt: skip


def batch_norm_small(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float,
    eps: float,
    correction: int,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(y, mean, rstd) of x (N, C) in training, y for autograd to differentiate, and the update of
    the running statistics; None, and no update, where PyTorch's kernel is not exact."""
    native = _Native.of(x, gamma, beta, eps, correction)
    if native is None:
        return None
    if running_mean is not None:
        running_mean.lerp_(native.mean, momentum)
    if running_var is not None:
        running_var.lerp_(native.var, momentum)
    if tracked is not None:
        tracked.add_(1)
    y = native.y if residual is None else native.y + residual
    y = y if activation is None else NEW[activation](y)
    return y, native.mean, native.rstd


def batch_norm_small_bwd(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    kept: Tensor | None,
    eps: float,
    correction: int,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """(dx, dgamma, dbeta, dresidual), to the last bit as autograd finds them, where autograd may
    not be used; `kept` is what `fused.eager.batch_norm.keeps` says."""
    native = _Native.of(x, gamma, beta, eps, correction)
    if native is None:
        return None
    dz = dy
    if activation is not None:
        from_output = activation in ("relu", "tanh")
        if from_output and kept is not None:
            z = kept
        else:
            z = native.y if kept is None else native.y + kept
            z = NEW[activation](z) if from_output else z
        dz = torch.empty_like(dy)
        activation_backward(activation, dy, z, dz)
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dz, x, native.gamma, native.mean, native.var, native.mean, native.rstd, True, native.eps,
        [True, True, True],
    )  # fmt: skip
    if correction:
        dgamma = dgamma * bessel(x)
    return dx, dgamma, dbeta, dz


class _Native(NamedTuple):
    """PyTorch's own normalisation, which knows only the biased form, and what it was told."""

    y: Tensor
    gamma: Tensor | None
    mean: Tensor
    var: Tensor  # unbiased
    rstd: Tensor  # of the biased form
    eps: float

    @staticmethod
    def of(
        x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, correction: int
    ) -> "_Native | None":
        """None where its kernel is not exact."""
        n, c = x.shape
        if correction:
            eps *= (n - 1) / n
            gamma = x.new_full((c,), bessel(x)) if gamma is None else gamma * bessel(x)
        if gamma is not None:
            gamma = gamma.contiguous()  # PyTorch's backward takes no notice of its stride
        batch = x.new_zeros(2, c)
        mean, var = batch.unbind()  # become the mean and the unbiased variance
        y, _, rstd = torch.native_batch_norm(x, gamma, beta, mean, var, True, 1.0, eps)
        # Its sums are plain ones in float32: a mean of R standard deviations is off by
        # R * n**0.5 / 2**24 of one, and the variance of values near 1e30 overflows.
        if not (mean * rstd).abs_().max() < 16.0 or not rstd.min() > 0.0:
            return None
        return _Native(y, gamma, mean, var, rstd, eps)


def bessel(x: Tensor) -> float:
    """sqrt((n - 1) / n)"""
    return float(((x.shape[0] - 1) / x.shape[0]) ** 0.5)
