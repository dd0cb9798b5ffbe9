"""Every plan of the batch norm kernels at its edges: results, launches, and that two runs agree."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fused
from tests.test_batch_norm import check_against_torch, example, run
from tests.test_batch_norm_pitfalls import Operations, check_far_apart

pytest.importorskip("triton")

import triton
import triton.language as tl

from fused.kernels import batch_norm as kernels
from fused.kernels import tuning
from fused.kernels.batch_norm_tile import tiles_with_row

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
# (rows, channels, length), channels adjacent?, dtype: what a forward and a backward program reduces
PLANS: list[tuple[tuple[int, int, int], bool, torch.dtype, str, str]] = [
    ((32, 64, 1), True, BF16, "tile", "tile"),
    ((32, 200, 1), True, F32, "tile", "tile"),
    ((512, 1024, 1), True, BF16, "tile", "tile"),
    ((513, 1024, 1), True, BF16, "tile", "program"),
    ((1024, 1024, 1), True, BF16, "tile", "program"),
    ((1025, 1024, 1), True, BF16, "program", "program"),
    ((2048, 1024, 1), True, F32, "tile", "program"),
    ((2048, 1024, 1), True, F64, "tile", "program"),
    ((4096, 1024, 1), True, BF16, "program", "program"),
    ((4096, 1024, 1), True, F32, "program", "program"),
    ((4096, 16384, 1), True, BF16, "program", "program"),
    ((4097, 8384, 1), True, BF16, "partial", "partial"),
    ((4097, 8512, 1), True, BF16, "program", "program"),  # 133 blocks of channels
    ((4096, 1008, 1), True, BF16, "partial", "partial"),  # 63 programs
    ((65536, 1024, 1), True, BF16, "partial", "partial"),
    ((125000, 50, 1), True, F32, "partial", "partial"),
    ((1000000, 32, 1), True, F32, "partial", "partial"),
    ((32, 2048, 49), False, BF16, "tile", "tile"),
    ((32, 64, 256), False, F32, "tile", "tile"),
    ((32, 64, 257), False, F32, "tile", "program"),
    ((32, 64, 513), False, F32, "program", "program"),
    ((32, 64, 1024), False, F32, "program", "program"),
    ((32, 64, 1025), False, F32, "partial", "partial"),
    ((32, 63, 1024), False, F32, "partial", "partial"),
    ((256, 64, 12544), False, BF16, "partial", "partial"),
    ((20, 6, 65536), False, BF16, "partial", "partial"),
]


@pytest.mark.parametrize("shape, columns, dtype, forward, backward", PLANS, ids=str)
def test_plan(shape, columns, dtype, forward, backward) -> None:
    n, c, length = shape
    plans = [tuning.batch_norm(n, c, length, columns, 16, dtype, tensors) for tensors in (1, 2)]
    assert [plan.reduction for plan in plans] == [forward, backward]
    rows = n * length
    for plan in plans:
        tile = plan.BLOCK_N * plan.BLOCK_L
        assert plan.n_tiles * tile >= rows > 0
        assert plan.n_programs * plan.tiles_per_program >= plan.n_tiles
        assert (plan.n_programs - 1) * plan.tiles_per_program < plan.n_tiles  # none is idle
        # What one program of the second launch merges is two tiles at most.
        assert plan.n_programs * plan.BLOCK_C <= 2 * 4096
        # A thread holds no more than fits into its registers.
        assert tile * plan.BLOCK_C <= plan.num_warps * 32 * 64


# (rows, channels, length), channels adjacent?, elements that runs are aligned to, and of a forward
# program in bfloat16 BLOCK_L or, of channels, BLOCK_C; values in a tile; warps.
TILES = [
    ((32, 64, 1), True, 16, 32, 1024, 4),  # 16 bytes for each thread
    ((64, 4223, 1), True, 16, 16, 1024, 4),
    ((64, 4224, 1), True, 16, 32, 2048, 8),  # twice the sector, and a program everywhere
    ((1025, 1024, 1), True, 16, 16, 4096, 16),  # in cache, all rows by one program
    ((65536, 64, 1), True, 16, 32, 4096, 8),
    ((65536, 65, 1), True, 8, 64, 4096, 8),  # 128 bytes a row
    ((65536, 65, 1), True, 4, 64, 2048, 8),  # accesses of 8 bytes
    ((256, 64, 12544), False, 16, 1024, 2048, 8),  # of 2048 an eighth would be beyond the end
    ((256, 64, 130), False, 2, 64, 2048, 16),  # of 64 more would be, but runs are no shorter
]


@pytest.mark.parametrize("shape, columns, align, block, values, warps", TILES, ids=str)
def test_tiles(shape, columns, align, block, values, warps) -> None:
    n, c, length = shape
    plan = tuning.batch_norm(n, c, length, columns, align, BF16, 1)
    assert (plan.BLOCK_C if columns else plan.BLOCK_L) == block
    assert plan.BLOCK_N * plan.BLOCK_L * plan.BLOCK_C == values
    assert plan.num_warps == warps
    for dtype in (BF16, F32, F64):
        x = torch.empty(1, dtype=dtype)
        stages, size = plan.stages(x, x), 2 * values * x.itemsize
        assert stages == (1 if plan.n_tiles == 1 else min(8, 1 + max(1, 49152 // size)))


def test_no_more_stages_than_8_and_two_tiles_of_results() -> None:
    plan = tuning.batch_norm(65536, 128, 3, False, 1, BF16, 1)
    assert plan.BLOCK_N * plan.BLOCK_L * plan.BLOCK_C == 1024
    assert plan.stages(torch.empty(1, dtype=BF16)) == 8
    # Of 264 programs, two a multiprocessor, 256 that share 7,813 tiles: 31 tiles each.
    assert tuning.batch_norm(1000000, 32, 1, True, 16, BF16, 1).n_programs == 253


# Contiguous images of few positions: (n, channels, length), and channels of a bfloat16 program.
SHORT = [
    ((1024, 512, 1), 16),  # several images are no rows of neighbours here, say
    ((8192, 256, 2), 8),
    ((65536, 128, 3), 8),
    ((1000000, 64, 4), 4),
    ((512, 2048, 5), 4),
    ((512, 2048, 15), 2),
    ((512, 2048, 16), 1),
    ((100000, 2, 3), 2),  # there are no more
]


@pytest.mark.parametrize("tensors", [0, 1, 2])
@pytest.mark.parametrize("shape, channels", SHORT, ids=str)
def test_short_images_are_read_by_whole_sectors(shape, channels, tensors) -> None:
    """32 bytes, of which one channel has a part: so programs have several channels."""
    n, c, length = shape
    for dtype, least in ((BF16, channels), (F32, min(c, -(-channels // 2)))):
        plan = tuning.batch_norm(n, c, length, False, 1, dtype, tensors)
        assert plan.BLOCK_C >= least
        assert plan.BLOCK_C >= c or plan.BLOCK_C * length * dtype.itemsize >= 32


# Images that are few and small, contiguous: (n, channels, length), and a forward program's warps.
WARPS = [
    ((32, 1056, 49), 2),
    ((17, 1056, 49), 2),
    ((16, 1056, 49), 4),
    ((33, 1056, 49), 8),
    ((32, 1055, 49), 8),
    ((32, 1056, 33), 2),
    ((32, 1056, 32), 4),
    ((32, 1056, 65), 4),
    ((32, 1056, 129), 8),
]


@pytest.mark.parametrize("shape, warps", WARPS, ids=str)
def test_warps_of_small_images(shape, warps) -> None:
    n, c, length = shape
    forward, backward = (
        tuning.batch_norm(n, c, length, False, 1, BF16, tensors) for tensors in (1, 2)
    )
    assert forward.reduction == backward.reduction == "tile"
    assert forward.num_warps == warps
    assert backward.num_warps == (4 if n <= 16 or length <= 32 else 8)


ROWS = "partial"  # several programs share them
# Rows that begin at odd addresses: (rows, channels, length), channels adjacent?, dtype, and in
# evaluation, forward and backward how many channels a block packs, of how many columns each, and
# what a program reduces.
PACKS: list[tuple[tuple[int, int, int], bool, torch.dtype, Any, Any, Any]] = [
    ((125000, 50, 1), True, BF16, (50, 4), (50, 4, ROWS), (50, 4, ROWS)),
    ((125000, 50, 1), True, F32, (50, 2), (50, 2, ROWS), (50, 2, ROWS)),
    ((125000, 50, 1), True, F64, None, None, None),  # 400 bytes
    ((125001, 50, 1), True, BF16, None, None, None),
    ((32, 50, 1), True, BF16, (50, 4), None, None),
    ((65536, 27, 1), True, BF16, (27, 8), (27, 8, ROWS), (27, 8, ROWS)),
    ((65536, 60, 1), True, BF16, (60, 2), (60, 2, ROWS), (60, 2, ROWS)),
    ((65536, 65, 1), True, BF16, None, None, None),
    ((32, 2048, 49), False, BF16, (8, 49), (8, 49, "tile"), (8, 49, "program")),
    ((32, 2048, 49), False, F32, (4, 49), (4, 49, "tile"), (4, 49, "tile")),
    ((32, 2048, 49), False, F64, (2, 49), (2, 49, "tile"), (2, 49, "tile")),
    ((32, 2048, 48), False, BF16, None, None, None),
    ((32, 2047, 49), False, BF16, None, None, None),  # images begin at odd addresses, too
    ((32, 512, 49), False, BF16, (8, 49), (8, 49, "tile"), (8, 49, "program")),
    ((32, 504, 49), False, BF16, (8, 49), None, None),  # 63 programs
    ((1000, 504, 49), False, BF16, (8, 49), None, None),  # a program reads a channel from cache
    ((2688, 504, 49), False, BF16, (8, 49), (8, 49, ROWS), (8, 49, ROWS)),
    ((32, 2048, 81), False, BF16, None, None, None),  # 648 columns
    ((32, 2048, 4), False, BF16, (128, 4), (32, 4, "tile"), (32, 4, "tile")),
    ((32, 256, 4), False, BF16, (128, 4), None, None),  # 32 bytes a row
]


@pytest.mark.parametrize("shape, columns, dtype, evaluation, forward, backward", PACKS, ids=str)
def test_pack(shape, columns, dtype, evaluation, forward, backward) -> None:
    """Rows are seen as fewer that begin at multiples of 16 bytes, where programs stay enough."""
    n, c, length = shape
    for tensors, expected in enumerate((evaluation, forward, backward)):
        of = n, c, length, columns, 1, dtype, tensors, 132
        plan = tuning.batch_norm(*of, compact=True)
        if expected is None:
            assert plan == tuning.batch_norm(*of)
            continue
        assert plan.pack is not None
        channels, members = plan.pack[:2]
        assert (channels, members, plan.reduction)[: len(expected)] == expected
        width = channels * members
        assert width * dtype.itemsize % 16 == 0
        assert plan.BLOCK_L == 1 and plan.BLOCK_C // 2 < width <= plan.BLOCK_C
        assert plan.n_tiles * plan.BLOCK_N * members >= n * length
        assert plan.n_programs * plan.tiles_per_program >= plan.n_tiles
        assert (plan.n_programs - 1) * plan.tiles_per_program < plan.n_tiles
        # Two tiles of results to merge, a thread's registers, and a program a multiprocessor.
        assert plan.partials(plan.n_programs) * plan.BLOCK_C <= 2 * 4096
        assert plan.BLOCK_N * plan.BLOCK_C <= plan.num_warps * 32 * 64
        blocks, programs = plan.grid(c)
        assert (blocks - 1) * channels < c <= blocks * channels
        assert programs == 1 or blocks * programs <= 132


def test_two_rows_are_better_than_one() -> None:
    """Of a number that 4 does not divide, and of more channels than 4 rows of which fit a block."""
    for n, c, dtype, rows in ((125002, 50, BF16, 2), (65536, 63, BF16, 4), (65536, 33, F32, 2)):
        plan = tuning.batch_norm(n, c, 1, True, 1, dtype, 1, 132, compact=True)
        assert plan.pack is not None and plan.pack.members == rows


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels launched, by name"""
    names: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    for name in ("moments", "fwd", "sums", "bwd"):
        attribute = f"_batch_norm_{name}_kernel"
        monkeypatch.setattr(kernels, attribute, Counted(name, getattr(kernels, attribute)))
    with fused.backend.use("triton"):
        yield names


