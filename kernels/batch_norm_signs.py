"""The signs of z, a bit an element: all of z that the backward pass of relu asks for.

A byte has the signs of GROUP neighbours in memory, 16 bytes of x (fewer where there are no more):
what a thread moves at once, so that it packs and unpacks them by itself. With COLUMNS the
neighbours are channels, and the bytes are (N, L, groups); otherwise positions, and (N, C, groups).
fused.kernels.batch_norm_layout has the same in PyTorch.
"""

import triton
import triton.language as tl


@triton.jit
def _offsets(
    start, column, N, C, L, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of a tile's bytes, and which of them exist: (rows, groups), or (groups, BLOCK_C)"""
    if COLUMNS:
        row = tl.arange(0, BLOCK_N * BLOCK_L)
        cols = column * (BLOCK_C // GROUP) + tl.arange(0, BLOCK_C // GROUP)
        groups = (C + GROUP - 1) // GROUP
        stride_n, stride_c, stride_l = tl.cast(L, tl.int64) * groups, 1, groups
        col_mask = cols < groups
    else:
        row = tl.arange(0, BLOCK_N * BLOCK_L // GROUP) * GROUP
        cols = column * BLOCK_C + tl.arange(0, BLOCK_C)
        groups = (L + GROUP - 1) // GROUP
        stride_n, stride_c, stride_l = tl.cast(C, tl.int64) * groups, groups, 1
        col_mask = cols < C
    n, l = row // BLOCK_L, row % BLOCK_L  # noqa: E741
    exists = (n < N - start[0]) & (l < L - start[1])
    first = start[0] * stride_n
    if COLUMNS:
        first += start[1] * stride_l
        l_offsets = l * stride_l
    else:
        first += start[1] // GROUP
        l_offsets = l // GROUP
    rows = n.to(tl.int64) * stride_n + l_offsets
    offsets = first + (rows[:, None] + (cols.to(tl.int64) * stride_c)[None, :])
    return offsets, exists[:, None] & col_mask[None, :]


@triton.jit
def store_signs(
    signs_ptr, z, start, column, N, C, L, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of z (BLOCK_N * BLOCK_L, BLOCK_C), the tile of block `column` at `start`"""
    rows: tl.constexpr = BLOCK_N * BLOCK_L
    bits = 1 << tl.arange(0, GROUP)
    # NaN counts as positive, as in torch's relu.
    if COLUMNS:
        z = tl.reshape(z, (rows, BLOCK_C // GROUP, GROUP))
        signs = tl.sum(tl.where(z <= 0.0, 0, bits[None, None, :]), axis=2)
    else:
        z = tl.reshape(z, (rows // GROUP, GROUP, BLOCK_C))
        signs = tl.sum(tl.where(z <= 0.0, 0, bits[None, :, None]), axis=1)
    offsets, exists = _offsets(
        start, column, N, C, L, GROUP, COLUMNS, BLOCK_N, BLOCK_L, BLOCK_C
    )  # fmt: skip
    tl.store(signs_ptr + offsets, signs.to(tl.uint8), mask=exists)


@triton.jit
def load_signs(
    signs_ptr, start, column, N, C, L, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Whether z is above 0: (BLOCK_N * BLOCK_L, BLOCK_C)"""
    offsets, exists = _offsets(
        start, column, N, C, L, GROUP, COLUMNS, BLOCK_N, BLOCK_L, BLOCK_C
    )  # fmt: skip
    signs = tl.load(signs_ptr + offsets, mask=exists, other=0).to(tl.int32)
    bits = 1 << tl.arange(0, GROUP)
    if COLUMNS:
        bits = signs[:, :, None] & bits[None, None, :]
    else:
        bits = signs[:, None, :] & bits[None, :, None]
    return tl.reshape(bits, (BLOCK_N * BLOCK_L, BLOCK_C)) != 0
