"""Device functions of cross-entropy: a tile of rows and classes, its statistics and its gradient.

Accesses are fastest where a thread takes 16 bytes, VEC elements, from an address that divides by
16. A row of 50257 classes seldom begins at one. Its classes are therefore taken in two parts:

    |head|  main: whole groups of VEC classes, aligned  |tail|          row parts, if EDGES
     0..VEC-1                                            0..VEC-1

Main tiles are masked by the group, so that every access of theirs is a full one; head and tail
together, fewer than 2 * VEC classes, make one small tile, the edges. Without EDGES all is main.

A tile is (BLOCK_N, BLOCK_C), or, with THREADS, (turns, PARTS, BLOCK_N, THREADS): its rows are in
the third dimension, a row's classes in the other three. The compiler lays the last ones side by
side; before Triton 3.7 it was the first ones, and the four are the other way round.

- Short rows that begin anywhere have THREADS threads side by side on a row, each of which adds up
  its own numbers first. Of two dimensions it would make a warp a row, a number a thread, and add
  them up in five exchanges.
- Rows that are neighbours in memory, of (N, C, S), have a thread each, and of many classes PARTS
  warps, each of which has every PARTS-th class. Of two dimensions it would make 8 rows a thread,
  each with all that belongs to a row, or, where they begin anywhere, read an element a sector.
"""

import triton
import triton.language as tl

from fused.kernels import tuning
from fused.kernels.activation import exp, plus, soft_cap

_REVERSED = tl.constexpr(not tuning.last_dimension_first())