@pytest.fixture
def small_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """All thresholds a sixteenth of theirs or less, so that small shapes meet every plan."""
    monkeypatch.setattr(tuning, "_ON_CHIP_VALUES", 512)
    monkeypatch.setattr(tuning, "_TILE_VALUES", 256)
    monkeypatch.setattr(tuning, "_CACHED_BYTES", 8192)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 4)
    monkeypatch.setattr(tuning, "_ENOUGH_PROGRAMS", 2)


@pytest.mark.parametrize("processors", [84, 132, 148, 304])
def test_rows_are_shared_by_two_programs_of_every_multiprocessor(processors) -> None:
    plan = tuning.batch_norm(256, 64, 12544, False, 16, BF16, 1, processors)
    programs = 64 * plan.n_programs
    assert 2 * processors - 64 < programs <= 2 * processors


ONE, SHARED = ["fwd", "bwd"], ["moments", "fwd", "sums", "bwd"]
# float32: a sector is 8 channels. Shape, and what is launched with batch statistics.
EDGES: list[tuple[tuple[int, ...], list[str]]] = [
    ((64, 12), ONE),  # on chip both ways
    ((65, 12), ONE),  # on chip forward
    ((129, 12), ONE),  # in cache
    ((256, 12), ONE),
    ((257, 12), SHARED),
    ((129, 7), SHARED),  # one block of channels: too few programs
    ((260, 36), SHARED),
    ((2000, 1), SHARED),  # one channel: its rows are adjacent
    ((2, 3, 256), ONE),
    ((3, 3, 256), ONE),
    ((8, 3, 256), ONE),
    ((8, 3, 260), SHARED),  # tiles that end within an image
    ((3, 1, 999), SHARED),
    ((5, 3, 8, 60), SHARED),
]


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
@pytest.mark.parametrize("shape, expected", EDGES, ids=str)
def test_edge(shape, expected, channels_last, activation, small_plans, launches, device) -> None:
    """With a residual and an activation; the results are torch's, and the same twice."""
    if channels_last and len(shape) < 4:
        pytest.skip("has no such format")
    if activation == "relu" and math.prod(shape) > 6500:
        pytest.skip("the interpreter takes long; a smaller shape has the same plan")
    tensors = example(shape, F32, device, residual=True)
    if channels_last:
        for name in ("input", "residual"):
            tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(tensors["input"])
    options = {"training": True, "correction": 1, "activation": activation}
    check_against_torch(tensors, "triton", **options)
    assert launches == expected
    if activation == "silu":
        first, second = (run(fused.batch_norm, tensors, upstream, **options) for _ in range(2))
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    launches.clear()
    check_against_torch(tensors, "triton", training=False, activation=activation)
    # dx does not wait for sums: one pass, and a sum of the programs' results
    assert launches == ["fwd", "sums" if expected is SHARED else "bwd"]


