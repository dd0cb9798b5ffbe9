"""What kernels ask memory for, counted in the interpreter: the budgets that launchers state."""

import pytest
import torch

import fused

pytest.importorskip("triton")

from bench.cases import Case
from bench.runner import operations
from bench.traffic import Counter
from fused.kernels import tuning
from tests.test_batch_norm_plans import small_plans as small_plans

pytestmark = [
    pytest.mark.interpreted("counted between the interpreter and memory"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here"),
]


def counted(counter: Counter, size: int) -> dict[str, tuple[float, float]]:
    """Reads and writes of each launch in units of `size` bytes, to a half: what belongs to rows and
    channels is less."""
    found = {}
    for name, read, written in counter.launches:
        short = name.removesuffix("_kernel").rsplit("_", 1)[1]
        found[short] = (round(2 * read / size) / 2, round(2 * written / size) / 2)
    counter.launches.clear()
    return found


# Several rows a tile, one that is held, with and without edges, and one in several tiles.
CROSS_ENTROPY = [((34, 64), 1), ((34, 100), 1), ((2, 8192), 1), ((2, 8191), 1), ((2, 16390), 2)]


@pytest.mark.parametrize("shape, reads", CROSS_ENTROPY, ids=str)
def test_cross_entropy(shape, reads) -> None:
    """One read (two where the second comes from L2) and one write of the logits, both ways; the
    backward scales for another upstream gradient only. Apart, one read more."""
    logits = torch.randn(shape, requires_grad=True)
    target = torch.zeros(shape[0], dtype=torch.int64)
    size = logits.numel() * logits.itemsize
    with fused.backend.use("triton"), Counter() as counter:
        loss = fused.cross_entropy(logits, target, reduction="sum")
        forward = counted(counter, size)
        assert forward.pop("sum", (0.0, 0.0)) == (0.0, 0.0)
        assert forward == {"fwd": (reads, 1.0)}
        loss.backward(torch.ones(()))
        assert counted(counter, size) == {"scale": (0.0, 0.0)}
        loss = fused.cross_entropy(logits, target, reduction="sum")
        counter.launches.clear()
        loss.backward(torch.full((), 0.5))
        assert counted(counter, size) == {"scale": (1.0, 1.0)}
        losses = fused.cross_entropy(logits, target, reduction="none")
        assert counted(counter, size) == {"fwd": (1.0, 0.0)}
        losses.backward(torch.ones_like(losses))
        assert counted(counter, size) == {"bwd": (1.0, 1.0)}


@pytest.mark.parametrize("shape, reads", CROSS_ENTROPY, ids=str)
def test_ignored_rows_are_not_read(shape, reads) -> None:
    """Half of them, and their gradient is written nevertheless."""
    logits = torch.randn(shape, requires_grad=True)
    target = torch.arange(shape[0]) % 2 * -100
    size = logits.numel() * logits.itemsize
    with fused.backend.use("triton"), Counter() as counter:
        fused.cross_entropy(logits, target, reduction="sum")
        assert counted(counter, size)["fwd"] == (reads / 2, 1.0)
        losses = fused.cross_entropy(logits, target, reduction="none")
        assert counted(counter, size) == {"fwd": (0.5, 0.0)}
        losses.backward(torch.ones_like(losses))
        assert counted(counter, size) == {"bwd": (0.5, 1.0)}


# By `small_plans`: on chip, in cache, and shared. Forward, backward; then evaluation.
TILE = {"fwd": (1.0, 1.0), "bwd": (2.0, 1.0)}
PROGRAM = {"fwd": (2.0, 1.0), "bwd": (4.0, 1.0)}
PARTIAL = {"moments": (1.0, 0.0), "fwd": (1.0, 1.0), "sums": (2.0, 0.0), "bwd": (2.0, 1.0)}
FROZEN_PARTIAL = {"fwd": (1.0, 1.0), "sums": (2.0, 1.0)}
BATCH_NORM = [
    ((64, 16), TILE, TILE),
    ((256, 16), PROGRAM, TILE),
    ((900, 16), PARTIAL, FROZEN_PARTIAL),
    ((2, 3, 256), TILE, TILE),
    ((8, 3, 256), PROGRAM, TILE),
    ((8, 3, 260), PARTIAL, FROZEN_PARTIAL),
    ((1800, 6), PARTIAL, FROZEN_PARTIAL),  # two rows seen as one
    # Four channels of an image seen as one row; of 8 rows a program the 4 vectors are a half more.
    ((30, 8, 15), PROGRAM, TILE | {"fwd": (1.5, 1.0)}),
]


@pytest.mark.parametrize("shape, training, evaluation", BATCH_NORM, ids=str)
def test_batch_norm(shape, training, evaluation, small_plans) -> None:
    """2S and 3S where a program has all rows of its channels on chip; in cache it asks for them
    twice; where programs share them 3S and 5S. Evaluation 2S and 3S."""
    x = torch.randn(shape, requires_grad=True)
    mean, var, weight, bias = torch.ones(4, shape[1])
    size = x.numel() * x.itemsize
    for mode, expected in ((True, training), (False, evaluation)):
        with fused.backend.use("triton"), Counter() as counter:
            y = fused.batch_norm(x, mean, var, weight, bias, mode, activation="tanh")
            y.backward(torch.ones_like(y))
        assert counted(counter, size) == expected


# Where a program holds its rows or channels.
LEAST = [
    ("cross_entropy", (34, 64), ""),
    ("cross_entropy", (34, 64), "none"),
    ("cross_entropy", (2, 2048), "slice"),
    ("batch_norm", (64, 16), "tanh"),
    ("batch_norm", (4, 3, 8, 8), "relu-residual"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operation, shape, variant", LEAST, ids=str)
def test_the_benchmarks_least_bytes_are_moved(
    operation, shape, variant, dtype, monkeypatch
) -> None:
    """Bandwidths are quoted of them."""
    empty = torch.empty

    @torch.no_grad()
    def zeroed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.zero_()

    monkeypatch.setattr(torch, "empty", lambda *a, **k: zeroed(empty(*a, **k)))
    op, case = operations([operation])[operation], Case(operation, shape, dtype, variant)
    with fused.backend.use("triton"), Counter() as counter:
        op.launch(case, torch.device("cpu"))
    moved = [(read + written) / case.bytes for _, read, written in counter.launches]
    moved = [round(cases) for cases in moved if cases > 0.5]  # the others' are of rows
    least = {phase: round(n / case.bytes) for phase, n in op.least_bytes(case).items()}
    assert sum(moved) == least["fwd_bwd"]
    if variant not in ("", "slice"):  # whose gradient is formed in the forward
        assert moved == [least["fwd"], least["bwd"]]
    if variant == "":
        assert (least["fwd"], least["bwd"]) == (1, 2)


class Order(Counter):
    """Notes where in `x` tiles are read, in their order."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.first, self.end = x.data_ptr(), x.data_ptr() + x.numel() * x.itemsize
        self.places: list[int] = []

    def load(self, pointers, mask, other, dtype):
        if pointers.ndim == 2 and mask.any():
            place = int(pointers[mask].min())
            if self.first <= place < self.end:
                self.places.append(place - self.first)
        return super().load(pointers, mask, other, dtype)


# By one program for each of two blocks of channels; by the second of two launches.
PASSES = [((250, 16), 2), ((8, 2, 256), 2), ((300, 16), 1), ((8, 2, 260), 1)]


@pytest.mark.parametrize("shape, programs", PASSES, ids=str)
def test_what_was_read_last_is_read_again_first(shape, programs, small_plans) -> None:
    """While it is still in a cache."""
    x = torch.randn(shape, requires_grad=True)
    order = Order(x)
    with fused.backend.use("triton"), order:
        y = fused.batch_norm(x, None, None, training=True)
        forward, order.places = order.places, []
        y.backward(torch.ones_like(y))
    assert len(order.launches) == 4 // programs
    for places in (forward, order.places):
        size = len(places) // (2 * programs)
        assert size >= 8 and len(set(places)) == len(places) // 2
        for start in range(0, len(places), 2 * size):
            middle = start + size
            assert places[start:middle] == places[middle : middle + size][::-1]


def test_programs_between_do_as_the_middle_one(small_plans, monkeypatch) -> None:
    """The kernel report runs three programs along each axis of a grid: here of 2 x 14 and 12."""
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 16)
    monkeypatch.setattr(tuning, "INTERPRETED_PROGRAMS", None)
    found = []
    for sampled in (False, True):
        with fused.backend.use("triton"), Counter(sampled) as counter:
            x = torch.randn(262, 33, requires_grad=True)
            y = fused.batch_norm(x, None, None, training=True)
            y.backward(torch.ones_like(y))
            logits = torch.randn(12, 200, requires_grad=True)
            losses = fused.cross_entropy(logits, torch.arange(12), reduction="none")
            losses.backward(torch.ones_like(losses))
        found.append(counter.launches)
    assert found[0] == found[1] and len(found[0]) == 6
