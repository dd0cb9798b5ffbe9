"""Batch norm's forward kernels; the mathematics is in batch_norm.py."""

import triton
import triton.language as tl

from fused.kernels.activation import activate
from fused.kernels.batch_norm_signs import store_signs
from fused.kernels.batch_norm_tile import (
    channels_in,
    columns_of,
    count_rows,
    finite,
    load_channel,
    mask_of,
    merged,
    moments,
    offset_of,
    offsets_in_tile,
    parts_of,
    pooled,
    pooled_moments,
    rows_of_parts,
    start_of,
)


@triton.jit(do_not_specialize=["N", "n_tiles", "tiles_per_program"])
def _batch_norm_moments_kernel(
    x_ptr,  # input, shape (N, C, L)
    partial_ptr,  # out, shape (programs, 3, C): rows, mean (relative to the first row), m2
    N,
    C,
    L,
    stride_x,  # of n, c and l
    n_tiles,
    tiles_per_program,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
    PACK: tl.constexpr,  # a tuning.Pack, or None; with one, C counts its columns
):
    """mean and sum of squared deviations of this program's rows"""
    acc: tl.constexpr = partial_ptr.dtype.element_ty
    cols, col_mask, channels, leaders, leads = columns_of(
        tl.program_id(0), C, PACK, ALIGN, BLOCK_L, BLOCK_C
    )
    begin = tl.program_id(1) * tiles_per_program
    end = tl.minimum(begin + tiles_per_program, n_tiles)
    first = tl.load(x_ptr + leaders.to(tl.int64) * stride_x[1], mask=col_mask, other=0.0)
    first = finite(first.to(acc))
    n, mean, m2 = moments(
        x_ptr,
        first,
        begin,
        end,
        cols,
        col_mask,
        N,
        L,
        stride_x,
        acc,
        ALIGN,
        STAGES,
        BLOCK_N,
        BLOCK_L,
        PACK,
    )
    C = channels_in(C, PACK)
    out = partial_ptr + tl.program_id(1).to(tl.int64) * 3 * C + channels
    tl.store(out, n, mask=leads)
    tl.store(out + C, mean, mask=leads)
    tl.store(out + 2 * C, m2, mask=leads)


@triton.jit
def _count_for_all(tracked_ptr):
    """how many batches there were, this one included, for each program of the first axis

    Which may have run before or after another has counted the batch. So none does, each adds its
    arrival to the upper 32 bits, and the last one takes them away and counts. They are whole
    numbers: in whatever order programs come, all read the same. (Two launches at once, on two
    streams, would spoil it, as they would the running statistics.)
    """
    ARRIVAL: tl.constexpr = 1 << 32
    seen = tl.atomic_add(tracked_ptr, ARRIVAL, sem="relaxed")
    programs = tl.num_programs(0)
    last = seen // ARRIVAL == programs - 1
    tl.atomic_add(tracked_ptr, 1 - programs.to(tl.int64) * ARRIVAL, mask=last, sem="relaxed")
    return seen % ARRIVAL + 1


@triton.jit
def _keep_statistics(
    running_mean_ptr, running_var_ptr, tracked_ptr, mean, unbiased, cols, col_mask, momentum,
    CUMULATIVE: tl.constexpr, SKIP_NONFINITE: tl.constexpr,
):  # fmt: skip
    """running += momentum * (batch - running), and the batch is counted"""
    acc: tl.constexpr = mean.dtype
    rate = tl.full((), momentum, acc)
    if tracked_ptr is not None:
        if CUMULATIVE:
            rate = 1.0 / _count_for_all(tracked_ptr).to(acc)
        elif tl.program_id(0) == 0:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    kept = col_mask
    # A difference with itself is 0, but NaN for inf and NaN; the mean is neither where var is not.
    if SKIP_NONFINITE:
        kept = col_mask & (unbiased - unbiased == 0.0)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + cols, mask=col_mask, other=0.0).to(acc)
        tl.store(running_mean_ptr + cols, (1.0 - rate) * old + rate * mean, mask=kept)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + cols, mask=col_mask, other=0.0).to(acc)
        tl.store(running_var_ptr + cols, (1.0 - rate) * old + rate * unbiased, mask=kept)


