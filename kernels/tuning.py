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


# What the compiler makes of the alternatives is in docs/performance.md.
MLP_TRAIN_PRECISION = "fp16x3"


@dataclass(frozen=True)
class MLPTrainPlan:
    """A program that trains one model: `groups` x `units` hidden units, padded sizes, a word."""

    groups: int
    units: int
    BLOCK_B: int
    BLOCK_F: int
    BLOCK_V: int
    BLOCK_E: int
    BLOCK_T: int
    bits: int  # of a character
    num_warps: int

    @property
    def max_registers(self) -> int:
        """A thread's share of the multiprocessor's 65,536; left alone, the assembler takes fewer
        as soon as it has to spill."""
        return min(255, 65536 // (32 * self.num_warps))

    @property
    def scratch(self) -> int:
        """Numbers that the warps exchange: their parts of the logits and of demb."""
        return self.groups * self.BLOCK_B * (self.BLOCK_V + self.BLOCK_F)

    @property
    def shared_bytes(self) -> int:
        """What the compiler takes of shared memory: each of the two parts changes its layout."""
        return 4 * self.groups * self.BLOCK_B * max(self.BLOCK_V, self.BLOCK_F)


def mlp_train(
    context: int, embedding: int, hidden: int, vocabulary: int, batch: int, shared_memory: int
) -> MLPTrainPlan:
    """One warp a group of hidden units, one more unit than there are: it carries the bias b2.

    Raises ValueError where a program cannot hold the model in `shared_memory` bytes.
    """
    # 32 units a warp make the fewest instructions; 16 where half of them would be padding.
    units = 32 if hidden >= 128 else 16
    groups = max(4, next_power_of_2((hidden + units) // units))
    plan = MLPTrainPlan(
        groups,
        units,
        BLOCK_B=max(16, next_power_of_2(batch)),  # 16: the least that tl.dot takes
        BLOCK_F=max(16, next_power_of_2(context * embedding)),
        BLOCK_V=max(16, next_power_of_2(vocabulary)),
        BLOCK_E=max(16, next_power_of_2(embedding)),
        BLOCK_T=next_power_of_2(context),
        bits=max(1, (vocabulary - 1).bit_length()),
        num_warps=min(groups, 16),
    )
    if plan.shared_bytes > shared_memory:
        raise ValueError(
            f"one multiprocessor cannot hold this network: {groups} groups of hidden units x batch "
            f"{plan.BLOCK_B} x the larger of context*embedding {plan.BLOCK_F} and vocabulary "
            f"{plan.BLOCK_V} (each padded) x 4 bytes are {plan.shared_bytes} bytes, and it has "
            f"{shared_memory}; use smaller sizes or another method"
        )
    if (context + 1) * plan.bits > 63:
        raise ValueError(
            f"{context} characters of context and the next one take {plan.bits} bits each, "
            f"{(context + 1) * plan.bits} together, and a word has 63; use another method"
        )
    return plan
