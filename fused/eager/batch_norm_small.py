"""Small batch norms on the CPU by PyTorch's own operations, which take fewer calls: as long as
everything stays in the cache that is what counts.
"""

import torch
from torch import Tensor

from fused.eager.activation import NEW, activation_backward
from fused.eager.batch_norm_native import Native, native_bwd, root_of_bessel


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
    native = Native.of(x, gamma, beta, eps, correction)
    if native is None:
        return None
    rate = float(momentum)  # a bool is a number, too
    for running, batch in ((running_mean, native.mean), (running_var, native.var)):
        if running is not None:  # not lerp_, of which an inf becomes NaN
            running.mul_(1 - rate).add_(batch, alpha=rate)
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
    native = Native.of(x, gamma, beta, eps, correction)
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
    dx, dgamma, dbeta = native_bwd(dz, x, native.gamma, native.mean, native.rstd, native.eps)
    if correction:
        dgamma = dgamma * root_of_bessel(x.shape[0])
    return dx, dgamma, dbeta, dz
