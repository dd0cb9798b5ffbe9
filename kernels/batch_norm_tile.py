"""What batch norm's kernels share: tiles of rows and channels, moments and how they merge.

x is (N, C, L) with any strides, a row being one (n, l). A tile is BLOCK_N * BLOCK_L rows of BLOCK_C
channels; tiles are numbered, positions first. No index of an element is ever divided by L: only the
number of a tile is, and not where L is 1.

Where accesses of 16 bytes need it, a row is seen as several rows or positions side by side, so that
a channel has several columns: PACK, of tuning.Pack.
"""

import triton
import triton.language as tl


@triton.jit
def _tiles_across(L, BLOCK_L: tl.constexpr):
    return (L - 1) // BLOCK_L + 1  # L + BLOCK_L may be more than an int32 holds


@triton.jit
def start_of(tile, L, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr):
    """(n, l) of the tile's first row"""
    if BLOCK_L == 1:  # then L is 1
        return tl.cast(tile, tl.int64) * BLOCK_N, tl.cast(0, tl.int64)
    else:
        across = _tiles_across(L, BLOCK_L)
        n = tl.cast(tile // across, tl.int64) * BLOCK_N
        return n, tl.cast(tile % across, tl.int64) * BLOCK_L


@triton.jit
def multiple(size, ALIGN: tl.constexpr):
    """size, which ALIGN divides; the compiler, told so, makes wider accesses of it"""
    return size // ALIGN * ALIGN


@triton.jit
def offsets_in_tile(
    cols, stride, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr
):
    """Of a tile's elements relative to its first row, shape (BLOCK_N * BLOCK_L, BLOCK_C)

    ALIGN divides every stride but that of neighbours in memory: the channels' where L is 1.
    """
    row = tl.arange(0, BLOCK_N * BLOCK_L)
    n, l = (row // BLOCK_L).to(tl.int64), (row % BLOCK_L).to(tl.int64)  # noqa: E741
    rows = n * multiple(stride[0], ALIGN) + l * stride[2]
    stride_c = stride[1] if BLOCK_L == 1 else multiple(stride[1], ALIGN)
    return rows[:, None] + (cols.to(tl.int64) * stride_c)[None, :]


@triton.jit
def offset_of(start, stride, ALIGN: tl.constexpr):
    """Of a tile's first row"""
    return start[0] * multiple(stride[0], ALIGN) + start[1] * stride[2]


@triton.jit
def mask_of(
    start, col_mask, N, L, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr
):
    """Which of a tile's elements exist, shape (BLOCK_N * BLOCK_L, BLOCK_C)"""
    row = tl.arange(0, BLOCK_N * BLOCK_L)
    exists = row // BLOCK_L < N - start[0]
    if BLOCK_L > 1:
        exists = exists & (row % BLOCK_L < multiple(L, ALIGN) - start[1])
    return exists[:, None] & col_mask[None, :]


@triton.jit
def tiles_with_row(tile, N, L, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr):
    """How many of the tiles before `tile` have their i-th row, shape (BLOCK_N * BLOCK_L,)"""
    row = tl.arange(0, BLOCK_N * BLOCK_L)
    down = N // BLOCK_N + tl.where(row // BLOCK_L < N % BLOCK_N, 1, 0)
    if BLOCK_L == 1:
        return tl.minimum(down, tile)
    else:
        across = L // BLOCK_L + tl.where(row % BLOCK_L < L % BLOCK_L, 1, 0)
        n, l = tile // _tiles_across(L, BLOCK_L), tile % _tiles_across(L, BLOCK_L)  # noqa: E741
        return tl.minimum(down, n) * across + tl.where(n < down, tl.minimum(across, l), 0)


@triton.jit
def place_in(w, PACK: tl.constexpr):
    """Of the columns w of a block: (which of its channels it belongs to, which of those it is)"""
    return w // PACK[2] % PACK[0], w // PACK[3] % PACK[1]


@triton.jit
def columns_of(
    column, C, PACK: tl.constexpr, ALIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Of a block's columns: (themselves, which exist, their channels, the first column of each of
    these, which columns are that)"""
    w = tl.arange(0, BLOCK_C)
    if PACK is None:
        cols = column * BLOCK_C + w  # (BLOCK_C,)
        mask = cols < (multiple(C, ALIGN) if BLOCK_L == 1 else C)
        return cols, mask, cols, cols, mask
    else:
        WIDTH: tl.constexpr = PACK[0] * PACK[1]
        cols = column * WIDTH + w
        mask = (w < WIDTH) & (cols < multiple(C, ALIGN))
        channel, member = place_in(w, PACK)
        return (
            cols,
            mask,
            column * PACK[0] + channel,
            column * WIDTH + channel * PACK[2],
            mask & (member == 0),
        )


@triton.jit
def channels_in(C, PACK: tl.constexpr):
    """How many channels C columns are"""
    if PACK is None:
        return C
    else:
        return C // PACK[1]


@triton.jit
def pooled(v, PACK: tl.constexpr):
    """Of each column of a block the sum of v (BLOCK_C,) over its channel's columns"""
    if PACK is None:
        return v
    else:
        BLOCK_K: tl.constexpr = triton.next_power_of_2(PACK[0])
        BLOCK_G: tl.constexpr = triton.next_power_of_2(PACK[1])
        channel, member = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_G)[None, :]
        exists = (channel < PACK[0]) & (member < PACK[1])
        columns = tl.where(exists, channel * PACK[2] + member * PACK[3], 0)
        parts = tl.gather(v, tl.reshape(columns, (BLOCK_K * BLOCK_G,)), 0)
        parts = tl.where(exists, tl.reshape(parts, (BLOCK_K, BLOCK_G)), 0.0)
        channel, _ = place_in(tl.arange(0, v.shape[0]), PACK)
        return tl.gather(tl.sum(parts, axis=1), channel, 0)


@triton.jit
def pooled_moments(n, mean, m2, PACK: tl.constexpr):
    """`merged`, of each channel's columns; n may be 0"""
    if PACK is None:
        return n, mean, m2
    else:
        exists = n > 0.0
        total = pooled(n, PACK)
        common = pooled(tl.where(exists, n * mean, 0.0), PACK) / total
        d = mean - common
        return total, common, pooled(tl.where(exists, m2 + n * d * d, 0.0), PACK)


@triton.jit
def parts_of(n_partials, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PACK: tl.constexpr):
    """Which partial results each column merges, and which of these there are: (1, BLOCK_P), or of
    each of a channel's columns its share, (BLOCK_C, BLOCK_P)"""
    p = tl.arange(0, BLOCK_P)[None, :]
    if PACK is None:
        return p.to(tl.int64), p < n_partials
    else:
        _, member = place_in(tl.arange(0, BLOCK_C), PACK)
        p = p * PACK[1] + member[:, None]  # of few results an int32 holds the offsets
        return p, p < n_partials


@triton.jit
def rows_of_parts(p, n_partials, N, share, PACK: tl.constexpr):
    """How many rows of a channel the p-th program has had: `share` packed ones, and the last one
    what was left of N"""
    last = N - (n_partials - 1) * share
    return tl.where(p < n_partials - 1, share, tl.where(p < n_partials, last, 0)) * PACK[1]


@triton.jit
def load_channel(ptr, cols, mask, default: tl.constexpr, acc: tl.constexpr):
    """A per-channel vector, or `default` where there is none"""
    if ptr is None:
        return tl.full(cols.shape, default, acc)
    else:
        return tl.load(ptr + cols, mask=mask, other=default).to(acc)


@triton.jit
def count_rows(N, L, acc: tl.constexpr, PACK: tl.constexpr):
    """N * L, and what is packed"""
    rows = tl.cast(N, tl.int64) * L
    if PACK is not None:
        rows *= PACK[1]
    return tl.cast(rows, acc)


@triton.jit
def finite(x):
    """x, or 0 for inf and NaN: what is relative to an inf would be NaN, where the mean is inf"""
    return tl.where(x - x == 0.0, x, 0.0)


@triton.jit
def moments(
    x_ptr, first, begin, end, cols, col_mask, N, L, stride,
    acc: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Row count, mean (relative to `first`) and sum of squared deviations of tiles [begin, end)

    Each place of the tile sums d = x - x0 and d^2 by itself, x0 being the first x it met: no
    exchange between threads before the end. Of k values, x0 among them, sum d^2 is at most k + 1
    times the sum of squared deviations (docs/derivations.md), so what sum d^2 - (sum d)^2 / k
    cancels is bounded whatever the data; with x0 = 0, E[x^2] - E[x]^2, it is not. The places are
    then merged around their common mean.
    """
    offsets = offsets_in_tile(cols, stride, ALIGN, BLOCK_N, BLOCK_L)
    start = start_of(begin, L, BLOCK_N, BLOCK_L)
    mask = mask_of(start, col_mask, N, L, ALIGN, BLOCK_N, BLOCK_L)
    x = tl.load(x_ptr + offset_of(start, stride, ALIGN) + offsets, mask=mask, other=0.0).to(acc)
    x = tl.where(mask, x, first[None, :])  # a place whose rows begin in a later tile
    x0 = finite(x)
    s = x - x0
    q = s * s
    for tile in tl.range(begin + 1, end, num_stages=STAGES):
        start = start_of(tile, L, BLOCK_N, BLOCK_L)
        mask = mask_of(start, col_mask, N, L, ALIGN, BLOCK_N, BLOCK_L)
        x = tl.load(x_ptr + offset_of(start, stride, ALIGN) + offsets, mask=mask, other=0.0).to(acc)
        d = tl.where(mask, x - x0, 0.0)
        s += d
        q = tl.fma(d, d, q)
    k = tiles_with_row(end, N, L, BLOCK_N, BLOCK_L) - tiles_with_row(begin, N, L, BLOCK_N, BLOCK_L)
    k = tl.cast(k, acc)  # (BLOCK_N * BLOCK_L,)
    share = s / tl.maximum(k, 1.0)[:, None]
    m2 = tl.fma(-s, share, q)
    m2 = tl.where(m2 < 0.0, 0.0, m2)
    m2 = tl.where((q == float("inf")) & (s - s == 0.0), float("inf"), m2)  # overflow is not NaN
    m2 = tl.where(col_mask[None, :], m2, 0.0)
    n, mean, m2 = merged(k[:, None], (x0 - first[None, :]) + share, m2, axis=0)
    n = tl.full(mean.shape, 0.0, acc) + n
    return pooled_moments(n, mean, m2, PACK)


@triton.jit
def merged(counts, means, m2s, axis: tl.constexpr):
    """Row count, means and sums of squared deviations of groups of rows taken together: (BLOCK_C,)

    The groups are along `axis` of means and m2s; counts has 1 where they have channels, and may be
    0. Chan, Golub and LeVeque (1979).
    """
    n = tl.sum(counts, axis=axis)
    exists = counts > 0.0
    mean = tl.sum(tl.where(exists, counts * means, 0.0), axis=axis) / tl.maximum(n, 1.0)
    d = tl.where(exists, means - tl.expand_dims(mean, axis), 0.0)
    m2s = tl.where(exists, m2s, 0.0) + counts * d * d
    return n, mean, tl.sum(m2s, axis=axis)
