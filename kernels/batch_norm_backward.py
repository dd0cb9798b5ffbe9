"""Batch norm's backward kernels; the mathematics is in batch_norm.py."""

import triton
import triton.language as tl

from fused.kernels.activation import pull_back, pull_back_from_output
from fused.kernels.batch_norm_signs import load_signs
from fused.kernels.batch_norm_tile import (
    channels_in,
    columns_of,
    count_rows,
    load_channel,
    mask_of,
    offset_of,
    offsets_in_tile,
    parts_of,
    pooled,
    start_of,
)


@triton.jit
def _dz_and_d(
    dy_ptr, x_ptr, kept_ptr, mask, mean, slope, beta, start, column, N, C, L,
    acc: tl.constexpr, ACTIVATION: tl.constexpr, KEPT: tl.constexpr,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz = dy * f'(z) and d = x - mean: tiles; dy = x = 0 behind the mask, slope = gamma * rstd"""
    dz = tl.load(dy_ptr, mask=mask, other=0.0).to(acc)
    x = tl.load(x_ptr, mask=mask, other=0.0).to(acc)
    d = x - mean[None, :]
    if KEPT == "signs":
        positive = load_signs(
            kept_ptr, start, column, N, C, L, GROUP, COLUMNS, BLOCK_N, BLOCK_L, BLOCK_C
        )  # fmt: skip
        dz = tl.where(positive, dz, 0.0)
    elif KEPT == "output":
        y = tl.load(kept_ptr, mask=mask, other=0.0).to(acc)
        dz = pull_back_from_output(dz, y, ACTIVATION)
    elif ACTIVATION is not None:
        z = tl.fma(d, slope[None, :], beta[None, :])
        if KEPT == "residual":
            z += tl.load(kept_ptr, mask=mask, other=0.0).to(acc)
        dz = pull_back(dz, z, ACTIVATION)
    return dz, d


@triton.jit
def _dx(dz, d, dgamma, dbeta, rstd, slope, n, correction, BATCH_STATISTICS: tl.constexpr):
    """slope * (dz - dbeta/n - xhat * dgamma/(n - correction)), or slope * dz; xhat = d * rstd"""
    if BATCH_STATISTICS:
        dz = tl.fma(d, (-dgamma / (n - correction) * rstd)[None, :], dz - (dbeta / n)[None, :])
    return dz * slope[None, :]


@triton.jit
def _sums(
    dy_ptr, x_ptr, kept_ptr, dx_ptr, dz_ptr, begin, end, column, cols, col_mask,
    mean, rstd, gamma, beta, N, C, L, stride_dy, stride_x, stride_k, stride_dx, stride_dz,
    acc: tl.constexpr, ACTIVATION: tl.constexpr, KEPT: tl.constexpr,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr,
    PACK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dgamma and dbeta of tiles [begin, end): (BLOCK_C,) each; dz, and slope * dz, on the way

    Each place of the tile sums by itself: no exchange between threads before the end.
    """
    dy_offsets = offsets_in_tile(cols, stride_dy, ALIGN, BLOCK_N, BLOCK_L)
    x_offsets = offsets_in_tile(cols, stride_x, ALIGN, BLOCK_N, BLOCK_L)
    k_offsets = offsets_in_tile(cols, stride_k, ALIGN, BLOCK_N, BLOCK_L)
    dx_offsets = offsets_in_tile(cols, stride_dx, ALIGN, BLOCK_N, BLOCK_L)
    dz_offsets = offsets_in_tile(cols, stride_dz, ALIGN, BLOCK_N, BLOCK_L)
    slope = gamma * rstd
    dgamma = tl.zeros((BLOCK_N * BLOCK_L, BLOCK_C), acc)
    dbeta = tl.zeros((BLOCK_N * BLOCK_L, BLOCK_C), acc)
    for tile in tl.range(begin, end, num_stages=STAGES):
        start = start_of(tile, L, BLOCK_N, BLOCK_L)
        mask = mask_of(start, col_mask, N, L, ALIGN, BLOCK_N, BLOCK_L)
        k_ptr = kept_ptr
        if KEPT == "residual" or KEPT == "output":
            k_ptr += offset_of(start, stride_k, ALIGN) + k_offsets
        dz, d = _dz_and_d(
            dy_ptr + offset_of(start, stride_dy, ALIGN) + dy_offsets,
            x_ptr + offset_of(start, stride_x, ALIGN) + x_offsets,
            k_ptr, mask, mean, slope, beta, start, column, N, C, L,
            acc, ACTIVATION, KEPT, GROUP, COLUMNS, BLOCK_N, BLOCK_L, BLOCK_C,
        )  # fmt: skip
        # The mask is a predicate of one instruction; on a summand it would be another. In another
        # order than this some bytes spill on sm_100.
        dbeta = tl.where(mask, dbeta + dz, dbeta)
        if dx_ptr is not None:
            dx = dz * slope[None, :]
            tl.store(dx_ptr + offset_of(start, stride_dx, ALIGN) + dx_offsets, dx, mask=mask)
        if dz_ptr is not None:
            tl.store(dz_ptr + offset_of(start, stride_dz, ALIGN) + dz_offsets, dz, mask=mask)
        dgamma = tl.where(mask, tl.fma(dz, d, dgamma), dgamma)
    return pooled(tl.sum(dgamma, axis=0), PACK) * rstd, pooled(tl.sum(dbeta, axis=0), PACK)


@triton.jit(do_not_specialize=["N", "n_tiles", "tiles_per_program"])
def _batch_norm_sums_kernel(
    dy_ptr,  # upstream gradient, shaped as x
    x_ptr,  # input, shape (N, C, L)
    gamma_ptr,  # shape (C,), or None for 1
    beta_ptr,  # shape (C,), or None for 0
    kept_ptr,  # what KEPT says, for the derivative of the activation
    mean_ptr,  # shape (C,); its dtype is the one computed in
    rstd_ptr,  # shape (C,)
    dx_ptr,  # out: shaped as x, with frozen statistics; None with the batch's
    dz_ptr,  # out: shaped as x, the residual's gradient; None where it is not wanted
    partial_ptr,  # out: dgamma and dbeta of each program's rows, shape (programs, 2, C)
    N,
    C,
    L,
    stride_dy,  # of n, c and l; so are the other strides
    stride_x,
    stride_k,
    stride_dx,
    stride_dz,
    n_tiles,
    tiles_per_program,
    ACTIVATION: tl.constexpr,
    KEPT: tl.constexpr,  # "residual" or "output", shaped as x, "signs" of z, or None: no residual
    GROUP: tl.constexpr,  # signs in a byte
    COLUMNS: tl.constexpr,  # of channels, not of positions
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
    PACK: tl.constexpr,  # a tuning.Pack, or None; with one, C counts its columns
):
    """dgamma = sum_i dz_i * xhat_i and dbeta = sum_i dz_i over this program's rows"""
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    if PACK is not None:  # all tensors lie alike
        stride_dy, stride_k, stride_dx, stride_dz = stride_x, stride_x, stride_x, stride_x
    column = tl.program_id(0)
    cols, col_mask, channels, _, leads = columns_of(column, C, PACK, ALIGN, BLOCK_L, BLOCK_C)
    begin = tl.program_id(1) * tiles_per_program
    end = tl.minimum(begin + tiles_per_program, n_tiles)
    mean = tl.load(mean_ptr + channels, mask=col_mask, other=0.0)
    rstd = tl.load(rstd_ptr + channels, mask=col_mask, other=0.0)
    gamma = load_channel(gamma_ptr, channels, col_mask, 1.0, acc)
    beta = load_channel(beta_ptr, channels, col_mask, 0.0, acc)
    dgamma, dbeta = _sums(
        dy_ptr, x_ptr, kept_ptr, dx_ptr, dz_ptr, begin, end, column, cols, col_mask,
        mean, rstd, gamma, beta, N, C, L, stride_dy, stride_x, stride_k, stride_dx, stride_dz,
        acc, ACTIVATION, KEPT, GROUP, COLUMNS, ALIGN, STAGES, PACK, BLOCK_N, BLOCK_L, BLOCK_C,
    )  # fmt: skip
    C = channels_in(C, PACK)
    out = partial_ptr + tl.program_id(1).to(tl.int64) * 2 * C + channels
    tl.store(out, dgamma, mask=leads)
    tl.store(out + C, dbeta, mask=leads)


@triton.jit(do_not_specialize=["N", "n_tiles", "tiles_per_program", "n_partials"])
def _batch_norm_bwd_kernel(
    dy_ptr,  # upstream gradient, shaped as x
    x_ptr,  # input, shape (N, C, L)
    gamma_ptr,  # shape (C,), or None for 1
    beta_ptr,  # shape (C,), or None for 0
    kept_ptr,  # what KEPT says, for the derivative of the activation
    mean_ptr,  # shape (C,); its dtype is the one computed in
    rstd_ptr,  # shape (C,)
    partial_ptr,  # dgamma and dbeta in parts, shape (n_partials, 2, C), where SUMS is "partial"
    count_ptr,  # rows that the statistics come from, one number; None for N * L
    dx_ptr,  # out: shaped as x
    dz_ptr,  # out: shaped as x, the residual's gradient; None where it is not wanted
    dgamma_ptr,  # out: shape (C,)
    dbeta_ptr,  # out: shape (C,)
    N,
    C,
    L,
    stride_dy,  # of n, c and l; so are the other strides
    stride_x,
    stride_k,
    stride_dx,
    stride_dz,
    n_tiles,
    tiles_per_program,
    n_partials,
    correction: tl.constexpr,
    SUMS: tl.constexpr,  # of this one "tile", of this "program", or "partial" ones
    BATCH_STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEPT: tl.constexpr,  # "residual" or "output", shaped as x, "signs" of z, or None: no residual
    GROUP: tl.constexpr,  # signs in a byte
    COLUMNS: tl.constexpr,  # of channels, not of positions
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
    PACK: tl.constexpr,  # a tuning.Pack, or None; with one, C counts its columns
    BLOCK_P: tl.constexpr,
):
    """dx = gamma * rstd * (dz - dbeta/n - xhat * dgamma/(n - correction)), or gamma * rstd * dz

    Tiles are written from the last to the first: what was read last is what L2 still has.
    """
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    if PACK is not None:  # all tensors lie alike
        stride_dy, stride_k, stride_dx, stride_dz = stride_x, stride_x, stride_x, stride_x
    column = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    cols, col_mask, channels, _, leads = columns_of(column, C, PACK, ALIGN, BLOCK_L, BLOCK_C)
    begin = part * tiles_per_program
    end = tl.minimum(begin + tiles_per_program, n_tiles)
    mean = tl.load(mean_ptr + channels, mask=col_mask, other=0.0)
    rstd = tl.load(rstd_ptr + channels, mask=col_mask, other=0.0)
    gamma = load_channel(gamma_ptr, channels, col_mask, 1.0, acc)
    beta = load_channel(beta_ptr, channels, col_mask, 0.0, acc)
    slope = gamma * rstd
    dy_offsets = offsets_in_tile(cols, stride_dy, ALIGN, BLOCK_N, BLOCK_L)
    x_offsets = offsets_in_tile(cols, stride_x, ALIGN, BLOCK_N, BLOCK_L)
    k_offsets = offsets_in_tile(cols, stride_k, ALIGN, BLOCK_N, BLOCK_L)
    dx_offsets = offsets_in_tile(cols, stride_dx, ALIGN, BLOCK_N, BLOCK_L)
    dz_offsets = offsets_in_tile(cols, stride_dz, ALIGN, BLOCK_N, BLOCK_L)

    n = count_rows(N, L, acc, PACK)
    if count_ptr is not None:
        n = tl.load(count_ptr).to(acc)
    if SUMS == "tile":
        start = start_of(0, L, BLOCK_N, BLOCK_L)
        mask = mask_of(start, col_mask, N, L, ALIGN, BLOCK_N, BLOCK_L)
        k_ptr = kept_ptr
        if KEPT == "residual" or KEPT == "output":
            k_ptr += k_offsets
        dz, d = _dz_and_d(
            dy_ptr + dy_offsets, x_ptr + x_offsets,
            k_ptr, mask, mean, slope, beta, start, column, N, C, L,
            acc, ACTIVATION, KEPT, GROUP, COLUMNS, BLOCK_N, BLOCK_L, BLOCK_C,
        )  # fmt: skip
        dz = tl.where(mask, dz, 0.0)
        dgamma = pooled(tl.sum(dz * tl.where(mask, d, 0.0), axis=0), PACK) * rstd
        dbeta = pooled(tl.sum(dz, axis=0), PACK)
        dx = _dx(dz, d, dgamma, dbeta, rstd, slope, n, correction, BATCH_STATISTICS)
        tl.store(dx_ptr + dx_offsets, dx, mask=mask)
        if dz_ptr is not None:
            tl.store(dz_ptr + dz_offsets, dz, mask=mask)
    else:
        if SUMS == "program":
            # With frozen statistics dx does not wait for the sums.
            dgamma, dbeta = _sums(
                dy_ptr, x_ptr, kept_ptr, None if BATCH_STATISTICS else dx_ptr, dz_ptr, begin, end,
                column, cols, col_mask, mean, rstd, gamma, beta, N, C, L,
                stride_dy, stride_x, stride_k, stride_dx, stride_dz,
                acc, ACTIVATION, KEPT, GROUP, COLUMNS, ALIGN, STAGES,
                PACK, BLOCK_N, BLOCK_L, BLOCK_C,
            )  # fmt: skip
        else:
            p, p_exists = parts_of(n_partials, BLOCK_P, BLOCK_C, PACK)
            n_channels = channels_in(C, PACK)
            parts = partial_ptr + (channels[:, None] + p * 2 * n_channels)
            p_mask = col_mask[:, None] & p_exists
            dgamma = pooled(tl.sum(tl.load(parts, mask=p_mask, other=0.0), axis=1), PACK)
            parts += n_channels
            dbeta = pooled(tl.sum(tl.load(parts, mask=p_mask, other=0.0), axis=1), PACK)
        if SUMS == "partial" or BATCH_STATISTICS:
            for i in tl.range(begin, end, num_stages=STAGES):
                start = start_of(begin + end - 1 - i, L, BLOCK_N, BLOCK_L)
                mask = mask_of(start, col_mask, N, L, ALIGN, BLOCK_N, BLOCK_L)
                k_ptr = kept_ptr
                if KEPT == "residual" or KEPT == "output":
                    k_ptr += offset_of(start, stride_k, ALIGN) + k_offsets
                dz, d = _dz_and_d(
                    dy_ptr + offset_of(start, stride_dy, ALIGN) + dy_offsets,
                    x_ptr + offset_of(start, stride_x, ALIGN) + x_offsets,
                    k_ptr, mask, mean, slope, beta, start, column, N, C, L,
                    acc, ACTIVATION, KEPT, GROUP, COLUMNS, BLOCK_N, BLOCK_L, BLOCK_C,
                )  # fmt: skip
                dx = _dx(dz, d, dgamma, dbeta, rstd, slope, n, correction, BATCH_STATISTICS)
                tl.store(dx_ptr + offset_of(start, stride_dx, ALIGN) + dx_offsets, dx, mask=mask)
    if part == 0:
        tl.store(dgamma_ptr + channels, dgamma, mask=leads)
        tl.store(dbeta_ptr + channels, dbeta, mask=leads)
