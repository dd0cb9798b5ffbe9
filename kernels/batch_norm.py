"""Batch normalisation over the N rows of x (N, C), each channel by itself.

    mu   = mean_i x_i              var = sum_i (x_i - mu)^2 / (N - k),  k the correction: 0 or 1
    rstd = (var + eps)^-1/2        xhat_i = (x_i - mu) * rstd           y_i = gamma * xhat_i + beta

    dgamma = sum_i dy_i * xhat_i   dbeta = sum_i dy_i
    dx_i = gamma * rstd / N * (N dy_i - dbeta - N/(N-k) * xhat_i * dgamma)     batch statistics
    dx_i = gamma * rstd * dy_i                                                 frozen statistics

The derivation is in docs/derivations.md. Statistics are computed in float32 (float64 for float64
input) from tiles: each tile's mean and sum of squared deviations are exact two-pass ones, merged in
a fixed order by Chan, Golub and LeVeque's formula (1979).
"""

import torch
import triton
import triton.language as tl

from fused.kernels import tuning


@triton.jit
def _column_offsets(rows, cols, stride_n, stride_c):
    return rows[:, None] * stride_n + cols.to(tl.int64)[None, :] * stride_c


@triton.jit
def _load_channel(ptr, cols, mask, default: tl.constexpr, acc: tl.constexpr):
    """A per-channel vector, or `default` where there is none."""
    if ptr is None:
        return tl.full(cols.shape, default, acc)
    else:
        return tl.load(ptr + cols, mask=mask, other=default).to(acc)


