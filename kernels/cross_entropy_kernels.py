"""The kernels of cross-entropy. Mathematics and launchers: cross_entropy.py."""

import triton
import triton.language as tl

from fused.kernels.cross_entropy_tile import (
    beside,
    edge_tile,
    main_offsets,
    main_tile,
    merge_lanes,
    put_dx,
    put_dx_y,
    read_and_put,
    row_offsets,
    row_parts,
    row_targets,
    spread,
    take,
)


@triton.jit
def _counted(
    first, last, target_ptr, weight_ptr, n_inner, n_classes, stride_t, ignore_index,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the mean divides by, of rows first to last: their number, or the sum of their w_y."""
    total = tl.zeros((BLOCK,), ACC)
    for start in range(first, last, BLOCK):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        offsets = row_offsets(rows, n_inner, stride_t)
        target = tl.load(target_ptr + offsets, mask=rows < last, other=0).to(tl.int64)
        mask = (rows < last) & (target != ignore_index)
        if weight_ptr is not None:
            mask = mask & (target >= 0) & (target < n_classes)
            total += tl.load(weight_ptr + target, mask=mask, other=0.0).to(ACC)
        else:
            total += mask.to(ACC)
    return tl.sum(total, axis=0)


@triton.jit
def summed(parts_ptr, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of n numbers, always in the same order."""
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, n, BLOCK):
        places = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + places, mask=places < n, other=0.0).to(ACC)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["n_rows", "n_counts", "ignore_index"])
