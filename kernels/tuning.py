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


def batch_norm(n_rows: int, n_channels: int, dtype: torch.dtype) -> Tile:
    """A program owns BLOCK_C channels and walks over their rows, BLOCK_N at a time."""
    # 64 bytes of adjacent channels a row: two full 32-byte sectors, and still many programs.
    block_c = min(next_power_of_2(n_channels), max(16, 64 // dtype.itemsize))
    # At most 32 values a thread and tensor at 8 warps: the backward holds two tensors.
    block_n = min(next_power_of_2(n_rows), 8192 // block_c)
    return Tile(block_n, block_c, num_warps=4 if block_n * block_c <= 2048 else 8)


def scan(n: int) -> int:
    """Block of a one-program pass over `n` numbers."""
    return min(next_power_of_2(n), 1024)