@triton.jit(do_not_specialize=["n_rows"])
def _batch_norm_fwd_kernel(
    x_ptr,  # input, shape (n_rows, n_channels)
    gamma_ptr,  # shape (n_channels,), or None for 1
    beta_ptr,  # shape (n_channels,), or None for 0
    running_mean_ptr,  # shape (n_channels,), updated in place, or None
    running_var_ptr,  # shape (n_channels,), updated in place, or None
    y_ptr,  # out: shape (n_rows, n_channels), contiguous
    mean_ptr,  # out: shape (n_channels,); its dtype is the one computed in
    rstd_ptr,  # out: shape (n_channels,)
    n_rows,
    n_channels,
    stride_x_n,
    stride_x_c,
    momentum: tl.float64,
    eps: tl.constexpr,
    correction: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = gamma * (x - mu) * rstd + beta; running = (1 - momentum) * running + momentum * batch"""
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    col_mask = cols < n_channels

    # Everything is relative to the first row: of values near 1e4 a float32 sum, and the mean
    # itself, would be off by 1e-3 of a standard deviation of 1 and more.
    first = tl.load(x_ptr + cols.to(tl.int64) * stride_x_c, mask=col_mask, other=0.0).to(acc)
    mean = tl.zeros((BLOCK_C,), acc)
    m2 = tl.zeros((BLOCK_C,), acc)  # sum of squared deviations from the mean so far
    for start in range(0, n_rows, BLOCK_N):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        mask = (rows < n_rows)[:, None] & col_mask[None, :]
        offsets = _column_offsets(rows, cols, stride_x_n, stride_x_c)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc)  # (BLOCK_N, BLOCK_C)
        x = tl.where(mask, x - first[None, :], 0.0)
        count = tl.cast(start, acc)
        tile_count = tl.cast(tl.minimum(n_rows - start, BLOCK_N), acc)
        tile_mean = tl.sum(x, axis=0) / tile_count
        d = tl.where(mask, x - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        share = tile_count / (count + tile_count)
        m2 += tl.sum(d * d, axis=0) + delta * delta * (count * share)
        mean += delta * share

    n = tl.cast(n_rows, acc)
    rstd = 1.0 / tl.sqrt(m2 / (n - correction) + eps)
    tl.store(mean_ptr + cols, first + mean, mask=col_mask)
    tl.store(rstd_ptr + cols, rstd, mask=col_mask)
    rate = tl.full((), momentum, acc)
    if running_mean_ptr is not None:
        running = tl.load(running_mean_ptr + cols, mask=col_mask, other=0.0).to(acc)
        new_mean = (1.0 - rate) * running + rate * (first + mean)
        tl.store(running_mean_ptr + cols, new_mean, mask=col_mask)
    if running_var_ptr is not None:
        running = tl.load(running_var_ptr + cols, mask=col_mask, other=0.0).to(acc)
        var = m2 / (n - 1.0)  # unbiased, whatever the correction: as torch.nn.BatchNorm keeps it
        new_var = (1.0 - rate) * running + rate * var
        tl.store(running_var_ptr + cols, new_var, mask=col_mask)

    gamma = _load_channel(gamma_ptr, cols, col_mask, 1.0, acc)
    beta = _load_channel(beta_ptr, cols, col_mask, 0.0, acc)
    for start in range(0, n_rows, BLOCK_N):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        mask = (rows < n_rows)[:, None] & col_mask[None, :]
        offsets = _column_offsets(rows, cols, stride_x_n, stride_x_c)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc)
        xhat = ((x - first[None, :]) - mean[None, :]) * rstd[None, :]
        y = gamma[None, :] * xhat + beta[None, :]
        tl.store(y_ptr + _column_offsets(rows, cols, n_channels, 1), y, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _batch_norm_eval_kernel(
    x_ptr,  # input, shape (n_rows, n_channels)
    gamma_ptr,  # shape (n_channels,), or None for 1
    beta_ptr,  # shape (n_channels,), or None for 0
    running_mean_ptr,  # shape (n_channels,)
    running_var_ptr,  # shape (n_channels,)
    y_ptr,  # out: shape (n_rows, n_channels), contiguous
    mean_ptr,  # out: running_mean, shape (n_channels,); its dtype is the one computed in
    rstd_ptr,  # out: shape (n_channels,)
    n_rows,
    n_channels,
    stride_x_n,
    stride_x_c,
    eps: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = gamma * (x - running_mean) * (running_var + eps)^-1/2 + beta"""
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    col_mask = cols < n_channels
    mean = tl.load(running_mean_ptr + cols, mask=col_mask, other=0.0).to(acc)
    rstd = 1.0 / tl.sqrt(tl.load(running_var_ptr + cols, mask=col_mask, other=1.0).to(acc) + eps)
    gamma = _load_channel(gamma_ptr, cols, col_mask, 1.0, acc)
    beta = _load_channel(beta_ptr, cols, col_mask, 0.0, acc)
    if tl.program_id(0) == 0:
        tl.store(mean_ptr + cols, mean, mask=col_mask)
        tl.store(rstd_ptr + cols, rstd, mask=col_mask)

    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    mask = (rows < n_rows)[:, None] & col_mask[None, :]
    offsets = _column_offsets(rows, cols, stride_x_n, stride_x_c)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc)  # (BLOCK_N, BLOCK_C)
    y = gamma[None, :] * ((x - mean[None, :]) * rstd[None, :]) + beta[None, :]
    tl.store(y_ptr + _column_offsets(rows, cols, n_channels, 1), y, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _batch_norm_bwd_kernel(
    dy_ptr,  # upstream gradient, shape (n_rows, n_channels)
    x_ptr,  # input, shape (n_rows, n_channels)
    gamma_ptr,  # shape (n_channels,), or None for 1
    mean_ptr,  # shape (n_channels,); its dtype is the one computed in
    rstd_ptr,  # shape (n_channels,)
    dx_ptr,  # out: shape (n_rows, n_channels), contiguous
    dgamma_ptr,  # out: shape (n_channels,)
    dbeta_ptr,  # out: shape (n_channels,)
    n_rows,
    n_channels,
    stride_dy_n,
    stride_dy_c,
    stride_x_n,
    stride_x_c,
    correction: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = gamma * rstd * (dy - dbeta/n - xhat * dgamma/(n - correction)), or gamma * rstd * dy"""
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    col_mask = cols < n_channels
    mean = tl.load(mean_ptr + cols, mask=col_mask, other=0.0)
    rstd = tl.load(rstd_ptr + cols, mask=col_mask, other=0.0)
    gamma = _load_channel(gamma_ptr, cols, col_mask, 1.0, acc)

    dgamma = tl.zeros((BLOCK_C,), acc)
    dbeta = tl.zeros((BLOCK_C,), acc)
    for start in range(0, n_rows, BLOCK_N):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        mask = (rows < n_rows)[:, None] & col_mask[None, :]
        offsets = _column_offsets(rows, cols, stride_dy_n, stride_dy_c)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(acc)  # (BLOCK_N, BLOCK_C)
        offsets = _column_offsets(rows, cols, stride_x_n, stride_x_c)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc)
        xhat = (x - mean[None, :]) * rstd[None, :]
        dgamma += tl.sum(dy * xhat, axis=0)
        dbeta += tl.sum(dy, axis=0)
    tl.store(dgamma_ptr + cols, dgamma, mask=col_mask)
    tl.store(dbeta_ptr + cols, dbeta, mask=col_mask)

    n = tl.cast(n_rows, acc)
    for start in range(0, n_rows, BLOCK_N):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        mask = (rows < n_rows)[:, None] & col_mask[None, :]
        offsets = _column_offsets(rows, cols, stride_dy_n, stride_dy_c)
        dx = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(acc)
        if BATCH_STATISTICS:
            offsets = _column_offsets(rows, cols, stride_x_n, stride_x_c)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(acc)
            xhat = (x - mean[None, :]) * rstd[None, :]
            dx = dx - (dbeta / n)[None, :] - xhat * (dgamma / (n - correction))[None, :]
        dx = dx * (gamma * rstd)[None, :]
        tl.store(dx_ptr + _column_offsets(rows, cols, n_channels, 1), dx, mask=mask)


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

    Returns (y, mean, rstd): y (N, C) contiguous in x's dtype, mean and rstd (C,).

    Bytes: reads x twice (the second time from L2 where a column tile fits there), writes y once.
    The least possible is 1 read and 1 write.
    """
    n_rows, n_channels = x.shape
    y, mean, rstd = _outputs(x)
    if x.numel() == 0:
        return y, mean, rstd
    tile = tuning.batch_norm(n_rows, n_channels, x.dtype)
    _batch_norm_fwd_kernel[tile.columns_grid(n_channels)](
        x,
        gamma,
        beta,
        running_mean,
        running_var,
        y,
        mean,
        rstd,
        n_rows,
        n_channels,
        x.stride(0),
        x.stride(1),
        momentum,
        eps=eps,
        correction=correction,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_C=tile.BLOCK_C,
        num_warps=tile.num_warps,
    )
    return y, mean, rstd


def batch_norm_eval(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises x (N, C) with frozen statistics. Returns (y, mean, rstd) as `batch_norm_fwd`.

    Bytes: reads x once, writes y once: the least possible.
    """
    n_rows, n_channels = x.shape
    y, mean, rstd = _outputs(x)
    if x.numel() == 0:
        return y, mean, rstd
    tile = tuning.batch_norm(n_rows, n_channels, x.dtype)
    _batch_norm_eval_kernel[tile.rows_grid(n_rows) + tile.columns_grid(n_channels)](
        x,
        gamma,
        beta,
        running_mean,
        running_var,
        y,
        mean,
        rstd,
        n_rows,
        n_channels,
        x.stride(0),
        x.stride(1),
        eps=eps,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_C=tile.BLOCK_C,
        num_warps=tile.num_warps,
    )
    return y, mean, rstd


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

    dx (N, C) is contiguous in x's dtype; dgamma and dbeta (C,) are in the dtype of mean.
    `batch_statistics` says whether mean and rstd came from x (training) or were frozen.

    Bytes: reads dy and x twice (x once with frozen statistics), writes dx once. The least possible
    is 1 read of each and 1 write.
    """
    n_rows, n_channels = x.shape
    dx = torch.empty((n_rows, n_channels), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        zeros = torch.zeros_like(mean)
        return dx, zeros, zeros.clone()
    dgamma, dbeta = torch.empty_like(mean), torch.empty_like(mean)
    tile = tuning.batch_norm(n_rows, n_channels, x.dtype)
    _batch_norm_bwd_kernel[tile.columns_grid(n_channels)](
        dy,
        x,
        gamma,
        mean,
        rstd,
        dx,
        dgamma,
        dbeta,
        n_rows,
        n_channels,
        dy.stride(0),
        dy.stride(1),
        x.stride(0),
        x.stride(1),
        correction=correction,
        BATCH_STATISTICS=batch_statistics,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_C=tile.BLOCK_C,
        num_warps=tile.num_warps,
    )
    return dx, dgamma, dbeta


def _outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_rows, n_channels = x.shape
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty((n_rows, n_channels), dtype=x.dtype, device=x.device)
    mean = torch.empty(n_channels, dtype=acc, device=x.device)
    return y, mean, torch.empty_like(mean)
