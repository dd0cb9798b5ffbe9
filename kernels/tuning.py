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
    """A tile of rows and channels, and how many of the rows each program walks over."""

    tile: Tile
    rows_per_program: int
    n_programs: int  # that share a channel

    def grid(self, n_channels: int) -> tuple[int, int]:
        """Programs over rows and over channels."""
        return (self.n_programs, *self.tile.columns_grid(n_channels))


def batch_norm(
    n_rows: int,
    n_channels: int,
    n_inner: int,
    stride_c: int,
    dtype: torch.dtype,
    share_channels: bool = False,
) -> BatchNormPlan:
    """One program a column tile, or several where there would be too few (or `share_channels`)."""
    if stride_c != 1 and n_inner > 1:
        # (N, C, S): neighbours in memory are rows, so the tile is tall.
        block_n = min(2048, next_power_of_2(n_rows))
        block_c = min(next_power_of_2(n_channels), 2048 // block_n)
    else:
        # 64 bytes of adjacent channels a row: two full 32-byte sectors, and still many programs.
        block_c = min(next_power_of_2(n_channels), max(16, 64 // dtype.itemsize))
        block_n = min(next_power_of_2(n_rows), 4096 // block_c)
    # At most 16 values a thread and tensor: with 32, and with 16 in a tall tile, whose activation's
    # derivative holds more at once, kernels spilled on sm_100.
    tile = Tile(block_n, block_c, num_warps=4 if block_n * block_c <= 1024 else 8)
    tiles = max(1, (n_rows + block_n - 1) // block_n)
    (columns,) = tile.columns_grid(n_channels)
    # Two programs for each of an H100's 132 multiprocessors fill it. Up to 4 tiles are not worth a
    # second launch, and more than 128 parts would be slow to merge.
    n_programs = 1
    if share_channels or tiles > 4:
        n_programs = min(tiles, 128, (263 + columns) // max(1, columns))
    rows_per_program = (tiles + n_programs - 1) // n_programs * block_n
    n_programs = max(1, (n_rows + rows_per_program - 1) // rows_per_program)
    return BatchNormPlan(tile, rows_per_program, n_programs)


def scan(n: int) -> int:
    """Block of a one-program pass over `n` numbers."""
    return min(next_power_of_2(n), 1024)