def _cross_entropy_fwd_kernel(
    x_ptr,  # logits, shape (n_rows / n_inner, n_classes, n_inner)
    target_ptr,  # class indices (n_rows / n_inner, n_inner), or probabilities shaped as x
    weight_ptr,  # class weights, shape (n_classes,), or None for 1
    counts_ptr,  # what the mean divides by, in n_counts parts; None: each program counts for itself
    loss_ptr,  # out: loss of each row, shape (n_rows,), or None
    sum_ptr,  # out: each program's part of the sum or mean, shape (programs,), or None
    scale_ptr,  # out: what the mean multiplies a row by (1 for the sum), one number, or None
    stats_ptr,  # out: m, s and a of each row, and with best_ptr whether its prediction is correct;
    #             shape (3 or 4, n_rows), or None
    best_ptr,  # out: the class of each row's largest score, -1 of ignored rows; (n_rows,), or None
    dx_ptr,  # out: gradient of the logits, shaped as x, or None; may be x itself
    n_rows,
    n_counts,
    n_inner,
    n_classes,
    stride_x,  # of n, c and s; so are the other strides
    stride_t,
    stride_dx,
    ignore_index,
    shard,  # of a slice of the classes: its first one, and the number of all; None for all
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    SOFT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    EDGES: tl.constexpr,
    THREADS: tl.constexpr,
    PARTS: tl.constexpr,
    HELD: tl.constexpr,
    NUM_CTAS: tl.constexpr,
):
    """loss = sum_c b_c * (log s - (z_c - m)) + z_loss * lse^2,  dx_c = scale * (a * p_c - b_c)

    m and s with a running maximum. HELD: main is one tile, which stays in registers until its
    gradient is written; otherwise the gradient reads the row again, from L2 if it is still there.
    Of a shard, where s is that of its own classes, the loss goes without the log s.
    """
    cap, z_scale = tl.full((), softcap, ACC), tl.full((), logit_scale, ACC)
    smoothing = tl.full((), label_smoothing, ACC)
    n_all = n_classes
    if shard is not None:
        n_all = shard[1]
    dense: tl.constexpr = SOFT or SMOOTHED
    again: tl.constexpr = dx_ptr is not None and not HELD
    want_best: tl.constexpr = best_ptr is not None
    first_read: tl.constexpr = "evict_last" if again else ""
    # What y takes off is written over the tile, behind a barrier, or compared for in it: where the
    # blocks of a cluster share the row, as no barrier holds them; and of short rows, as it is less.
    at_y: tl.constexpr = not SOFT and HELD and (BLOCK_N > 1 or NUM_CTAS > 1)
    scale = tl.full((), 1.0, ACC)
    if MEAN:
        if SOFT and counts_ptr is None:
            scale = 1.0 / tl.cast(n_rows, ACC)
        else:
            if counts_ptr is not None:
                total = summed(counts_ptr, n_counts, ACC, BLOCK_COUNT)
            else:
                total = _counted(
                    0, n_rows, target_ptr, weight_ptr, n_inner, n_classes, stride_t, ignore_index,
                    ACC, BLOCK_COUNT,
                )  # fmt: skip
            # A mean over a total weight of 0 is NaN, also of losses that are not 0.
            scale = tl.where(total == 0.0, float("nan"), 1.0 / total)

    loss_sum = tl.zeros((BLOCK_N,), ACC)
    n_tiles = (n_rows - 1) // BLOCK_N + 1  # n_rows + BLOCK_N may be more than an int32 holds
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
        row_mask = rows < n_rows
        x_rows = row_offsets(rows, n_inner, stride_x)
        t_rows = row_offsets(rows, n_inner, stride_t)
        y, valid, inside, z_y, b_y = row_targets(
            x_ptr, x_rows, stride_x, target_ptr, t_rows, weight_ptr, row_mask, n_classes,
            ignore_index, shard, smoothing, z_scale, cap, ACC, SOFT, SCALED, CAPPED,
        )  # fmt: skip
        x_main, head, n_main = row_parts(x_rows, n_classes, VEC, EDGES)
        m = tl.full((BLOCK_N,), float("-inf"), ACC)
        s = tl.zeros((BLOCK_N,), ACC)
        b_sum = tl.zeros((BLOCK_N,), ACC)  # sum of b_c
        bz_sum = tl.zeros((BLOCK_N,), ACC)  # sum of b_c * (z_c - m)
        best = tl.zeros((BLOCK_N,), tl.int32)  # class of the largest logit
        z_best = tl.full((BLOCK_N,), float("-inf"), ACC)
        t_best = tl.zeros((BLOCK_N,), tl.int32)  # class of the largest probability
        t_max = tl.full((BLOCK_N,), float("-inf"), ACC)
        if EDGES:
            edge_classes, edge_mask = edge_tile(head, n_main, n_classes, VEC)
            edge_z, edge_b, m, s, b_sum, bz_sum, best, z_best, t_best, t_max = take(
                m, s, b_sum, bz_sum, best, z_best, t_best, t_max,
                x_ptr, x_rows[:, None] + edge_classes, target_ptr, t_rows, stride_t, weight_ptr,
                edge_classes, valid[:, None] & edge_mask, n_all, smoothing, z_scale, cap,
                ACC, SOFT, SMOOTHED, SCALED, CAPPED, want_best, 1, VEC, "",
            )  # fmt: skip
        if LANES > 1:
            m, s, b_sum, bz_sum = spread(m, s, b_sum, bz_sum, LANES)
        if HELD:
            classes, mask = main_tile(0, head, n_main, BLOCK_C, VEC, EDGES, THREADS, PARTS)
            x_offsets = main_offsets(x_main, 0, stride_x, BLOCK_C, THREADS, PARTS)
            z, b, m, s, b_sum, bz_sum, best, z_best, t_best, t_max = take(
                m, s, b_sum, bz_sum, best, z_best, t_best, t_max,
                x_ptr, x_offsets, target_ptr, t_rows, stride_t, weight_ptr, classes,
                beside(valid, mask) & mask, n_all, smoothing, z_scale, cap,
                ACC, SOFT, SMOOTHED, SCALED, CAPPED, want_best, LANES, VEC, "",
            )  # fmt: skip
        else:
            n_read = tl.max(valid.to(tl.int32), axis=0) * n_classes  # 0 where all are ignored
            for start in range(0, n_read, BLOCK_C):
                classes, mask = main_tile(start, head, n_main, BLOCK_C, VEC, EDGES, THREADS, PARTS)
                x_offsets = main_offsets(x_main, start, stride_x, BLOCK_C, THREADS, PARTS)
                z, b, m, s, b_sum, bz_sum, best, z_best, t_best, t_max = take(
                    m, s, b_sum, bz_sum, best, z_best, t_best, t_max,
                    x_ptr, x_offsets, target_ptr, t_rows, stride_t, weight_ptr, classes,
                    beside(valid, mask) & mask, n_all, smoothing, z_scale, cap,
                    ACC, SOFT, SMOOTHED, SCALED, CAPPED, want_best, LANES, VEC, first_read,
                )  # fmt: skip
        m, s, b_sum, bz_sum = merge_lanes(m, s, b_sum, bz_sum, LANES)
        if shard is None:
            log_s = tl.log(tl.where(valid, s, 1.0))
        else:
            log_s = tl.zeros((BLOCK_N,), ACC)

        loss = tl.zeros((BLOCK_N,), ACC)
        a = tl.zeros((BLOCK_N,), ACC)
        if dense:
            loss += b_sum * log_s - bz_sum
            a += b_sum
        if not SOFT:
            loss += b_y * (log_s - (z_y - m))
            a += b_y
        if Z_LOSS:
            coefficient = tl.full((), z_loss, ACC)
            lse = m + log_s
            loss += coefficient * lse * lse
            a += 2.0 * coefficient * lse
        loss = tl.where(valid, loss, 0.0)
        loss_sum += loss
        if loss_ptr is not None:
            tl.store(loss_ptr + rows, loss, mask=row_mask)
        if stats_ptr is not None:
            stats_rows = stats_ptr + rows
            tl.store(stats_rows, m, mask=row_mask)
            tl.store(stats_rows + n_rows, tl.where(valid, s, 1.0), mask=row_mask)
            tl.store(stats_rows + 2 * tl.cast(n_rows, tl.int64), a, mask=row_mask)
            if want_best:
                correct = valid & (best == (t_best if SOFT else y))
                stats_rows += 3 * tl.cast(n_rows, tl.int64)
                tl.store(stats_rows, correct.to(ACC), mask=row_mask)
                tl.store(best_ptr + rows, tl.where(valid, best, -1), mask=row_mask)

        if dx_ptr is not None:
            # In place, a warp that is ahead must not write what another has not read: its z_y.
            tl.debug_barrier()
            factor = tl.where(valid, tl.where(inside, scale, float("nan")), 0.0)
            p_factor = tl.where(valid, a * factor / s, 0.0)
            dx_rows = row_offsets(rows, n_inner, stride_dx)
            dx_main, _, _ = row_parts(dx_rows, n_classes, VEC, EDGES)
            if EDGES:
                put_dx(
                    dx_ptr, dx_rows[:, None] + edge_classes, edge_z, edge_b, edge_classes, y, b_y,
                    valid, row_mask[:, None] & edge_mask, m, p_factor, factor, z_scale, cap,
                    dense, at_y, SCALED, CAPPED, "",
                )  # fmt: skip
            if HELD:
                dx_offsets = main_offsets(dx_main, 0, stride_dx, BLOCK_C, THREADS, PARTS)
                put_dx(
                    dx_ptr, dx_offsets, z, b, classes, y, b_y, valid,
                    beside(row_mask, mask) & mask, m, p_factor, factor, z_scale, cap,
                    dense, at_y, SCALED, CAPPED, "",
                )  # fmt: skip
            else:
                for start in range(0, n_classes, BLOCK_C):
                    classes, mask = main_tile(
                        start, head, n_main, BLOCK_C, VEC, EDGES, THREADS, PARTS
                    )
                    x_offsets = main_offsets(x_main, start, stride_x, BLOCK_C, THREADS, PARTS)
                    dx_offsets = main_offsets(dx_main, start, stride_dx, BLOCK_C, THREADS, PARTS)
                    read_and_put(
                        dx_ptr, dx_offsets, None, t_rows, stride_t,
                        x_ptr, x_offsets, target_ptr, t_rows, stride_t, weight_ptr, classes,
                        mask, row_mask, n_all, valid, m, log_s, p_factor, factor, smoothing,
                        z_scale, cap, ACC, SOFT, SMOOTHED, SCALED, CAPPED, "evict_first",
                    )  # fmt: skip
            if not SOFT and not at_y:
                put_dx_y(
                    dx_ptr, dx_rows + y * stride_dx[1], z_y, b_y, weight_ptr, y, inside, n_all,
                    m, p_factor, factor, smoothing, z_scale, cap, ACC, SMOOTHED, SCALED, CAPPED,
                )  # fmt: skip
    if sum_ptr is not None:
        tl.store(sum_ptr + tl.program_id(0), tl.sum(loss_sum, axis=0) * scale)
    if scale_ptr is not None and tl.program_id(0) == 0:
        tl.store(scale_ptr, scale)


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def _cross_entropy_count_kernel(
    target_ptr,  # class indices (n_rows / n_inner, n_inner)
    weight_ptr,  # class weights, shape (n_classes,), or None for 1
    counts_ptr,  # out: what the mean divides by, each program's part
    n_rows,
    n_inner,
    n_classes,
    stride_t,
    ignore_index,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts = the sum of the w_y of the rows that are not ignored"""
    share = (n_rows - 1) // tl.num_programs(0) + 1
    first = tl.program_id(0).to(tl.int64) * share  # what is beyond the last row may be no int32
    counts = _counted(
        first, tl.minimum(first + share, n_rows), target_ptr, weight_ptr, n_inner, n_classes,
        stride_t, ignore_index, ACC, BLOCK,
    )  # fmt: skip
    tl.store(counts_ptr + tl.program_id(0), counts)


@triton.jit(do_not_specialize=["n"])
def _cross_entropy_sum_kernel(parts_ptr, out_ptr, n, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of n parts, added up by one program in a fixed order"""
    tl.store(out_ptr, summed(parts_ptr, n, ACC, BLOCK))


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def _cross_entropy_bwd_kernel(
    dloss_ptr,  # upstream gradient, shape (n_rows,), or one number with stride_dloss = 0
    x_ptr,  # logits, shape (n_rows / n_inner, n_classes, n_inner)
    target_ptr,  # class indices (n_rows / n_inner, n_inner), or probabilities shaped as x
    weight_ptr,  # class weights, shape (n_classes,), or None for 1
    stats_ptr,  # m, s and a of each row, shape (3 or 4, n_rows)
    scale_ptr,  # factor of every row, one number; None for 1
    dx_ptr,  # out: gradient of the logits, shaped as x; None where it is not wanted
    dt_ptr,  # out: gradient of the probabilities, shaped as x; None where it is not wanted
    n_rows,
    n_inner,
    n_classes,
    stride_dloss,
    stride_x,  # of n, c and s; so are the other strides
    stride_t,
    stride_dx,
    stride_dt,
    ignore_index,
    shard,  # of a slice of the classes: its first one, and the number of all; None for all
    label_smoothing: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    SOFT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
    EDGES: tl.constexpr,
    THREADS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """dx_c = dloss * (a * p_c - b_c) * dz/dx,  dt_c = dloss * (1 - e) * w_c * (lse - z_c)"""
    cap, z_scale = tl.full((), softcap, ACC), tl.full((), logit_scale, ACC)
    smoothing = tl.full((), label_smoothing, ACC)
    n_all = n_classes
    if shard is not None:
        n_all = shard[1]
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    row_mask = rows < n_rows
    x_rows = row_offsets(rows, n_inner, stride_x)
    t_rows = row_offsets(rows, n_inner, stride_t)
    dx_rows = row_offsets(rows, n_inner, stride_dx)
    dt_rows = row_offsets(rows, n_inner, stride_dt)
    y, valid, inside, z_y, b_y = row_targets(
        x_ptr, x_rows, stride_x, target_ptr, t_rows, weight_ptr, row_mask, n_classes,
        ignore_index, shard, smoothing, z_scale, cap, ACC, SOFT, SCALED, CAPPED,
    )  # fmt: skip
    tl.debug_barrier()  # in place, no warp may write before all have read their z_y
    stats_rows = stats_ptr + rows
    m = tl.load(stats_rows, mask=valid, other=0.0)
    s = tl.load(stats_rows + n_rows, mask=valid, other=1.0)
    a = tl.load(stats_rows + 2 * tl.cast(n_rows, tl.int64), mask=valid, other=0.0)
    factor = tl.load(dloss_ptr + rows * stride_dloss, mask=valid, other=0.0).to(ACC)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr)
    if shard is None:
        factor = tl.where(inside, factor, float("nan"))
    factor = tl.where(valid, factor, 0.0)
    p_factor, log_s = a * factor / s, tl.log(s)
    x_main, head, n_main = row_parts(x_rows, n_classes, VEC, EDGES)
    dx_main, _, _ = row_parts(dx_rows, n_classes, VEC, EDGES)
    for start in range(0, n_classes, BLOCK_C):
        classes, mask = main_tile(start, head, n_main, BLOCK_C, VEC, EDGES, THREADS, PARTS)
        x_offsets = main_offsets(x_main, start, stride_x, BLOCK_C, THREADS, PARTS)
        dx_offsets = main_offsets(dx_main, start, stride_dx, BLOCK_C, THREADS, PARTS)
        read_and_put(
            dx_ptr, dx_offsets, dt_ptr, dt_rows, stride_dt,
            x_ptr, x_offsets, target_ptr, t_rows, stride_t, weight_ptr, classes,
            mask, row_mask, n_all, valid, m, log_s, p_factor, factor, smoothing, z_scale, cap,
            ACC, SOFT, SMOOTHED, SCALED, CAPPED, "",
        )  # fmt: skip
    if EDGES:
        edge_classes, edge_mask = edge_tile(head, n_main, n_classes, VEC)
        read_and_put(
            dx_ptr, dx_rows[:, None] + edge_classes, dt_ptr, dt_rows, stride_dt,
            x_ptr, x_rows[:, None] + edge_classes, target_ptr, t_rows, stride_t,
            weight_ptr, edge_classes, edge_mask, row_mask, n_all, valid,
            m, log_s, p_factor, factor, smoothing, z_scale, cap,
            ACC, SOFT, SMOOTHED, SCALED, CAPPED, "",
        )  # fmt: skip
    if dx_ptr is not None and not SOFT:
        put_dx_y(
            dx_ptr, dx_rows + y * stride_dx[1], z_y, b_y, weight_ptr, y, inside, n_all,
            m, p_factor, factor, smoothing, z_scale, cap, ACC, SMOOTHED, SCALED, CAPPED,
        )  # fmt: skip


@triton.jit
def _cross_entropy_scale_kernel(
    dx_ptr,  # in and out: the gradient, n numbers
    dloss_ptr,  # upstream gradient, one number
    n,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = dloss * dx, of 0 always 0; nothing at all where dloss is 1"""
    dloss = tl.load(dloss_ptr).to(ACC)
    if dloss != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
            places = start + tl.arange(0, BLOCK)
            mask = places < n
            dx = tl.load(dx_ptr + places, mask=mask, other=0.0).to(ACC)
            tl.store(dx_ptr + places, tl.where(dx == 0.0, dx, dloss * dx), mask=mask)
