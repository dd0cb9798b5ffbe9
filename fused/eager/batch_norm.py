"""Batch normalisation in plain PyTorch, with the functions of fused.kernels.batch_norm.

mu   = mean_i x_i              var = sum_i (x_i - mu)^2 / (N - k),  k the correction: 0 or 1
rstd = (var + eps)^-1/2        xhat_i = (x_i - mu) * rstd           y_i = gamma * xhat_i + beta

dgamma = sum_i dy_i * xhat_i   dbeta = sum_i dy_i
dx_i = gamma * rstd / N * (N dy_i - dbeta - N/(N-k) * xhat_i * dgamma)     batch statistics
dx_i = gamma * rstd * dy_i                                                 frozen statistics
"""

import torch


def batch_norm_fwd(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
    correction: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises x (N, C) with the statistics of the batch; updates the running ones in place.

    Returns (y, mean, rstd): y (N, C) in x's dtype, mean and rstd (C,) in float32, or float64 for
    float64. The variance is the mean of the squared deviations, never E[x^2] - E[x]^2.
    """
    n = x.shape[0]
    xc = x.to(_compute_dtype(x))
    mean = xc.mean(0)
    d = xc - mean
    m2 = d.square().sum(0)
    rstd = (m2 / (n - correction)).add_(eps).rsqrt_() if n else m2
    if n and running_mean is not None:
        running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
    if n and running_var is not None:
        # Unbiased, whatever the correction: as torch.nn.BatchNorm keeps it.
        running_var.copy_((1 - momentum) * running_var + momentum * (m2 / (n - 1)))
    return _affine(d.mul_(rstd), gamma, beta).to(x.dtype), mean, rstd


def batch_norm_eval(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises x (N, C) with frozen statistics. Returns (y, mean, rstd) as `batch_norm_fwd`."""
    acc = _compute_dtype(x)
    mean = running_mean.to(acc, copy=True)  # what backward uses must not follow a later update
    rstd = running_var.to(acc).add(eps).rsqrt_()
    y = _affine((x.to(acc) - mean).mul_(rstd), gamma, beta)
    return y.to(x.dtype), mean, rstd


def batch_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    correction: int,
    batch_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients (dx, dgamma, dbeta) of batch normalisation.

    dx (N, C) is in x's dtype; dgamma and dbeta (C,) are in the dtype of mean. `batch_statistics`
    says whether mean and rstd came from x (training) or were frozen.
    """
    n = x.shape[0]
    dyc = dy.to(mean.dtype)
    xhat = (x.to(mean.dtype) - mean).mul_(rstd)
    dbeta = dyc.sum(0)
    dgamma = (dyc * xhat).sum(0)
    slope = rstd if gamma is None else gamma * rstd
    if not batch_statistics or n == 0:
        return (dyc * slope).to(x.dtype), dgamma, dbeta
    dx = torch.sub(dyc, dbeta, alpha=1 / n)
    dx.addcmul_(xhat, dgamma, value=-1 / (n - correction)).mul_(slope)
    return dx.to(x.dtype), dgamma, dbeta


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _affine(
    xhat: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None
) -> torch.Tensor:
    """gamma * xhat + beta, overwriting xhat."""
    if gamma is not None:
        xhat.mul_(gamma)
    return xhat if beta is None else xhat.add_(beta)