# Shape, dtype, what is launched with batch statistics, and how many columns each channel has of a
# block in evaluation, forward and backward (1: nothing is packed). By `small_plans`.
PACKED_EDGES: list[tuple[tuple[int, ...], torch.dtype, list[str], tuple[int, int, int]]] = [
    ((260, 7), F32, SHARED, (4, 4, 4)),
    ((258, 7), F32, SHARED, (2, 2, 2)),
    ((259, 7), F32, SHARED, (1, 1, 1)),
    ((264, 7), BF16, SHARED, (8, 8, 8)),
    ((260, 50), F32, SHARED, (2, 2, 2)),
    ((48, 7), F32, ONE, (4, 1, 1)),  # a channel's rows in a program: packed in evaluation alone
    ((4, 8, 15), F32, ONE, (15, 15, 15)),  # on chip both ways
    ((9, 8, 15), F32, ONE, (15, 15, 15)),  # on chip forward
    ((30, 8, 15), F32, ONE, (15, 15, 15)),  # in cache
    ((40, 8, 15), F32, ONE, (15, 1, 1)),  # of four channels at a time not
    ((4, 4, 15), F32, ONE, (15, 1, 1)),  # one program
    ((4, 9, 15), F32, ONE, (1, 1, 1)),  # nine channels are no multiple of 16 bytes
    ((140, 8, 15), F32, SHARED, (15, 15, 15)),
    ((4, 40, 3, 7), BF16, ONE, (21, 21, 21)),  # 16 channels in a block, and 8 in the last
    ((5, 16, 2, 2), BF16, ONE, (4, 4, 4)),
]


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shape, dtype, expected, members", PACKED_EDGES, ids=str)
def test_packed_edge(
    shape, dtype, expected, members, residual, small_plans, launches, monkeypatch, device
) -> None:
    """The results are torch's, and the same twice; tensors that do not lie alike are not packed."""
    packs: dict[int, int] = {}
    plan_of = tuning.batch_norm

    def planned(*args: Any) -> tuning.BatchNormPlan:
        plan, tensors = plan_of(*args), args[6]
        packs[tensors] = 1 if plan.pack is None else plan.pack.members
        return plan

    monkeypatch.setattr(tuning, "batch_norm", planned)
    tensors = example(shape, dtype, device, residual)
    upstream = torch.randn_like(tensors["input"])
    options: dict[str, Any] = {"correction": 1, "activation": "silu" if residual else "tanh"}
    check_against_torch(tensors, "triton", training=True, **options)
    assert launches == expected
    first, second = (
        run(fused.batch_norm, tensors, upstream, training=True, **options) for _ in range(2)
    )
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    check_against_torch(tensors, "triton", training=False, activation=options["activation"])
    assert tuple(packs[i] for i in range(3)) == members
    # Every second channel of twice as many.
    tensors["input"] = tensors["input"].repeat_interleave(2, 1)[:, ::2]
    packs.clear()
    check_against_torch(tensors, "triton", training=True, **options)
    assert packs and set(packs.values()) == {1}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(260, 7), (9, 8, 15)], ids=str)