@triton.jit
def safe_shift(m):
    # exp(-inf - -inf) is NaN where exp(-inf) = 0 is meant: a maximum of -inf shifts by 0 instead.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def row_offsets(rows, n_inner, stride):
    # Of neighbours in memory a thread would take several rows, and hold all that belongs to each.
    return tl.max_contiguous((rows // n_inner) * stride[0] + (rows % n_inner) * stride[2], 1)


@triton.jit
def along(values, DIMENSION: tl.constexpr):
    """values (n,) along one of the four dimensions of a tile."""
    place: tl.constexpr = 3 - DIMENSION if _REVERSED else DIMENSION
    if place == 0:
        return values[:, None, None, None]
    elif place == 1:
        return values[None, :, None, None]
    elif place == 2:
        return values[None, None, :, None]
    else:
        return values[None, None, None, :]


@triton.jit
def beside(rows, tile):
    """Numbers of rows (BLOCK_N,), as they are beside those of a tile."""
    if len(tile.shape) == 4:
        return along(rows, 2)
    else:
        return rows[:, None]


@triton.jit
def max_of_row(tile):
    if len(tile.shape) == 4:
        if _REVERSED:
            return tl.max(tl.max(tl.max(tile, axis=3), axis=2), axis=0)
        else:
            return tl.max(tl.max(tl.max(tile, axis=0), axis=0), axis=1)
    else:
        return tl.max(tile, axis=1)


@triton.jit
def min_of_row(tile):
    if len(tile.shape) == 4:
        if _REVERSED:
            return tl.min(tl.min(tl.min(tile, axis=3), axis=2), axis=0)
        else:
            return tl.min(tl.min(tl.min(tile, axis=0), axis=0), axis=1)
    else:
        return tl.min(tile, axis=1)


@triton.jit
def sum_of_row(tile):
    if len(tile.shape) == 4:
        if _REVERSED:
            return tl.sum(tl.sum(tl.sum(tile, axis=3), axis=2), axis=0)
        else:
            return tl.sum(tl.sum(tl.sum(tile, axis=0), axis=0), axis=1)
    else:
        return tl.sum(tile, axis=1)


@triton.jit
def row_parts(x_rows, n_classes, VEC: tl.constexpr, EDGES: tl.constexpr):
    """(offset where main begins, classes before it, classes in main), (BLOCK_N,) each."""
    main = (x_rows + (VEC - 1)) // VEC * VEC  # shows the compiler that VEC divides it
    if EDGES:
        head = (main - x_rows).to(tl.int32)
        n_main = tl.maximum(n_classes - head, 0) // VEC * VEC
    else:
        head = tl.zeros(x_rows.shape, tl.int32)
        n_main = head + n_classes
    return main, head, n_main


@triton.jit
def main_tile(
    start, head, n_main, BLOCK_C: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr,
    THREADS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Classes of a tile, and which there are: of one row, or of all in the tile."""
    if THREADS > 0:
        turns = start + tl.arange(0, BLOCK_C // (PARTS * THREADS)) * (PARTS * THREADS)
        parts, threads = tl.arange(0, PARTS) * THREADS, tl.arange(0, THREADS)
        places = along(turns, 0) + along(parts, 1) + along(threads, 3)
    else:
        places = start + tl.arange(0, BLOCK_C)[None, :]
    mask = places // VEC < beside(n_main // VEC, places)
    if EDGES:
        return places + beside(head, places), mask
    else:
        return places, mask


@triton.jit
def main_offsets(
    rows, start, stride, BLOCK_C: tl.constexpr, THREADS: tl.constexpr, PARTS: tl.constexpr
):
    """Offsets of the elements of `main_tile`, of rows that begin at `rows`."""
    if THREADS > 0:
        # Term by term, as the first is the same for all threads: one register for all of them.
        turns = start + tl.arange(0, BLOCK_C // (PARTS * THREADS)) * (PARTS * THREADS)
        parts, threads = tl.arange(0, PARTS) * THREADS, tl.arange(0, THREADS)
        own = along(rows, 2) + along(parts.to(tl.int64) * stride[1], 1)
        own += along(threads.to(tl.int64) * stride[1], 3)
        return own + along(turns.to(tl.int64) * stride[1], 0)
    else:
        places = start + tl.arange(0, BLOCK_C)[None, :]
        return rows[:, None] + places.to(tl.int64) * stride[1]


@triton.jit
def edge_tile(head, n_main, n_classes, VEC: tl.constexpr):
    """Classes of head and tail, and which of them there are, (BLOCK_N, 2 * VEC) both."""
    places = tl.arange(0, 2 * VEC)[None, :]
    classes = places + tl.where(places < head[:, None], 0, n_main[:, None])
    return classes, classes < n_classes


@triton.jit
def scores(x, mask, logit_scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """z, and -inf behind the mask: after the cap, which would turn it into -cap."""
    if SCALED:
        x = x * logit_scale
    if CAPPED:
        x = soft_cap(x, softcap)
    if SCALED or CAPPED:
        x = tl.where(mask, x, float("-inf"))
    return x


@triton.jit
def row_targets(
    x_ptr, x_rows, stride_x, target_ptr, t_rows, weight_ptr, row_mask, n_classes, ignore_index,
    shard, smoothing, logit_scale, softcap, ACC: tl.constexpr, SOFT: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Of class indices y, (BLOCK_N,) each: y; whether the row is not ignored; whether y is a class
    as well; the logit x_y as a score, NaN where it is none; (1 - e) * w_y.

    Of a shard, y counts from its first class, and of a y elsewhere score and weight are 0."""
    b_y = tl.zeros(x_rows.shape, ACC)
    if SOFT:
        return tl.zeros(x_rows.shape, tl.int64), row_mask, row_mask, b_y, b_y
    else:
        y = tl.load(target_ptr + t_rows, mask=row_mask, other=0).to(tl.int64)
        valid = row_mask & (y != ignore_index)
        if shard is not None:
            y -= shard[0]
        inside = valid & (y >= 0) & (y < n_classes)
        x_y = tl.load(x_ptr + x_rows + y * stride_x[1], mask=inside, other=float("nan"))
        z_y = scores(x_y.to(ACC), inside, logit_scale, softcap, SCALED, CAPPED)
        b_y += 1.0 - smoothing
        if weight_ptr is not None:
            b_y *= tl.load(weight_ptr + y, mask=inside, other=0.0).to(ACC)
        if shard is not None:
            return y, valid, inside, tl.where(inside, z_y, 0.0), tl.where(inside, b_y, 0.0)
        else:
            return y, valid, inside, tl.where(inside, z_y, float("nan")), b_y


@triton.jit
def weights(weight_ptr, classes, n_classes, tile):
    """Of the classes of a tile."""
    if len(tile.shape) == 4:
        # Each thread its own: of classes alone they would be side by side, and the tile turned.
        classes = tl.max_contiguous(tl.broadcast_to(classes, tile.shape), [1, 1, 1, 1])
    return tl.load(weight_ptr + classes, mask=classes < n_classes, other=0.0)


@triton.jit
def read(
    x_ptr, x_offsets, target_ptr, t_rows, stride_t, weight_ptr, classes, mask, n_classes,
    smoothing, logit_scale, softcap, ACC: tl.constexpr, SOFT: tl.constexpr, SMOOTHED: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """z, and b, the part of the target that may be anywhere in the row; tiles both."""
    x = tl.load(x_ptr + x_offsets, mask=mask, other=float("-inf"), eviction_policy=POLICY)
    z = scores(x.to(ACC), mask, logit_scale, softcap, SCALED, CAPPED)
    if SOFT or SMOOTHED:
        b = tl.zeros(z.shape, ACC)
        if SOFT:
            t_offsets = beside(t_rows, classes) + classes.to(tl.int64) * stride_t[1]
            t = tl.load(target_ptr + t_offsets, mask=mask, other=0.0)
            b += (1.0 - smoothing) * t.to(ACC)
        if SMOOTHED:
            b += smoothing / n_classes
        if weight_ptr is not None:
            b *= weights(weight_ptr, classes, n_classes, z).to(ACC)
        return z, tl.where(mask, b, 0.0)
    else:
        return z, z


@triton.jit
def largest(values, classes, best, best_value):
    """The class of the largest value so far, the first of several, and that value; (BLOCK_N,)."""
    tile_max = max_of_row(values)
    first = min_of_row(tl.where(values == beside(tile_max, values), classes, 2147483647))
    better = (tile_max > best_value) | ((tile_max == best_value) & (first < best))
    return tl.where(better, first, best), tl.where(better, tile_max, best_value)


@triton.jit
def accumulate(
    m, s, b_sum, bz_sum, z, b, mask,
    LANES: tl.constexpr, VEC: tl.constexpr, DENSE: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    """Takes a tile into the running maximum m, s = sum exp(z - m), sum b and sum b * (z - m).

    They are kept for each row (BLOCK_N,), or (BLOCK_N, LANES): with a lane for each thread, whose
    classes are groups of VEC neighbours, warps do not meet before the row ends.
    """
    if LANES == 1:
        m_new = tl.maximum(m, max_of_row(z))
        shift = safe_shift(m_new)
        from_shift = z - beside(shift, z)
        s = tl.fma(s, exp(m - shift), sum_of_row(exp(from_shift)))
    else:
        by_lane: tl.constexpr = (z.shape[0], z.shape[1] // (LANES * VEC), LANES, VEC)
        z = tl.reshape(z, by_lane)
        m_new = tl.maximum(m, tl.max(tl.max(z, axis=3), axis=1))
        shift = safe_shift(m_new)
        from_shift = z - shift[:, None, :, None]
        s = tl.fma(s, exp(m - shift), tl.sum(tl.sum(exp(from_shift), axis=3), axis=1))
    if DENSE:
        bz_sum = tl.fma(b_sum, safe_shift(m) - shift, bz_sum)
        if LANES == 1:
            bz_sum += sum_of_row(tl.where(mask, b * from_shift, 0.0))
            b_sum += sum_of_row(b)
        else:
            b = tl.reshape(b, by_lane)
            if CONSTANT:
                # Of constants alone the compiler would spread b over the threads in another way
                # than z, and exchange it between them; what it is beside a NaN does not matter.
                b = tl.where(z == z, b, float("nan"))
            bz = tl.where(tl.reshape(mask, by_lane), b * from_shift, 0.0)
            bz_sum += tl.sum(tl.sum(bz, axis=3), axis=1)
            b_sum += tl.sum(tl.sum(b, axis=3), axis=1)
    return m_new, s, b_sum, bz_sum


@triton.jit
def spread(m, s, b_sum, bz_sum, LANES: tl.constexpr):
    """The statistics of rows (BLOCK_N,) as those of their lanes (BLOCK_N, LANES), all in lane 0."""
    first = tl.arange(0, LANES)[None, :] == 0
    m = tl.where(first, m[:, None], float("-inf"))
    s = tl.where(first, s[:, None], 0.0)
    return m, s, tl.where(first, b_sum[:, None], 0.0), tl.where(first, bz_sum[:, None], 0.0)


@triton.jit
def take(
    m, s, b_sum, bz_sum, best, z_best, t_best, t_max,
    x_ptr, x_offsets, target_ptr, t_rows, stride_t, weight_ptr, classes, mask, n_classes,
    smoothing, logit_scale, softcap, ACC: tl.constexpr, SOFT: tl.constexpr, SMOOTHED: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, BEST: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Reads a tile and takes it into the statistics; (z, b) of the tile, and the statistics."""
    z, b = read(
        x_ptr, x_offsets, target_ptr, t_rows, stride_t, weight_ptr, classes, mask, n_classes,
        smoothing, logit_scale, softcap, ACC, SOFT, SMOOTHED, SCALED, CAPPED, POLICY,
    )  # fmt: skip
    m, s, b_sum, bz_sum = accumulate(
        m, s, b_sum, bz_sum, z, b, mask, LANES, VEC,
        SOFT or SMOOTHED, not SOFT and weight_ptr is None,
    )  # fmt: skip
    if BEST:
        best, z_best = largest(z, classes, best, z_best)
        if SOFT:
            t_offsets = beside(t_rows, classes) + classes.to(tl.int64) * stride_t[1]
            t = tl.load(target_ptr + t_offsets, mask=mask, other=float("-inf")).to(ACC)
            t_best, t_max = largest(t, classes, t_best, t_max)
    return z, b, m, s, b_sum, bz_sum, best, z_best, t_best, t_max


@triton.jit
def merge_lanes(m, s, b_sum, bz_sum, LANES: tl.constexpr):
    """The statistics of each row, relative to a maximum that is finite unless it is +inf."""
    if LANES > 1:
        shift = safe_shift(tl.max(m, axis=1))
        s = tl.sum(s * exp(m - shift[:, None]), axis=1)
        bz_sum = tl.sum(bz_sum + b_sum * (safe_shift(m) - shift[:, None]), axis=1)
        return shift, s, tl.sum(b_sum, axis=1), bz_sum
    else:
        return safe_shift(m), s, b_sum, bz_sum


@triton.jit
def gradient(
    z, taken, m, p_factor, logit_scale, softcap,
    TAKES: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """dx_c = ((a * p_c - b_c) * factor) * dz/dx; p_c = exp(z_c - m) / s, p_factor = a * factor / s,
    taken = b_c * factor"""
    p = exp(z - m)
    if TAKES:
        dx = tl.fma(p, p_factor, -taken)
    else:
        dx = p * p_factor
    if SCALED:
        dx = dx * logit_scale
    if CAPPED:
        t = z * (1.0 / softcap)
        dx = dx * plus(-t, t, 1.0)
    return dx


@triton.jit
def narrowed(values, ptr):
    """values on the way to ptr: float64 to bfloat16 by float32, which the interpreter needs"""
    if ptr.dtype.element_ty == tl.bfloat16:
        values = values.to(tl.float32)
    return values


@triton.jit
def put_dx(
    dx_ptr, offsets, z, b, classes, y, b_y, valid, mask, m, p_factor, factor, logit_scale, softcap,
    DENSE: tl.constexpr, INDEXED: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    POLICY: tl.constexpr,
):  # fmt: skip
    """Writes the dx of a tile, 0 where a row is ignored; what a class index y takes off, which is
    b_y, only if it is INDEXED."""
    taken = z
    if INDEXED:
        at_y = classes == beside(y.to(tl.int32), z)
        if DENSE:
            taken = (b + tl.where(at_y, beside(b_y, z), 0.0)) * beside(factor, z)
        else:
            taken = tl.where(at_y, beside(b_y * factor, z), 0.0)
    elif DENSE:
        taken = b * beside(factor, z)
    dx = gradient(
        z, taken, beside(m, z), beside(p_factor, z), logit_scale, softcap,
        DENSE or INDEXED, SCALED, CAPPED,
    )  # fmt: skip
    if CAPPED:  # where p_factor is 0 and z -inf
        dx = tl.where(beside(valid, z), dx, 0.0)
    tl.store(dx_ptr + offsets, narrowed(dx, dx_ptr), mask=mask, eviction_policy=POLICY)


@triton.jit
def put_dx_y(
    dx_ptr, offsets, z_y, b_y, weight_ptr, y, inside, n_classes, m, p_factor, factor, smoothing,
    logit_scale, softcap, ACC: tl.constexpr, SMOOTHED: tl.constexpr, SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Writes the dx of the classes that the indices name, over what their tiles wrote there.

    One element a row, instead of a comparison in every element. b is taken off before the rounding
    to a half-precision dx: for a confident prediction p rounds to 1 and all of it would be lost.
    """
    if SMOOTHED:
        share = tl.zeros(b_y.shape, ACC) + smoothing / n_classes
        if weight_ptr is not None:
            share *= tl.load(weight_ptr + y, mask=inside, other=0.0).to(ACC)
        b_y += share
    dx = gradient(
        z_y, b_y * factor, m, p_factor, logit_scale, softcap, True, SCALED, CAPPED
    )  # fmt: skip
    tl.debug_barrier()  # until every warp has written its part of the tiles
    tl.store(dx_ptr + offsets, narrowed(dx, dx_ptr), mask=inside)


@triton.jit
def read_and_put(
    dx_ptr, dx_offsets, dt_ptr, dt_rows, stride_dt,
    x_ptr, x_offsets, target_ptr, t_rows, stride_t, weight_ptr, classes, mask, row_mask, n_classes,
    valid, m, log_s, p_factor, factor, smoothing, logit_scale, softcap,
    ACC: tl.constexpr, SOFT: tl.constexpr, SMOOTHED: tl.constexpr, SCALED: tl.constexpr,
    CAPPED: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Reads a tile and writes its dx, and dt_c = factor * (1 - e) * w_c * (lse - z_c)"""
    z, b = read(
        x_ptr, x_offsets, target_ptr, t_rows, stride_t, weight_ptr, classes,
        beside(valid, mask) & mask, n_classes, smoothing, logit_scale, softcap,
        ACC, SOFT, SMOOTHED, SCALED, CAPPED, POLICY,
    )  # fmt: skip
    mask = beside(row_mask, mask) & mask
    if dx_ptr is not None:
        put_dx(
            dx_ptr, dx_offsets, z, b, classes, None, None, valid, mask, m, p_factor, factor,
            logit_scale, softcap, SOFT or SMOOTHED, False, SCALED, CAPPED, POLICY,
        )  # fmt: skip
    if dt_ptr is not None:
        dt = (smoothing - 1.0) * beside(factor, z) * (z - beside(m, z) - beside(log_s, z))
        if weight_ptr is not None:
            dt *= weights(weight_ptr, classes, n_classes, z).to(ACC)
        dt_offsets = beside(dt_rows, z) + classes.to(tl.int64) * stride_dt[1]
        tl.store(dt_ptr + dt_offsets, narrowed(dt, dt_ptr), mask=mask)
