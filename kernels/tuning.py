"""Block sizes and warps of every kernel: the only place that makes them of a shape and a dtype."""

from dataclasses import dataclass

import torch


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class Tile:
    """BLOCK_N rows and BLOCK_C columns (classes or channels), worked on by num_warps warps."""

    BLOCK_N: int
    BLOCK_C: int
    num_warps: int

    def rows_grid(self, n_rows: int) -> tuple[int]:
        """One program per BLOCK_N rows."""
        return ((n_rows + self.BLOCK_N - 1) // self.BLOCK_N,)

    def columns_grid(self, n_columns: int) -> tuple[int]:
        """One program per BLOCK_C columns."""
        return ((n_columns + self.BLOCK_C - 1) // self.BLOCK_C,)


def cross_entropy(
    n_rows: int, n_classes: int, dtype: torch.dtype, stride_c: int, n_inner: int
) -> Tile:
    """A program owns BLOCK_N whole rows and walks over their classes, BLOCK_C at a time."""
    if stride_c != 1 and n_inner > 1:
        # (N, C, S): neighbours in memory are rows. 128 bytes of them are one full access of a warp.
        block_n = min(128 // dtype.itemsize, next_power_of_2(n_rows))
        block_c = min(next_power_of_2(n_classes), 2048 // block_n)
    else:
        # 8 warps x 32 lanes x 16 bytes is one 4 KB access; 4 of them hide the latency.
        block_c = min(next_power_of_2(n_classes), 16384 // dtype.itemsize)
        # Few classes: several rows a program, so that its warps have 1,024 elements to share.
        block_n = min(max(1, 1024 // block_c), next_power_of_2(n_rows))
    return Tile(block_n, block_c, num_warps=4 if block_n * block_c <= 2048 else 8)


@dataclass(frozen=True)
class BatchNormPlan:
    """Tiles of BLOCK_N * BLOCK_L rows (n, l) and BLOCK_C channels, and who walks over them.

    The rows of a block of channels are n_tiles tiles, which n_programs share.
    """

    BLOCK_N: int
    BLOCK_L: int
    BLOCK_C: int
    num_warps: int
    n_tiles: int
    n_programs: int
    tiles_per_program: int

    @property
    def reduction(self) -> str:
        """Over what a program reduces: one "tile" that stays on chip, all tiles of its channels
        ("program"), or its share of them ("partial")."""
        return "tile" if self.n_tiles == 1 else "program" if self.n_programs == 1 else "partial"

    def stages(self, *tensors: torch.Tensor | None) -> int:
        """Of the loop over tiles of `tensors`: 48 KB under way hide the latency of memory, even
        where this is a multiprocessor's only program, and fit into any shared memory."""
        if self.n_tiles == 1:
            return 1
        values = self.BLOCK_N * self.BLOCK_L * self.BLOCK_C
        size = sum(values * t.element_size() for t in tensors if t is not None)
        return min(8, 1 + max(1, 49152 // size))

    def grid(self, n_channels: int) -> tuple[int, int]:
        """Programs over channels and over rows."""
        return (_ceil_div(n_channels, self.BLOCK_C), self.n_programs)


def _ceil_div(n: int, d: int) -> int:
    return (n + d - 1) // d


# An H100 has 132 multiprocessors, each with 65,536 registers and 256 KB of L1. Elsewhere these only
# decide which of two right plans is taken.
_MULTIPROCESSORS = 132
# Float32 values that 8 warps hold of a tile and still compute with: 32 a thread, twice that in the
# forward pass, which holds one tensor where the backward pass holds two.
_ON_CHIP_VALUES = 8192
# Values of a tile where a program walks over several: 16 a thread of 8 warps.
_TILE_VALUES = 4096
# Bytes that a program reads twice from L1, or at least from L2, its neighbours' beside its own.
_CACHED_BYTES = 131072
# Programs that are enough to read at full speed: about half of the multiprocessors.
_ENOUGH_PROGRAMS = 64


def batch_norm(
    n: int, c: int, length: int, columns: bool, align: int, dtype: torch.dtype, tensors: int
) -> BatchNormPlan:
    """For x (n, c, length), its channels adjacent in memory (`columns`) or else its positions, runs
    of which begin at multiples of `align` elements.

    `tensors` are held at once to reduce over a channel: 1 forward, 2 backward, 0 where nothing is
    reduced.
    """
    rows, itemsize = n * length, dtype.itemsize
    # A channel's rows on chip, in one tile: every value is read once.
    capacity = _ON_CHIP_VALUES * 2 // max(1, tensors) * 4 // max(4, itemsize)
    block_n, block_l = next_power_of_2(n), next_power_of_2(length)
    sector = 32 // itemsize  # channels in 32 bytes, the least that memory is read by
    least = min(sector, next_power_of_2(c)) if columns else 1
    if tensors and block_n * block_l * least <= capacity:
        # 16 bytes or more for every thread of 4 warps; and twice the sector, where that leaves a
        # program for every multiprocessor. More than 8 values a thread of 4 warps spilled on sm_100
        # where accesses are narrow.
        block_c, tile = least, block_n * block_l
        while block_c < next_power_of_2(c) and 2 * block_c * tile <= capacity:
            wider = columns and block_c < 2 * sector and c >= 2 * block_c * _MULTIPROCESSORS
            if 2 * block_c * tile > 1024 and not wider:
                break
            block_c *= 2
        values = block_n * block_l * block_c
        return BatchNormPlan(block_n, block_l, block_c, 4 if values <= 1024 else 8, 1, 1, 1)
    # Narrow accesses need an address each, and 16 of those did not fit into sm_100's registers.
    values = _TILE_VALUES if align * itemsize >= 16 else _TILE_VALUES // 2
    # One program a block of channels, of a sector or one, and one launch.
    whole = (
        tensors > 0
        and rows * itemsize * least <= _CACHED_BYTES
        and _ceil_div(c, least) >= _ENOUGH_PROGRAMS
    )
    if columns:
        # 128 bytes a row or more; of 64 channels half, for the fewer results to merge in a program.
        block_c = least if whole else min(64 if c > 64 else 32, next_power_of_2(c), values)
        block_l = min(values // block_c, block_l)
    else:
        block_c = 1
        block_l = min(values, block_l)
        # Less than an eighth of the positions beyond the end, or runs of 64.
        while block_l > 64 and (-length) % block_l * 8 > length:
            block_l //= 2
    block_n = min(max(1, values // (block_c * block_l)), next_power_of_2(n))
    tiles = _ceil_div(n, block_n) * _ceil_div(length, block_l)
    n_programs = 1
    if not whole:
        # No more than two programs for each multiprocessor, which are resident at once; each of the
        # second launch merges what the first's found, two tiles at most.
        wanted = 2 * _MULTIPROCESSORS // _ceil_div(c, block_c)
        n_programs = max(1, min(tiles, wanted, 2 * _TILE_VALUES // block_c))
    tiles_per_program = max(1, _ceil_div(tiles, n_programs))
    n_programs = max(1, _ceil_div(tiles, tiles_per_program))
    return BatchNormPlan(
        block_n, block_l, block_c, 16 if whole else 8, tiles, n_programs, tiles_per_program
    )


def scan(n: int) -> int:
    """Block of a one-program pass over `n` numbers."""
    return min(next_power_of_2(n), 1024)