def test_a_residual_that_lies_otherwise_is_not_packed(shape, training, small_plans, device) -> None:
    """Nor is the input beside it, which by itself would be."""
    tensors = example(shape, F32, device, residual=True)
    tensors["residual"] = tensors["residual"].transpose(0, 1).contiguous().transpose(0, 1)
    with fused.backend.use("triton"):
        check_against_torch(tensors, "triton", training=training, activation="silu")


@pytest.mark.parametrize("shape", [(264, 7), (30, 8, 15), (300, 12), (8, 3, 4, 65)], ids=str)
def test_gradients_do_not_depend_on_how_the_upstream_one_lies(shape, small_plans, device) -> None:
    """As a compiled graph may lay it out; not even in the last place."""
    tensors = example(shape, F32, device)
    upstream = torch.randn_like(tensors["input"])
    reverse = range(len(shape) - 1, -1, -1)
    otherwise = upstream.permute(*reverse).contiguous().permute(*reverse)
    one = torch.ones((), device=device).expand(shape)
    with fused.backend.use("triton"):
        for a, b in ((upstream, otherwise), (one.contiguous(), one)):
            first, second = (run(fused.batch_norm, tensors, dy, training=True) for dy in (a, b))
            torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (32, 200)], ids=str)
def test_a_small_step_is_one_launch_each_way(shape, dtype, launches, device) -> None:
    """Normalisation, activation, residual, running statistics and the batch counter; and the
    gradients of parameters in their own dtype."""
    norm = fused.BatchNorm1d(shape[1], activation="tanh", device=device, dtype=dtype)
    x, residual, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    with Operations() as operations:
        norm(x.requires_grad_(), residual.requires_grad_()).backward(dy)
    assert launches == ["fwd", "bwd"]
    assert norm.num_batches_tracked == 1
    assert norm.weight.grad.dtype == norm.bias.grad.dtype == dtype
    assert not {name for name in operations.names if "to_copy" in name or "add" in name}


