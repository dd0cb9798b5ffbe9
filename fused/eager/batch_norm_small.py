"""Small batch norms on the CPU by PyTorch's own operations, which take fewer calls: as long as
everything stays in the cache that is what counts.

With t = (n - 1) / n, Bessel's correction is the biased form with gamma * sqrt(t) and eps * t
(docs/derivations.md), so PyTorch's kernel, which knows only the biased form, serves it too.
"""

import torch
from torch import Tensor

from fused.eager.activation import NEW


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
) -> Tensor | None:
    """y of x (N, C) in training, for autograd to differentiate, and the update of the running
    statistics; None, and no update, where PyTorch's kernel is not exact."""
    n, c = x.shape
    if correction:
        t = (n - 1) / n
        eps *= t
        gamma = x.new_full((c,), t**0.5) if gamma is None else gamma * t**0.5
    if gamma is not None:
        gamma = gamma.contiguous()  # PyTorch's backward takes no notice of its stride
    batch = x.new_zeros(2, c)
    mean, var = batch.unbind()  # become the mean and the unbiased variance
    y, _, rstd = torch.native_batch_norm(x, gamma, beta, mean, var, True, 1.0, eps)
    # Its sums are plain ones in float32: a mean of R standard deviations is off by R * n**0.5 /
    # 2**24 of one, and the variance of values near 1e30 overflows.
    if not (mean * rstd).abs_().max() < 16.0 or not rstd.min() > 0.0:
        return None
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
    if running_var is not None:
        running_var.lerp_(var, momentum)
    if tracked is not None:
        tracked.add_(1)
    if residual is not None:
        y = y + residual
    return y if activation is None else NEW[activation](y)