@triton.jit
def _argument(x, residual_ptr, centre, scale, shift, mask, acc: tl.constexpr):
    """z = scale * (x - centre) + shift + residual"""
    z = tl.fma(x.to(acc) - centre[None, :], scale[None, :], shift[None, :])
    if residual_ptr is not None:
        z += tl.load(residual_ptr, mask=mask, other=0.0).to(acc)
    return z


@triton.jit(do_not_specialize=["N", "n_tiles", "tiles_per_program", "n_partials"])
def _batch_norm_fwd_kernel(
    x_ptr,  # input, shape (N, C, L)
    gamma_ptr,  # shape (C,), or None for 1
    beta_ptr,  # shape (C,), or None for 0
    residual_ptr,  # shaped as x, or None for 0
    running_mean_ptr,  # shape (C,), updated in place, or None
    running_var_ptr,  # shape (C,), updated in place, or None
    tracked_ptr,  # how many batches there were, one int64, or None
    partial_ptr,  # from _batch_norm_moments_kernel where STATISTICS is "partial"
    y_ptr,  # out: shaped as x
    signs_ptr,  # out: of z, in bits, for relu's backward; None where it is not wanted
    mean_ptr,  # out: shape (C,); its dtype is the one computed in
    rstd_ptr,  # out: shape (C,)
    N,
    C,
    L,
    stride_x,  # of n, c and l; so are the other strides
    stride_r,
    stride_y,
    n_tiles,
    tiles_per_program,
    n_partials,
    momentum: tl.float64,
    eps: tl.constexpr,
    correction: tl.constexpr,
    STATISTICS: tl.constexpr,  # of this one "tile", of this "program", "partial" ones, or "running"
    CUMULATIVE: tl.constexpr,  # momentum is 1 / tracked, this batch included
    SKIP_NONFINITE: tl.constexpr,  # channels with an inf or NaN keep their running statistics
    ACTIVATION: tl.constexpr,
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
    """y = f(gamma * xhat + beta + residual); running += momentum * (batch - running)

    Tiles are written from the last to the first: what was read last is what L2 still has.
    """
    acc: tl.constexpr = mean_ptr.dtype.element_ty
    column = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    cols, col_mask, channels, leaders, leads = columns_of(column, C, PACK, ALIGN, BLOCK_L, BLOCK_C)
    begin = part * tiles_per_program
    end = tl.minimum(begin + tiles_per_program, n_tiles)
    if PACK is not None:  # all tensors lie alike
        stride_r, stride_y = stride_x, stride_x
    x_offsets = offsets_in_tile(cols, stride_x, ALIGN, BLOCK_N, BLOCK_L)
    y_offsets = offsets_in_tile(cols, stride_y, ALIGN, BLOCK_N, BLOCK_L)
    r_offsets = offsets_in_tile(cols, stride_r, ALIGN, BLOCK_N, BLOCK_L)

    n = count_rows(N, L, acc, PACK)
    if STATISTICS == "running":
        first = tl.load(running_mean_ptr + channels, mask=col_mask, other=0.0).to(acc)
        mean = tl.zeros((BLOCK_C,), acc)
        var = tl.load(running_var_ptr + channels, mask=col_mask, other=1.0).to(acc)
    else:
        first = tl.load(x_ptr + leaders.to(tl.int64) * stride_x[1], mask=col_mask, other=0.0)
        first = finite(first.to(acc))
        if STATISTICS == "tile":
            start = start_of(0, L, BLOCK_N, BLOCK_L)
            mask = mask_of(start, col_mask, N, L, ALIGN, BLOCK_N, BLOCK_L)
            x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)  # and here it stays
            d = tl.where(mask, x.to(acc) - first[None, :], 0.0)
            mean = pooled(tl.sum(d, axis=0), PACK) / n
            d = tl.where(mask, d - mean[None, :], 0.0)
            m2 = pooled(tl.sum(d * d, axis=0), PACK)
        elif STATISTICS == "program":
            _, mean, m2 = moments(
                x_ptr,
                first,
                begin,
                end,
                cols,
                col_mask,
                N,
                L,
                stride_x,
                acc,
                ALIGN,
                STAGES,
                BLOCK_N,
                BLOCK_L,
                PACK,
            )
        else:
            p, p_exists = parts_of(n_partials, BLOCK_P, BLOCK_C, PACK)
            n_channels = channels_in(C, PACK)
            rows = partial_ptr + p * 3 * n_channels
            parts = channels[:, None] + rows
            p_mask = col_mask[:, None] & p_exists
            if PACK is None:
                counts = tl.load(rows, mask=p_exists, other=0.0)
            else:  # each column has others
                share = tiles_per_program * BLOCK_N
                counts = rows_of_parts(p, n_partials, N, share, PACK).to(acc)
            means = tl.load(parts + n_channels, mask=p_mask, other=0.0)
            m2s = tl.load(parts + 2 * n_channels, mask=p_mask, other=0.0)
            k, mean, m2 = merged(counts, means, m2s, axis=1)
            _, mean, m2 = pooled_moments(k, mean, m2, PACK)
        var = m2 / (n - correction)
    rstd = 1.0 / tl.sqrt(var + eps)
    centre = first + mean

    if part == 0:
        tl.store(mean_ptr + channels, centre, mask=leads)
        tl.store(rstd_ptr + channels, rstd, mask=leads)
        if STATISTICS != "running":
            unbiased = m2 / (n - 1.0)  # whatever the correction: as torch.nn.BatchNorm keeps it
            _keep_statistics(
                running_mean_ptr, running_var_ptr, tracked_ptr, centre, unbiased, channels, leads,
                momentum, CUMULATIVE, SKIP_NONFINITE,
            )  # fmt: skip

    scale = rstd * load_channel(gamma_ptr, channels, col_mask, 1.0, acc)
    # What rounding took from the mean, which x - centre still has.
    lost = (first - centre) + mean
    shift = load_channel(beta_ptr, channels, col_mask, 0.0, acc) - lost * scale
    if STATISTICS == "tile":
        r_ptr = None if residual_ptr is None else residual_ptr + r_offsets
        z = _argument(x, r_ptr, centre, scale, shift, mask, acc)
        tl.store(y_ptr + y_offsets, activate(z, ACTIVATION), mask=mask)
        if signs_ptr is not None:
            store_signs(
                signs_ptr, z, start, column, N, C, L, GROUP, COLUMNS, BLOCK_N, BLOCK_L, BLOCK_C
            )  # fmt: skip
    else:
        for i in tl.range(begin, end, num_stages=STAGES):
            start = start_of(begin + end - 1 - i, L, BLOCK_N, BLOCK_L)
            mask = mask_of(start, col_mask, N, L, ALIGN, BLOCK_N, BLOCK_L)
            x = tl.load(x_ptr + offset_of(start, stride_x, ALIGN) + x_offsets, mask=mask, other=0.0)
            r_ptr = None
            if residual_ptr is not None:
                r_ptr = residual_ptr + offset_of(start, stride_r, ALIGN) + r_offsets
            z = _argument(x, r_ptr, centre, scale, shift, mask, acc)
            y = activate(z, ACTIVATION)
            tl.store(y_ptr + offset_of(start, stride_y, ALIGN) + y_offsets, y, mask=mask)
            if signs_ptr is not None:
                store_signs(
                    signs_ptr, z, start, column, N, C, L, GROUP, COLUMNS, BLOCK_N, BLOCK_L, BLOCK_C
                )  # fmt: skip
