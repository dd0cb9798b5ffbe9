"""Block sizes and warps of every kernel: the only place that makes them of a shape and a dtype."""

import functools
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


@dataclass(frozen=True)
class CrossEntropyPlan:
    """Tiles of BLOCK_N rows and BLOCK_C classes, and how many programs share them."""

    BLOCK_N: int
    BLOCK_C: int
    LANES: int  # parts of a row that keep statistics of their own until it ends
    VEC: int  # classes in one access
    EDGES: bool  # whether rows begin and end anywhere, between the full accesses
    HELD: bool  # whether a row is one tile, so that it is read once
    num_warps: int
    n_programs: int

    @property
    def BLOCK_COUNT(self) -> int:
        """Targets counted at a time: 8 a thread, all in flight together."""
        return 256 * self.num_warps

    @property
    def max_rows_to_count(self) -> int:
        """Up to 4 such steps every program counts for itself: less than a launch would take."""
        return 4 * self.BLOCK_COUNT


def cross_entropy(x: torch.Tensor) -> CrossEntropyPlan:
    """For logits x (N, C, S); a program owns whole rows.

    Not for more than x: whichever kernels compute them, two sums are then equal to the last bit.
    """
    n_rows, n_classes, size = x.shape[0] * x.shape[2], x.shape[1], x.dtype.itemsize
    processors, l2 = _device(x.device)
    if x.stride(1) != 1 and x.shape[2] > 1:
        # (N, C, S): neighbours in memory are rows. 128 bytes of them are one full access of a warp.
        block_n = min(128 // size, next_power_of_2(n_rows))
        block_c = min(next_power_of_2(n_classes), 2048 // block_n)
        # 8 numbers a thread: with 16 and every option it spilled on sm_80.
        held, lanes, vec, edges, num_warps = block_c >= n_classes, 1, 1, False, 8
        per_processor = 8
    else:
        vec, edges = _accesses(x)
        block_c = next_power_of_2(n_classes)
        # 16 numbers a thread in up to 16 warps: about 48 registers in bfloat16, so that 40 warps
        # are resident and some read while others compute. 32 a thread took 96 to 127.
        held = block_c * max(size, 4) <= 32768
        if held:
            # Up to 8 rows a thread do not spill. What such a tile holds takes one launch.
            block_n = next_power_of_2(n_rows)
            if block_n > 32 or block_n * block_c > 2048:
                block_n = max(1, 512 // block_c) if block_c <= 128 else 1
            elements = block_n * block_c
            num_warps = min(max(4, elements // 128) if block_n > 1 else max(1, elements // 512), 16)
            lanes, per_processor = 1, 64 // num_warps
        else:
            # Two accesses of 16 bytes a thread in flight, four where one program is alone on its
            # multiprocessor because the rows in flight, which are read twice, have to fit L2: two
            # thirds of it, as the gradient passes through it too.
            per_processor = 1 if 3 * processors * n_classes * size > l2 else 2
            block_n, num_warps = 1, 16
            block_c = (32768 if per_processor == 1 else 16384) // size
            lanes = 32 * num_warps
    tiles = max(1, (n_rows + block_n - 1) // block_n)
    # In the interpreter two, so that a small grid has several tiles a program, too.
    n_programs = min(tiles, 2 if x.is_cpu else processors * per_processor)
    return CrossEntropyPlan(block_n, block_c, lanes, vec, edges, held, num_warps, n_programs)


def _accesses(x: torch.Tensor) -> tuple[int, bool]:
    """(VEC, EDGES): 16 bytes an access, if rows of x, and of torch.empty_like(x), allow for it."""
    n_classes, vec = x.shape[1], 16 // x.dtype.itemsize
    if x.stride(1) != 1 or x.data_ptr() % 16:
        return 1, False
    if (
        n_classes % vec == 0
        and x.stride(0) % vec == 0
        and (x.shape[2] == 1 or x.stride(2) % vec == 0)
    ):
        return vec, False
    # The edges are a tile of their own: little beside so many classes.
    if n_classes >= 4096 and x.transpose(1, 2).is_contiguous():
        return vec, True
    return 1, False


def count(n_rows: int) -> tuple[int, int]:
    """Block and programs that count `n_rows` for the mean: 4 steps of 8 targets a thread."""
    return 2048, min((n_rows + 8191) // 8192, 512)


def scale(n: int, device: torch.device) -> tuple[int, int]:
    """Block and programs of a pass over `n` numbers that mostly has nothing to do."""
    # Few programs: all that most calls cost is to start them.
    block = 8192
    return block, min((n + block - 1) // block, 4 * _device(device)[0])


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of L2); an H100's where there is no device."""
    if device.type != "cuda":
        return 132, 50 * 2**20
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


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
