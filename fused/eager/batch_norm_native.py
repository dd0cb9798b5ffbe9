"""PyTorch's own batch norm of the CPU in training: one pass for the sum, one for the squares, one
to normalise, in float32 (float64 for float64).

Its sums are plain ones, one row after the other. In float32 a mean of R standard deviations over n
rows is off by about R * n**0.5 / 2**25 of one, and by as much as R * n / 2**25 where R * n is so
large that all of the last additions round alike; the variance of values near 1e30 overflows. So
what it found is looked at, and None is returned where it is not exact.

With t = (n - 1) / n, Bessel's correction is the biased form with gamma * sqrt(t) and eps * t
(docs/derivations.md), so this kernel, which knows only the biased form, serves it too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST_MEAN, _LARGEST_SUM = 16.0, 2.0**22  # standard deviations


class Native(NamedTuple):
    """What PyTorch's kernel found, and what it was told."""

    y: Tensor
    gamma: Tensor | None
    mean: Tensor
    var: Tensor  # unbiased
    rstd: Tensor  # of the biased form
    eps: float

    @staticmethod
    def of(
        x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, correction: int
    ) -> "Native | None":
        """Of x (N, C, *S), float32 or float64 with gamma and beta of its dtype, or half precision
        with float32; None where it is not exact."""
        c = x.shape[1]
        n = x.numel() // c
        gamma = to_biased(gamma, x, n, correction)
        batch = x.new_zeros((2, c), dtype=computed_in(x))
        mean, var = batch.unbind()  # become the mean and the unbiased variance
        if correction:
            eps *= (n - 1) / n
        y, _, rstd = torch.native_batch_norm(x, gamma, beta, mean, var, True, 1.0, eps)
        if x.dtype.itemsize == 2:
            exact = _vary(mean, var, n)
        else:
            largest = min(_LARGEST_MEAN, _LARGEST_SUM / n)
            low, high = (mean * rstd).aminmax()  # NaN if any is
            exact = -largest < low.item() and high.item() < largest and rstd.min().item() > 0.0
        return Native(y, gamma, mean, var, rstd, eps) if exact else None


def native_moments(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """(mean, m2) (C,) of x (N, C, *S) in half precision; None where they are not exact."""
    n = x.numel() // x.shape[1]
    mean, var = x.new_zeros((2, x.shape[1]), dtype=computed_in(x)).unbind()
    torch.batch_norm_update_stats(x, mean, var, 1.0)  # the mean and the unbiased variance
    return (mean, var.mul_(n - 1)) if _vary(mean, var, n) else None


def _vary(mean: Tensor, var: Tensor, n: int) -> bool:
    """Whether no mean is too many standard deviations from 0, which eps would hide."""
    std = var.sqrt()
    left = (std * min(_LARGEST_MEAN, _LARGEST_SUM / n)).sub_(mean.abs()).min().item()
    return left >= 0.0 and std.max().item() < float("inf")  # NaN if any is


def to_biased(gamma: Tensor | None, x: Tensor, n: int, correction: int) -> Tensor | None:
    """The biased form's gamma, contiguous: PyTorch's backward takes no notice of its stride."""
    if correction:
        bessel = root_of_bessel(n)
        ones = x.new_ones(x.shape[1], dtype=computed_in(x))
        gamma = (ones if gamma is None else gamma) * bessel
    return None if gamma is None else gamma.contiguous()


def native_bwd(
    dz: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dgamma, dbeta) of the biased form."""
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dz, x, gamma, None, None, mean, rstd, True, eps, [True, True, True]
    )
    return dx, dgamma, dbeta


def root_of_bessel(n: int) -> float:
    return float(((n - 1) / n) ** 0.5)


def computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
