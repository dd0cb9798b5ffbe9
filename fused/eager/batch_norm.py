"""Batch normalisation in plain PyTorch, with the functions of fused.kernels.batch_norm.

The mathematics is written there. The variance is the mean of the squared deviations from the mean,
never E[x^2] - E[x]^2.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def batch_norm_fwd(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    correction: int,
    activation: str | None,
    skip_nonfinite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises x (N, C, *S) with the statistics of the batch; updates the running ones in place.

    A momentum of None is 1 / tracked; otherwise tracked, if given, is counted up. Returns
    (y, mean, rstd): y in x's dtype and memory format, mean and rstd (C,) in float32, or float64 for
    float64.
    """
    n = x.numel() // max(1, x.shape[1])
    if n == 0:
        if tracked is not None and momentum is not None:
            tracked.add_(1)
        mean, m2 = batch_norm_moments(x)
        return torch.empty_like(x), mean, m2
    d, mean, m2 = _centred(x)
    # The running variance is the unbiased one, whatever the correction: as torch.nn.BatchNorm's.
    update_running(running_mean, running_var, tracked, momentum, mean, m2 / (n - 1), skip_nonfinite)
    rstd = (m2 / (n - correction)).add_(eps).rsqrt_().to(mean.dtype)
    return _affine(x, d, rstd, gamma, beta, residual, activation), mean, rstd


def batch_norm_eval(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises x (N, C, *S) with given statistics (C,). Returns (y, mean, rstd) as above."""
    acc = _compute_dtype(x)
    mean = mean.to(acc, copy=True)  # what backward uses must not follow a later update
    rstd = var.to(acc).add(eps).rsqrt_()
    d = x.to(acc) - _per_channel(mean, x)
    return _affine(x, d, rstd, gamma, beta, residual, activation), mean, rstd


def batch_norm_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, m2) of x (N, C, *S): per-channel mean and sum of squared deviations, (C,) each."""
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1], dtype=_compute_dtype(x))
        return zeros, zeros.clone()
    _, mean, m2 = _centred(x)
    return mean, m2


def batch_norm_sums(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
    want_dresidual: bool,
) -> tuple[Tensor, Tensor | None]:
    """(sums, dresidual): dgamma and dbeta as one tensor (2, C) in the dtype of mean, and dz, which
    batch_norm_dx takes in dy's place; None where it is not wanted."""
    dz, xhat = _dz_and_xhat(dy, x, gamma, beta, residual, mean, rstd, activation)
    sums = torch.stack(((dz * xhat).sum(_rows(x)), dz.sum(_rows(x))))
    return sums, dz.to(x.dtype) if want_dresidual else None


def batch_norm_dx(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor,
    count: Tensor,
    correction: int,
    activation: str | None,
) -> Tensor:
    """dx from dgamma and dbeta, sums (2, C), of all the `count` rows (one number) that were
    normalised together, which may be more than x's."""
    dz, xhat = _dz_and_xhat(dy, x, gamma, beta, residual, mean, rstd, activation)
    dgamma, dbeta = sums.unbind()
    slope = _per_channel(rstd if gamma is None else gamma * rstd, x)
    dx = dz - _per_channel(dbeta / count, x)
    dx.sub_(xhat.mul_(_per_channel(dgamma / (count - correction), x))).mul_(slope)
    return dx.to(x.dtype)