@pytest.mark.parametrize("shape", [(17, 700), (900, 12), (5, 60, 40)], ids=str)
def test_every_program_has_the_same_count(shape, small_plans, device) -> None:
    """Of momentum=None, where one program after the other adds its statistics."""
    ours = fused.BatchNorm1d(shape[1], momentum=None, device=device)
    theirs = torch.nn.BatchNorm1d(shape[1], momentum=None, device=device, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 4):
        x = torch.randn(shape, generator=generator).to(device) + count
        with fused.backend.use("triton"):
            ours(x)
        theirs(x.double())
        assert ours.num_batches_tracked == count
    torch.testing.assert_close(ours.running_mean, theirs.running_mean.float())
    torch.testing.assert_close(ours.running_var, theirs.running_var.float())


@triton.jit
def _tiles_with_row(out, tile, N, L, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr):
    rows = tiles_with_row(tile, N, L, BLOCK_N, BLOCK_L)
    tl.store(out + tl.arange(0, BLOCK_N * BLOCK_L), rows)


@pytest.mark.parametrize("n, length", [(3, 10), (4, 9), (5, 4), (1, 3)])
def test_rows_of_the_tiles_before_each(n, length, device) -> None:
    """Also where the last images are fewer than a tile has and a program ends among them."""
    n_tiles = -(-n // 2) * -(-length // 4)
    n0, l0 = (2 * torch.arange(-(-n // 2)), 4 * torch.arange(-(-length // 4)))
    row = torch.arange(8)
    exists = (n0[:, None, None] + row // 4 < n) & (l0[:, None] + row % 4 < length)
    before = exists.view(n_tiles, 8).int().cumsum(0)
    for tile in range(1, n_tiles + 1):
        out = torch.empty(8, dtype=torch.int32, device=device)
        _tiles_with_row[(1,)](out, tile, n, length, BLOCK_N=2, BLOCK_L=4)
        torch.testing.assert_close(out.cpu(), before[tile - 1].int())


@pytest.mark.parametrize("below", [1, 3, 8, 9])
@pytest.mark.parametrize("block_n, block_l", [(1, 8), (2, 4), (8, 1)])
def test_rows_of_tiles_up_to_2_to_the_31(block_n, block_l, below, device) -> None:
    """Sizes are int32 that far, and a size plus a block is not; each row is in one of all tiles."""
    many = 2**31 - below
    n, length = (many, 1) if block_l == 1 else (1, many)
    tiles = -(-n // block_n) * -(-length // block_l)
    out = torch.empty(block_n * block_l, dtype=torch.int32, device=device)
    _tiles_with_row[(1,)](out, tiles, n, length, BLOCK_N=block_n, BLOCK_L=block_l)
    row = torch.arange(block_n * block_l)
    down, across = (
        (n - row // block_l - 1) // block_n + 1,
        (length - row % block_l - 1) // block_l + 1,
    )
    torch.testing.assert_close(out.cpu(), (down * across).int())


@pytest.mark.interpreted("the emulator copies a tensor's whole storage, here 4 GiB")
def test_channels_beyond_2_to_the_31_that_programs_share(
    small_plans, launches, monkeypatch, device
) -> None:
    """Each of them reads the first row."""
    monkeypatch.setattr(tuning, "_CACHED_BYTES", 1024)
    check_far_apart((1100, 3), (1, 2**30), device)
    assert launches == 2 * SHARED


def test_a_variance_that_overflows_in_several_tiles(small_plans, device) -> None:
    """It is inf, and the output 0, as in torch's: not NaN."""
    x = torch.randn(900, 3, generator=torch.Generator().manual_seed(0)).to(device) * 1e30
    with fused.backend.use("triton"):
        y = fused.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=0)


@pytest.mark.parametrize("shape, training", [((257, 12), False), ((0, 12), True)], ids=str)
def test_gradients_have_memory_of_their_own(training, shape, small_plans, device) -> None:
    """Each: whoever receives one may write to it."""
    tensors = example(shape, F32, device)
    with fused.backend.use("triton"):
        found = run(fused.batch_norm, tensors, torch.ones_like(tensors["input"]), training=training)
    memory = {found[n].untyped_storage().data_ptr() for n in ("dinput", "dweight", "dbias")}
    assert len(memory) == 3


def test_gradients_of_narrow_parameters_are_rounded_once(small_plans, device) -> None:
    """In evaluation: the programs' results are added in float32 before."""
    narrow = {name: t.to(BF16) for name, t in example((900, 12), F32, device).items()}
    wide = {name: t if name == "input" else t.float() for name, t in narrow.items()}
    upstream = torch.rand_like(narrow["input"])
    with fused.backend.use("triton"):
        found, exact = (run(fused.batch_norm, t, upstream) for t in (narrow, wide))
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(found[name], exact[name].to(BF16), rtol=0, atol=0)


def test_statistics_of_data_that_drifts(small_plans, implementation, device) -> None:
    """From 0 to 1e4 over the rows, in every order, and with a first row far off; and images, of
    which a program's first tile is the end of one: some positions begin in its second."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 2, generator=generator, dtype=F64)
    ramp = torch.linspace(0, 1e4, 2000, dtype=F64).unsqueeze(1)
    far = torch.zeros(2000, 1, dtype=F64)
    far[0] = 1e4
    images = torch.randn(20, 2, 160, generator=generator, dtype=F64) + 1e4
    for data in (ramp + noise, ramp.flip(0) + noise, far + noise, 1e4 - far + noise, images):
        x = data.to(device, F32)
        mean, var = torch.zeros(2, x.shape[1], device=device).unbind()
        fused.batch_norm(x, mean, var, training=True, momentum=1.0)
        x = x.transpose(0, 1).flatten(1).T
        # The last place of 1e4 is 1e-3; a GPU's division is good to two of those.
        atol = 1e-3 if device.type == "cpu" else 4e-3
        torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-6, atol=atol)
        torch.testing.assert_close(var.double(), x.double().var(0), rtol=1e-5, atol=0)
