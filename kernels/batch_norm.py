"""Batch normalisation of x (N, C, S) over its n = N * S rows (n, s), each channel by itself.

    mu   = mean_i x_i              var = sum_i (x_i - mu)^2 / (n - k),  k the correction: 0 or 1
    rstd = (var + eps)^-1/2        xhat_i = (x_i - mu) * rstd
    z_i  = gamma * xhat_i + beta + residual_i                           y_i = f(z_i)

    dz_i = dy_i * f'(z_i)          dgamma = sum_i dz_i * xhat_i         dbeta = sum_i dz_i
    dx_i = gamma * rstd / n * (n dz_i - dbeta - n/(n-k) * xhat_i * dgamma)     batch statistics
    dx_i = gamma * rstd * dz_i                                                 frozen statistics

and dresidual = dz. f is an activation or the identity; its z is never written to memory, backward
recomputes it from x (and the residual), exactly, where a half-precision y would not be. The
derivation is in docs/derivations.md.

Statistics are computed in float32 (float64 for float64 input), relative to the channel's first row,
from tiles: each tile's mean and sum of squared deviations are exact two-pass ones, merged in a
fixed order by the formula of Chan, Golub and LeVeque (1979). Where channels are few and rows are
many, several programs share a channel: a first launch leaves one partial result for each, and every
program of the second launch merges them again, in the same order.
"""

import torch
import triton
import triton.language as tl

from fused.kernels import layout, tuning
from fused.kernels.activation import activate, derivative


@triton.jit
def _load(
    ptr, rows, cols, mask, n_inner, stride, acc: tl.constexpr
):  # fmt: skip
    """A tile (BLOCK_N, BLOCK_C) in the dtype computed in; 0 behind the mask"""
    offsets = _offsets(rows, cols, n_inner, stride)
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(acc)