def batch_norm_bwd(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    correction: int,
    activation: str | None,
    batch_statistics: bool,
    want_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients (dx, dgamma, dbeta, dresidual) of batch normalisation.

    dx is in x's dtype; dgamma and dbeta (C,) are in the dtype of mean; dresidual is None where it
    is not wanted. `batch_statistics` says whether mean and rstd came from x (training) or were
    frozen.
    """
    dz, xhat = _dz_and_xhat(dy, x, gamma, beta, residual, mean, rstd, activation)
    dgamma, dbeta = (dz * xhat).sum(_rows(x)), dz.sum(_rows(x))
    dresidual = dz.to(x.dtype) if want_dresidual else None
    slope = _per_channel(rstd if gamma is None else gamma * rstd, x)
    n = x.numel() // max(1, x.shape[1])
    if not batch_statistics or x.numel() == 0:
        return (dz * slope).to(x.dtype), dgamma, dbeta, dresidual
    dx = dz - _per_channel(dbeta / n, x)
    dx.sub_(xhat.mul_(_per_channel(dgamma / (n - correction), x))).mul_(slope)
    return dx.to(x.dtype), dgamma, dbeta, dresidual


def batch_norm_composed(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    correction: int,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same y from operations that torch can differentiate any number of times.

    mean and rstd (C,) are frozen statistics, or None for the batch's. Returns (y, mean, m2), m2
    being None for frozen statistics. For derivatives of higher order and for torch.func.
    """
    xc, m2 = x.to(_compute_dtype(x)), None
    if mean is None or rstd is None:
        n = x.numel() // max(1, x.shape[1])
        mean = xc.mean(_rows(x))
        m2 = (xc - _per_channel(mean, x)).square().sum(_rows(x))
        rstd = (m2 / (n - correction) + eps).rsqrt()
    z = (xc - _per_channel(mean, x)) * _per_channel(rstd, x)
    if gamma is not None:
        z = z * _per_channel(gamma, x)
    if beta is not None:
        z = z + _per_channel(beta, x)
    if residual is not None:
        z = z + residual
    return (z if activation is None else _ACTIVATIONS[activation](z)).to(x.dtype), mean, m2


def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    var: Tensor,
    skip_nonfinite: bool,
) -> None:
    """running = (1 - momentum) * running + momentum * batch, in place.

    var is the unbiased variance. A momentum of None is 1 / tracked; otherwise tracked, if given, is
    counted up. `skip_nonfinite` leaves channels alone whose mean or var is inf or NaN.
    """
    if momentum is None:
        assert tracked is not None
        rate: Tensor | float = tracked.to(mean.dtype).reciprocal()
    else:
        rate = momentum
        if tracked is not None:
            tracked.add_(1)
    finite = (mean * 0 + var).isfinite() if skip_nonfinite else None
    for running, batch in ((running_mean, mean), (running_var, var)):
        if running is not None:
            new = (1 - rate) * running + rate * batch
            running.copy_(new if finite is None else torch.where(finite, new, running))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """vector (C,) in the shape (1, C, 1, ...) that broadcasts over x."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def _centred(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(d, mean, m2): the deviations x - mean (N, C, *S), and the moments (C,).

    By way of the deviations from the first row: of values near 1e4 a float32 mean is off by 1e-3,
    and the deviations from it would all be.
    """
    first = x[(slice(1), slice(None), *[slice(1)] * (x.dim() - 2))].to(_compute_dtype(x))
    d, dims = x - first, _rows(x)
    mean = d.mean(dims)
    d.sub_(_per_channel(mean, x))
    mean += first.flatten()
    m2 = d.square().sum(dims)
    # Deviations near 1e30 have squares that only float64 holds; on the CPU, looking costs nothing.
    if x.device.type == "cpu" and not m2.isfinite().all():
        m2 = d.double().square_().sum(dims)
    return d, mean, m2


def _affine(
    x: Tensor,
    d: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """f(gamma * d * rstd + beta + residual) in x's dtype, in the memory of d."""
    z = d.mul_(_per_channel(rstd, x))
    if gamma is not None:
        z.mul_(_per_channel(gamma, x))
    if beta is not None:
        z.add_(_per_channel(beta, x))
    if residual is not None:
        z.add_(residual)
    return (z if activation is None else _ACTIVATIONS[activation](z)).to(x.dtype)


def _dz_and_xhat(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """dz = dy * f'(z) with z recomputed, and xhat."""
    dz = dy.to(mean.dtype)
    xhat = (x.to(mean.dtype) - _per_channel(mean, x)).mul_(_per_channel(rstd, x))
    if activation is None:
        return dz, xhat
    z = xhat if gamma is None else xhat * _per_channel(gamma, x)
    if beta is not None:
        z = z + _per_channel(beta, x)
    if residual is not None:
        z = z + residual
    return dz * _derivative(z, activation), xhat


def _derivative(z: Tensor, activation: str) -> Tensor:
    """1 - tanh^2, [z > 0], Phi(z) + z * phi(z), or s * (1 + z * (1 - s)) with s = sigmoid(z)"""
    if activation == "tanh":
        return 1 - torch.tanh(z).square()
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "gelu":
        density = torch.exp(-0.5 * z.square()) * 0.3989422804014327
        return 0.5 * (1 + torch.erf(z * 0.7071067811865476)) + z * density
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))