@triton.jit
def _offsets(rows, cols, n_inner, stride):
    n, s = (rows // n_inner).to(tl.int64), (rows % n_inner).to(tl.int64)
    return (n * stride[0] + s * stride[2])[:, None] + (cols.to(tl.int64) * stride[1])[None, :]


@triton.jit
def _load_channel(ptr, cols, mask, default: tl.constexpr, acc: tl.constexpr):
    """A per-channel vector, or `default` where there is none"""
    if ptr is None:
        return tl.full(cols.shape, default, acc)
    else:
        return tl.load(ptr + cols, mask=mask, other=default).to(acc)


@triton.jit
def _rows_of_program(n_rows, rows_per_program):
    """[begin, end), in the integer type of n_rows"""
    begin = tl.cast(tl.program_id(0), n_rows.dtype) * rows_per_program
    return begin, tl.minimum(begin + rows_per_program, n_rows)


@triton.jit
def _moments(
    x_ptr, first, begin, end, cols, col_mask, n_inner, stride,
    acc: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean and sum of squared deviations of rows [begin, end), relative to `first`: (BLOCK_C,) each

    Relative, because of values near 1e4 a float32 sum, and the mean itself, would be off by 1e-3 of
    a standard deviation of 1 and more.
    """
    mean = tl.zeros((BLOCK_C,), acc)
    m2 = tl.zeros((BLOCK_C,), acc)
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        mask = ((rows >= 0) & (rows < end))[:, None] & col_mask[None, :]
        x = _load(x_ptr, rows, cols, mask, n_inner, stride, acc)
        x = tl.where(mask, x - first[None, :], 0.0)
        count = tl.cast(start - begin, acc)
        tile_count = tl.cast(tl.minimum(end - start, BLOCK_N), acc)
        tile_mean = tl.sum(x, axis=0) / tile_count
        d = tl.where(mask, x - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        share = tile_count / (count + tile_count)
        between = delta * delta * (count * share)  # of an overflow times 0, nothing
        m2 += tl.sum(d * d, axis=0) + tl.where(start > begin, between, 0.0)
        mean += delta * share
    return mean, m2


@triton.jit
def _merged_moments(
    partial_ptr, n_partials, n_rows, rows_per_program, n_channels, cols, col_mask,
    acc: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The moments of all rows from those of each program's rows, in a fixed order"""
    p = tl.arange(0, BLOCK_P)  # (BLOCK_P,)
    mask = (p < n_partials)[:, None] & col_mask[None, :]
    offsets = (p * 2 * n_channels)[:, None] + cols[None, :]
    means = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    m2s = tl.load(partial_ptr + offsets + n_channels, mask=mask, other=0.0)
    left = n_rows - tl.cast(p, n_rows.dtype) * rows_per_program
    counts = tl.cast(tl.maximum(tl.minimum(left, rows_per_program), 0), acc)
    counts = tl.where(p < n_partials, counts, 0.0)
    mean = tl.sum(counts[:, None] * means, axis=0) / tl.cast(n_rows, acc)
    d = tl.where(mask, means - mean[None, :], 0.0)
    return mean, tl.sum(m2s, axis=0) + tl.sum(counts[:, None] * d * d, axis=0)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def _batch_norm_moments_kernel(
    x_ptr,  # input, shape (n_rows / n_inner, n_channels, n_inner)
    partial_ptr,  # out: mean (relative to the first row) and m2, shape (programs, 2, n_channels)
    n_rows,
    n_inner,
    n_channels,
    stride_x,  # of n, c and s; so are the other strides
    rows_per_program,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean and sum of squared deviations of this program's rows"""
    acc: tl.constexpr = partial_ptr.dtype.element_ty
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    col_mask = cols < n_channels
    begin, end = _rows_of_program(n_rows, rows_per_program)
    first = tl.load(x_ptr + cols.to(tl.int64) * stride_x[1], mask=col_mask, other=0.0).to(acc)
    mean, m2 = _moments(
        x_ptr, first, begin, end, cols, col_mask, n_inner, stride_x,
        acc, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    out = partial_ptr + tl.program_id(0) * 2 * n_channels + cols
    tl.store(out, mean, mask=col_mask)
    tl.store(out + n_channels, m2, mask=col_mask)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program", "n_partials"])
def _batch_norm_fwd_kernel(
    x_ptr,  # input, shape (n_rows / n_inner, n_channels, n_inner)
    gamma_ptr,  # shape (n_channels,), or None for 1
    beta_ptr,  # shape (n_channels,), or None for 0
    residual_ptr,  # shaped as x, or None for 0
    running_mean_ptr,  # shape (n_channels,), updated in place, or None
    running_var_ptr,  # shape (n_channels,), updated in place, or None
    tracked_ptr,  # how many batches there were, one int64, or None
    partial_ptr,  # from _batch_norm_moments_kernel where STATISTICS is "partial"
    y_ptr,  # out: shaped as x
    mean_ptr,  # out: shape (n_channels,); its dtype is the one computed in
    rstd_ptr,  # out: shape (n_channels,)
    n_rows,
    n_inner,
    n_channels,
    stride_x,  # of n, c and s; so are the other strides
    stride_r,
    stride_y,
    rows_per_program,
    n_partials,
    momentum: tl.float64,
    eps: tl.constexpr,
    correction: tl.constexpr,
    STATISTICS: tl.constexpr,  # "own": of this program's rows, all rows; "partial"; or "running"
    CUMULATIVE: tl.constexpr,  # momentum is 1 / tracked, else tracked is counted up here
    SKIP_NONFINITE: tl.constexpr,  # channels with an inf or NaN keep their running statistics
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """y = f(gamma * xhat + beta + residual); running += momentum * (batch - running)"""
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    col_mask = cols < n_channels
    begin, end = _rows_of_program(n_rows, rows_per_program)

    if STATISTICS == "running":
        first = tl.load(running_mean_ptr + cols, mask=col_mask, other=0.0).to(acc)
        mean = tl.zeros((BLOCK_C,), acc)
        var = tl.load(running_var_ptr + cols, mask=col_mask, other=1.0).to(acc)
    else:
        first = tl.load(x_ptr + cols.to(tl.int64) * stride_x[1], mask=col_mask, other=0.0).to(acc)
        if STATISTICS == "own":
            mean, m2 = _moments(
                x_ptr, first, begin, end, cols, col_mask, n_inner, stride_x, acc, BLOCK_N, BLOCK_C,
            )  # fmt: skip
        else:
            mean, m2 = _merged_moments(
                partial_ptr, n_partials, n_rows, rows_per_program, n_channels, cols, col_mask,
                acc, BLOCK_P,
            )  # fmt: skip
        n = tl.cast(n_rows, acc)
        var = m2 / (n - correction)
    rstd = 1.0 / tl.sqrt(var + eps)

    if tl.program_id(0) == 0:
        tl.store(mean_ptr + cols, first + mean, mask=col_mask)
        tl.store(rstd_ptr + cols, rstd, mask=col_mask)
        if STATISTICS != "running":
            rate = tl.full((), momentum, acc)
            if tracked_ptr is not None:
                tracked = tl.load(tracked_ptr)
                if CUMULATIVE:
                    rate = 1.0 / tracked.to(acc)
                elif tl.program_id(1) == 0:
                    tl.store(tracked_ptr, tracked + 1)
            unbiased = m2 / (n - 1.0)  # whatever the correction: as torch.nn.BatchNorm keeps it
            kept = col_mask
            if SKIP_NONFINITE:  # a difference with itself is 0, but NaN for inf and NaN
                kept = col_mask & (unbiased - unbiased == 0.0) & (first + mean == first + mean)
            if running_mean_ptr is not None:
                old = tl.load(running_mean_ptr + cols, mask=col_mask, other=0.0).to(acc)
                new = (1.0 - rate) * old + rate * (first + mean)
                tl.store(running_mean_ptr + cols, new, mask=kept)
            if running_var_ptr is not None:
                old = tl.load(running_var_ptr + cols, mask=col_mask, other=0.0).to(acc)
                new = (1.0 - rate) * old + rate * unbiased
                tl.store(running_var_ptr + cols, new, mask=kept)

    gamma = _load_channel(gamma_ptr, cols, col_mask, 1.0, acc)
    beta = _load_channel(beta_ptr, cols, col_mask, 0.0, acc)
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        mask = ((rows >= 0) & (rows < end))[:, None] & col_mask[None, :]
        x = _load(x_ptr, rows, cols, mask, n_inner, stride_x, acc)
        xhat = ((x - first[None, :]) - mean[None, :]) * rstd[None, :]
        z = gamma[None, :] * xhat + beta[None, :]
        if residual_ptr is not None:
            z += _load(residual_ptr, rows, cols, mask, n_inner, stride_r, acc)
        offsets = _offsets(rows, cols, n_inner, stride_y)
        tl.store(y_ptr + offsets, activate(z, ACTIVATION), mask=mask)


@triton.jit
def _dz_and_xhat(
    dy_ptr, x_ptr, residual_ptr, rows, cols, mask, mean, rstd, gamma, beta, n_inner,
    stride_dy, stride_x,
    stride_r, acc: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dz = dy * f'(z) with z recomputed, and xhat; both (BLOCK_N, BLOCK_C), dz 0 behind the mask"""
    dz = _load(dy_ptr, rows, cols, mask, n_inner, stride_dy, acc)
    x = _load(x_ptr, rows, cols, mask, n_inner, stride_x, acc)
    xhat = (x - mean[None, :]) * rstd[None, :]
    if ACTIVATION is not None:
        z = gamma[None, :] * xhat + beta[None, :]
        if residual_ptr is not None:
            z += _load(residual_ptr, rows, cols, mask, n_inner, stride_r, acc)
        dz = tl.where(mask, dz * derivative(z, ACTIVATION), 0.0)
    return dz, xhat


@triton.jit
def _sums(
    dy_ptr, x_ptr, residual_ptr, begin, end, cols, col_mask, mean, rstd, gamma, beta, n_inner,
    stride_dy, stride_x,
    stride_r,
    acc: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dgamma and dbeta of rows [begin, end): (BLOCK_C,) each"""
    dgamma = tl.zeros((BLOCK_C,), acc)
    dbeta = tl.zeros((BLOCK_C,), acc)
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        mask = ((rows >= 0) & (rows < end))[:, None] & col_mask[None, :]
        dz, xhat = _dz_and_xhat(
            dy_ptr, x_ptr, residual_ptr, rows, cols, mask, mean, rstd, gamma, beta, n_inner,
            stride_dy, stride_x,
            stride_r, acc, ACTIVATION,
        )  # fmt: skip
        dgamma += tl.sum(tl.where(mask, dz * xhat, 0.0), axis=0)
        dbeta += tl.sum(dz, axis=0)
    return dgamma, dbeta


@triton.jit(do_not_specialize=["n_rows", "rows_per_program"])
def _batch_norm_sums_kernel(
    dy_ptr,  # upstream gradient, shaped as x
    x_ptr,  # input, shape (n_rows / n_inner, n_channels, n_inner)
    gamma_ptr,  # shape (n_channels,), or None for 1
    beta_ptr,  # shape (n_channels,), or None for 0
    residual_ptr,  # shaped as x, or None for 0
    mean_ptr,  # shape (n_channels,); its dtype is the one computed in
    rstd_ptr,  # shape (n_channels,)
    partial_ptr,  # out: dgamma and dbeta of each program's rows, shape (programs, 2, n_channels)
    n_rows,
    n_inner,
    n_channels,
    stride_dy,
    stride_x,  # of n, c and s; so are the other strides
    stride_r,
    rows_per_program,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dgamma = sum_i dz_i * xhat_i and dbeta = sum_i dz_i over this program's rows"""
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    col_mask = cols < n_channels
    begin, end = _rows_of_program(n_rows, rows_per_program)
    mean = tl.load(mean_ptr + cols, mask=col_mask, other=0.0)
    rstd = tl.load(rstd_ptr + cols, mask=col_mask, other=0.0)
    gamma = _load_channel(gamma_ptr, cols, col_mask, 1.0, acc)
    beta = _load_channel(beta_ptr, cols, col_mask, 0.0, acc)
    dgamma, dbeta = _sums(
        dy_ptr, x_ptr, residual_ptr, begin, end, cols, col_mask, mean, rstd, gamma, beta, n_inner,
        stride_dy, stride_x,
        stride_r, acc, ACTIVATION, BLOCK_N, BLOCK_C,
    )  # fmt: skip
    out = partial_ptr + tl.program_id(0) * 2 * n_channels + cols
    tl.store(out, dgamma, mask=col_mask)
    tl.store(out + n_channels, dbeta, mask=col_mask)


@triton.jit(do_not_specialize=["n_rows", "rows_per_program", "n_partials"])
def _batch_norm_bwd_kernel(
    dy_ptr,  # upstream gradient, shaped as x
    x_ptr,  # input, shape (n_rows / n_inner, n_channels, n_inner)
    gamma_ptr,  # shape (n_channels,), or None for 1
    beta_ptr,  # shape (n_channels,), or None for 0
    residual_ptr,  # shaped as x, or None for 0
    mean_ptr,  # shape (n_channels,); its dtype is the one computed in
    rstd_ptr,  # shape (n_channels,)
    partial_ptr,  # dgamma and dbeta in parts, shape (n_partials, 2, n_channels); None: summed here
    count_ptr,  # rows that the statistics come from, one number; None for n_rows
    dx_ptr,  # out: shaped as x
    dresidual_ptr,  # out: dz, shaped as x; None where it is not wanted
    dgamma_ptr,  # out: shape (n_channels,)
    dbeta_ptr,  # out: shape (n_channels,)
    n_rows,
    n_inner,
    n_channels,
    stride_dy,
    stride_x,  # of n, c and s; so are the other strides
    stride_r,
    stride_dx,
    stride_dr,
    rows_per_program,
    n_partials,
    correction: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dx = gamma * rstd * (dz - dbeta/n - xhat * dgamma/(n - correction)), or gamma * rstd * dz"""
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    col_mask = cols < n_channels
    begin, end = _rows_of_program(n_rows, rows_per_program)
    mean = tl.load(mean_ptr + cols, mask=col_mask, other=0.0)
    rstd = tl.load(rstd_ptr + cols, mask=col_mask, other=0.0)
    gamma = _load_channel(gamma_ptr, cols, col_mask, 1.0, acc)
    beta = _load_channel(beta_ptr, cols, col_mask, 0.0, acc)

    if partial_ptr is None:
        dgamma, dbeta = _sums(
            dy_ptr, x_ptr, residual_ptr, begin, end, cols, col_mask, mean, rstd, gamma, beta,
            n_inner, stride_dy, stride_x,
            stride_r, acc, ACTIVATION, BLOCK_N, BLOCK_C,
        )  # fmt: skip
    else:
        p = tl.arange(0, BLOCK_P)  # (BLOCK_P,)
        parts = partial_ptr + (p * 2 * n_channels)[:, None] + cols[None, :]
        parts_mask = (p < n_partials)[:, None] & col_mask[None, :]
        dgamma = tl.sum(tl.load(parts, mask=parts_mask, other=0.0), axis=0)
        dbeta = tl.sum(tl.load(parts + n_channels, mask=parts_mask, other=0.0), axis=0)
    if tl.program_id(0) == 0:
        tl.store(dgamma_ptr + cols, dgamma, mask=col_mask)
        tl.store(dbeta_ptr + cols, dbeta, mask=col_mask)

    n = tl.cast(n_rows, acc)
    if count_ptr is not None:
        n = tl.load(count_ptr).to(acc)
    for start in range(begin, end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        mask = ((rows >= 0) & (rows < end))[:, None] & col_mask[None, :]
        dz, xhat = _dz_and_xhat(
            dy_ptr, x_ptr, residual_ptr, rows, cols, mask, mean, rstd, gamma, beta, n_inner,
            stride_dy, stride_x,
            stride_r, acc, ACTIVATION,
        )  # fmt: skip
        dx = dz
        if BATCH_STATISTICS:
            dx = dz - (dbeta / n)[None, :] - xhat * (dgamma / (n - correction))[None, :]
        dx = dx * (gamma * rstd)[None, :]
        offsets = _offsets(rows, cols, n_inner, stride_dx)
        tl.store(dx_ptr + offsets, dx, mask=mask)
        if dresidual_ptr is not None:
            offsets = _offsets(rows, cols, n_inner, stride_dr)
            tl.store(dresidual_ptr + offsets, dz, mask=mask)


def batch_norm_fwd(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    tracked: torch.Tensor | None,
    momentum: float | None,
    eps: float,
    correction: int,
    activation: str | None,
    skip_nonfinite: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises x (N, C, *S) with the statistics of the batch; updates the running ones in place.

    A momentum of None is 1 / tracked; otherwise tracked, if given, is counted up. Returns
    (y, mean, rstd): y in x's dtype and memory format, mean and rstd (C,).

    Bytes: reads x twice (the second time from L2 where a column tile fits there) and the residual
    once, writes y once; one launch, or two where programs share channels. The least possible is 1
    read and 1 write.
    """
    x3 = layout.inner(x)
    plan = _plan(x3)
    partial = None
    if plan.n_programs > 1:
        partial = _partials(x3, plan)
        _launch_moments(x3, partial, plan)
    return _launch_fwd(
        x, x3, gamma, beta, residual, running_mean, running_var, tracked, partial, momentum, eps,
        correction, activation, skip_nonfinite, "own" if partial is None else "partial", plan,
    )  # fmt: skip


def batch_norm_eval(
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises x (N, C, *S) with given statistics (C,). Returns (y, mean, rstd) as above.

    Bytes: reads x and the residual once, writes y once: the least possible.
    """
    x3 = layout.inner(x)
    return _launch_fwd(
        x, x3, gamma, beta, residual, mean, var, None, None, 0.0, eps, 0, activation, False,
        "running", _plan(x3, share_channels=True),
    )  # fmt: skip


def batch_norm_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, m2) of x (N, C, *S): per-channel mean and sum of squared deviations, (C,) each.

    Bytes: reads x once.
    """
    x3 = layout.inner(x)
    plan = _plan(x3)
    partial = _partials(x3, plan)
    if x.numel() == 0:
        return partial.new_zeros(x.shape[1]), partial.new_zeros(x.shape[1])
    _launch_moments(x3, partial, plan)
    n_rows = x3.shape[0] * x3.shape[2]
    begins = torch.arange(plan.n_programs, device=x.device) * plan.rows_per_program
    counts = (n_rows - begins).clamp(max=plan.rows_per_program).to(partial.dtype).unsqueeze(1)
    means, m2s = partial.unbind(1)
    mean = (counts * means).sum(0) / n_rows
    m2 = m2s.sum(0) + (counts * (means - mean).square()).sum(0)
    return x3[0, :, 0].to(mean.dtype) + mean, m2


def batch_norm_sums(
    dy: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    activation: str | None,
) -> torch.Tensor:
    """dgamma and dbeta as one tensor (2, C), in the dtype of mean.

    Bytes: reads dy, x and, with an activation, the residual once.
    """
    if x.numel() == 0:
        return mean.new_zeros(2, x.shape[1])
    x3 = layout.inner(x)
    plan = _plan(x3)
    partial = _partials(x3, plan)
    _launch_sums(dy, x3, gamma, beta, residual, mean, rstd, partial, activation, plan)
    return partial.sum(0)


def batch_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    correction: int,
    activation: str | None,
    batch_statistics: bool,
    want_dresidual: bool,
    sums: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients (dx, dgamma, dbeta, dresidual) of batch normalisation.

    dx is in x's dtype and memory format; dgamma and dbeta (C,) are in the dtype of mean; dresidual
    is None where it is not wanted. `batch_statistics` says whether mean and rstd came from x
    (training) or were frozen. sums (2, C) and count (one number) are dgamma, dbeta and the number
    of rows where more rows than x's were normalised together.

    Bytes: reads dy, x and, with an activation, the residual twice, writes dx and dresidual once;
    one launch, or two where programs share channels. The least possible is 1 read of each.
    """
    x3 = layout.inner(x)
    dx = torch.empty_like(x)
    dgamma, dbeta = torch.empty_like(mean), torch.empty_like(mean)
    if x.numel() == 0:
        dgamma, dbeta = dgamma.zero_(), dbeta.zero_()
        return dx, dgamma, dbeta, torch.empty_like(x) if want_dresidual else None
    plan = _plan(x3, share_channels=sums is not None)
    partial = None if sums is None else sums.unsqueeze(0)
    if partial is None and plan.n_programs > 1:
        partial = _partials(x3, plan)
        _launch_sums(dy, x3, gamma, beta, residual, mean, rstd, partial, activation, plan)
    # Without an activation dz is dy: there is nothing to write.
    dresidual = None
    if want_dresidual:
        dresidual = torch.empty_like(x) if activation else dy
    dy3, residual3 = layout.inner(dy), None if residual is None else layout.inner(residual)
    dx3 = layout.inner(dx)
    dr3 = layout.inner(dresidual) if dresidual is not None and activation else None
    n_partials = 0 if partial is None else partial.shape[0]
    _batch_norm_bwd_kernel[plan.grid(x3.shape[1])](
        dy3,
        x3,
        gamma,
        beta,
        residual3,
        mean,
        rstd,
        partial,
        count,
        dx3,
        dr3,
        dgamma,
        dbeta,
        x3.shape[0] * x3.shape[2],
        x3.shape[2],
        x3.shape[1],
        layout.strides(dy3),
        layout.strides(x3),
        layout.strides(residual3),
        layout.strides(dx3),
        layout.strides(dr3),
        plan.rows_per_program,
        n_partials,
        correction=correction,
        BATCH_STATISTICS=batch_statistics,
        ACTIVATION=activation,
        BLOCK_N=plan.tile.BLOCK_N,
        BLOCK_C=plan.tile.BLOCK_C,
        BLOCK_P=tuning.next_power_of_2(n_partials),
        num_warps=plan.tile.num_warps,
    )
    layout.copy_back(dx, dx3)
    layout.copy_back(dresidual, dr3)
    return dx, dgamma, dbeta, dresidual


def _plan(x3: torch.Tensor, share_channels: bool = False) -> tuning.BatchNormPlan:
    n_rows, n_channels, n_inner = x3.shape[0] * x3.shape[2], x3.shape[1], x3.shape[2]
    return tuning.batch_norm(
        n_rows, n_channels, n_inner, x3.stride(1), x3.dtype, share_channels=share_channels
    )


def _partials(x3: torch.Tensor, plan: tuning.BatchNormPlan) -> torch.Tensor:
    acc = torch.float64 if x3.dtype == torch.float64 else torch.float32
    return torch.empty((plan.n_programs, 2, x3.shape[1]), dtype=acc, device=x3.device)


def _launch_moments(x3: torch.Tensor, partial: torch.Tensor, plan: tuning.BatchNormPlan) -> None:
    _batch_norm_moments_kernel[plan.grid(x3.shape[1])](
        x3,
        partial,
        x3.shape[0] * x3.shape[2],
        x3.shape[2],
        x3.shape[1],
        layout.strides(x3),
        plan.rows_per_program,
        BLOCK_N=plan.tile.BLOCK_N,
        BLOCK_C=plan.tile.BLOCK_C,
        num_warps=plan.tile.num_warps,
    )


def _launch_sums(
    dy: torch.Tensor,
    x3: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    partial: torch.Tensor,
    activation: str | None,
    plan: tuning.BatchNormPlan,
) -> None:
    dy3, residual3 = layout.inner(dy), None if residual is None else layout.inner(residual)
    _batch_norm_sums_kernel[plan.grid(x3.shape[1])](
        dy3,
        x3,
        gamma,
        beta,
        residual3,
        mean,
        rstd,
        partial,
        x3.shape[0] * x3.shape[2],
        x3.shape[2],
        x3.shape[1],
        layout.strides(dy3),
        layout.strides(x3),
        layout.strides(residual3),
        plan.rows_per_program,
        ACTIVATION=activation,
        BLOCK_N=plan.tile.BLOCK_N,
        BLOCK_C=plan.tile.BLOCK_C,
        num_warps=plan.tile.num_warps,
    )


def _launch_fwd(
    x: torch.Tensor,
    x3: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    tracked: torch.Tensor | None,
    partial: torch.Tensor | None,
    momentum: float | None,
    eps: float,
    correction: int,
    activation: str | None,
    skip_nonfinite: bool,
    statistics: str,
    plan: tuning.BatchNormPlan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_channels = x3.shape[1]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.empty_like(x)
    mean = torch.empty(n_channels, dtype=acc, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        if tracked is not None and momentum is not None:
            tracked.add_(1)
        return y, mean.zero_(), rstd.zero_()
    y3, residual3 = layout.inner(y), None if residual is None else layout.inner(residual)
    n_partials = 0 if partial is None else partial.shape[0]
    _batch_norm_fwd_kernel[plan.grid(n_channels)](
        x3,
        gamma,
        beta,
        residual3,
        running_mean,
        running_var,
        tracked,
        partial,
        y3,
        mean,
        rstd,
        x3.shape[0] * x3.shape[2],
        x3.shape[2],
        n_channels,
        layout.strides(x3),
        layout.strides(residual3),
        layout.strides(y3),
        plan.rows_per_program,
        n_partials,
        momentum or 0.0,
        eps=eps,
        correction=correction,
        STATISTICS=statistics,
        CUMULATIVE=momentum is None,
        SKIP_NONFINITE=skip_nonfinite,
        ACTIVATION=activation,
        BLOCK_N=plan.tile.BLOCK_N,
        BLOCK_C=plan.tile.BLOCK_C,
        BLOCK_P=tuning.next_power_of_2(n_partials),
        num_warps=plan.tile.num_warps,
    )
    layout.copy_back(y, y3)
    return y, mean, rstd
