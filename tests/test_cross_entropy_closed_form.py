"""What only the closed form of cross-entropy decides: its chunks, where it looks for the largest
logit, whose memory it writes to, and what it does on devices whose values nobody may look at."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused
from fused.eager import cross_entropy as eager
from fused.eager import cross_entropy_rows
from fused.eager.layout import View
from tests.test_cross_entropy import DTYPES, example, small_chunks  # noqa: F401


@pytest.fixture(autouse=True)
def closed_form() -> Iterator[None]:
    with fused.backend.use("eager"):
        yield


class Operations(TorchDispatchMode):
    """Counts those on tensors of at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.seen = elements, Counter[str]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], Tensor) and args[0].numel() >= self.elements:
            self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def chunks_of(logits: Tensor, target: Tensor) -> tuple[View, list[tuple[Any, ...]]]:
    """How they are seen, and of each chunk its rows and the indices of those."""
    view = View.of(logits, target)
    rows = cross_entropy_rows.Rows.of(view(logits), view(target), None, -100, 0.0, 0.0, 0.0, 1.0)
    of_row = view(torch.arange(target.numel()).view(target.shape))
    chunks = list(rows.chunks(of_row))
    assert torch.equal(rows.joined(tuple(n for _, n in chunks)), of_row)
    assert all(c.target.shape == c.labels.classes.squeeze(1).shape == n.shape for c, n in chunks)
    for c, n in chunks:
        assert torch.equal(c.target, target.flatten()[n])
        assert torch.equal(c.x.movedim(1, -1), logits.movedim(1, -1).flatten(0, -2)[n])
    return view, chunks


@pytest.mark.parametrize(
    "shape", [(9, 27), (7, 3, 9), (2, 300), (1, 5), (2, 27, 9), (3, 27, 2, 5), (1, 200, 3)], ids=str
)
def test_chunks_are_whole_rows_and_fit(shape) -> None:
    """Or two positions, which are the least here."""
    logits, target, _ = example(shape, torch.float32, "cpu")
    most = max(cross_entropy_rows.CHUNK, 2 * shape[1])
    assert all(c.x.numel() <= most for c, _ in chunks_of(logits, target)[1])


@pytest.mark.parametrize(
    "seen_as, shape, lay",
    [
        ((9, 27), (9, 27), lambda x: x),
        ((1, 27, 9), (27, 9), lambda x: x.t()),
        ((1, 27, 9), (27, 12), lambda x: x[:, :9].t()),
        ((30, 27), (2, 3, 5, 27), lambda x: x.movedim(-1, 1)),
        ((10, 27), (2, 1, 5, 27), lambda x: x.movedim(-1, 1)),
        ((10, 27), (5, 2, 27), lambda x: x.permute(1, 2, 0)),  # sequences, batch in the middle
        ((2, 27, 15), (2, 27, 3, 5), lambda x: x),
        ((2, 27, 15), (2, 30, 3, 5), lambda x: x[:, :27]),
        ((2, 27, 15), (2, 27, 5, 3), lambda x: x.transpose(2, 3)),
        ((1, 27, 30), (27, 2, 15), lambda x: x.transpose(0, 1)),
        ((1, 27, 30), (27, 15, 2), lambda x: x.movedim(-1, 0)),
        ((5, 27, 6), (5, 27, 3, 2), lambda x: x.permute(3, 1, 2, 0)),
        ((1, 27, 30), (27, 3, 5, 2), lambda x: x.permute(3, 0, 1, 2)),  # images, batch innermost
        ((2, 27, 3, 5), (2, 27, 3, 6), lambda x: x[..., :5]),
        ((2, 27, 3, 5), (2, 27, 1, 5), lambda x: x.expand(2, 27, 3, 5)),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_neighbours_in_memory_are_seen_as_neighbours(seen_as, shape, lay) -> None:
    logits = lay(torch.randn(shape))
    rows = logits.shape[:1] + logits.shape[2:]
    view, chunks = chunks_of(logits, torch.randint(0, 27, rows))
    seen = view(logits)
    assert seen.shape == seen_as and seen.data_ptr() == logits.data_ptr() and len(chunks) > 1
    assert seen.stride(-1) == 1 and (seen.dim() > 3 or seen.stride(0) == max(seen.stride()))
    of_row = torch.arange(rows.numel()).view(rows)
    assert torch.equal(view.back(view(of_row)), of_row)


@pytest.mark.parametrize("log2_of_sums", [-100, -21, -19, -11, -9, 0, 23, 25, 79, 81, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_the_largest_logit_is_looked_for(log2_of_sums, dtype, monkeypatch) -> None:
    """In every chunk from the first on whose sums of powers leave the range; nowhere else."""
    monkeypatch.setattr(cross_entropy_rows, "CHUNK", 2 * 256)
    least, most = (-20, 80) if dtype.itemsize == 2 else (-10, 24)
    logits = torch.zeros(8, 256, dtype=dtype)
    logits[2:] = (log2_of_sums - 8) * math.log(2)  # all of a row alike
    with Operations(2 * 256) as operations:
        fused.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
    inside = least <= log2_of_sums <= most
    assert operations.seen["amax"] == (0 if inside else 3)
    assert operations.seen["exp2_"] == (4 if inside else 5)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_losses_of_confident_rows_keep_their_digits(kind) -> None:
    """They are small differences of logits near 14, which take none of them."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(27, (64,), generator=generator)
    logits = torch.randn(64, 27, generator=generator).scatter_(1, target[:, None], 14.0)
    exact = F.cross_entropy(logits.double(), target, reduction="none")
    if kind == "probabilities":
        target = F.one_hot(target, 27).float()
    found = fused.cross_entropy(logits, target, reduction="none")
    assert exact.max() < 1e-4
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=4e-7)


def test_losses_of_rows_that_are_nearly_impossible() -> None:
    """p is next to the least number of float32, or below it, and its logarithm no measure."""
    logits = torch.zeros(32, 27)
    logits[:, 3] = -torch.linspace(80, 120, 32)
    target = torch.full((32,), 3)
    found = fused.cross_entropy(logits, target, reduction="none")
    exact = F.cross_entropy(logits.double(), target, reduction="none")
    torch.testing.assert_close(found.double(), exact, rtol=2e-7, atol=0)


def test_upstream_gradients_are_rounded_at_the_end_alone() -> None:
    """Half precision's, which a factor follows: half a unit in the last place of the gradient."""
    logits, _, _ = example((16, 27), torch.bfloat16, "cpu")
    target = torch.zeros(16, dtype=torch.int64)
    upstream = (torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.5).bfloat16()
    gradients = []
    for leaf in (logits.requires_grad_(), logits.detach().double().requires_grad_()):
        loss = fused.cross_entropy(leaf, target, reduction="none", logit_scale=0.7)
        gradients.append(torch.autograd.grad(loss, leaf, upstream.to(loss))[0].double()[:, 1:])
    torch.testing.assert_close(*gradients, rtol=1.01 * 2**-8, atol=0)


def test_a_backward_of_1_has_nothing_left_to_do() -> None:
    logits, target, _ = example((9, 27), torch.float32, "cpu")
    leaf = logits.requires_grad_()
    for upstream, expected in ((1.0, 0), (0.5, 1)):
        loss = fused.cross_entropy(leaf, target)
        with Operations(9 * 27) as operations:
            torch.autograd.grad(loss, leaf, torch.tensor(upstream))
        assert operations.seen["mul_"] == expected


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_half_precision_have_the_digits_of_float32(dtype, kind, options) -> None:
    """Before they are rounded: those of the rows, and class weights in half precision."""
    logits, target, weight = example((9, 27), dtype, "cpu", kind, weighted=True, ignored=0)
    assert weight is not None
    found = fused.cross_entropy_with_stats(logits, target, weight, **options).row_loss
    wide = logits.double(), target if kind == "indices" else target.double(), weight.double()
    exact = fused.cross_entropy_with_stats(*wide, **options).row_loss
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)


def test_predictions_are_of_scores_and_not_of_their_powers() -> None:
    """Which may be the same number where the scores are not."""
    logits = torch.zeros(9, 27)
    logits[:, 5] = 1e-9
    stats = fused.cross_entropy_with_stats(logits, torch.full((9,), 5), logit_scale=0.5)
    assert stats.correct == 9


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"z_loss": 0.1}], ids=str)
def test_ignored_rows_have_gradient_0_whatever_the_weights(options) -> None:
    logits, target, _ = example((9, 27), torch.float32, "cpu", ignored=0)
    target[::2] = -100
    weight = torch.ones(27)
    weight[0] = float("inf")
    leaf = logits.requires_grad_()
    fused.cross_entropy(leaf, target, weight, reduction="sum", **options).backward()
    assert not leaf.grad[::2].any() and leaf.grad[1::2].any()


class Elsewhere(Tensor):
    """As if it were on a device whose values nobody may look at."""

    is_cpu = False


@pytest.mark.parametrize("numbers", [(0.0, 0.0, 0.0, 1.0), (0.1, 0.1, 3.0, 0.7)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shift", [0.0, 200.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_where_nobody_may_look(weighted, shift, reduction, numbers) -> None:
    """The numbers of the CPU, and NaN for rows whose class index is out of range, which the CPU
    refuses."""
    logits, target, weight = example((9, 27), torch.float32, "cpu", weighted=weighted)
    logits += shift
    outside = torch.tensor([0, 4, 7, 8])
    ignored = target.index_fill(0, outside, -100)
    wrong = target.index_copy(0, outside, torch.tensor([27, -1, 2**40, 31]))
    assert (ignored == -100).sum() > 4  # others are, too

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        arguments: Any = (x, y, weight, -100, reduction, *numbers, torch.float32, False)
        loss, _, scale, _ = eager.cross_entropy_fwd(*arguments)
        wants = (True, False, False)
        arguments = (torch.ones_like(loss), x, y, weight, None, scale, -100, *numbers, *wants)
        dx, _ = eager.cross_entropy_bwd(*arguments)
        assert dx is not None
        return loss.as_subclass(Tensor), dx.as_subclass(Tensor)

    elsewhere = logits.as_subclass(Elsewhere)
    with Operations(0) as operations:
        found = run(elsewhere, ignored.as_subclass(Elsewhere))
        loss, dx = run(elsewhere, wrong.as_subclass(Elsewhere))
    assert not {"_local_scalar_dense", "equal", "nonzero"} & set(operations.seen)
    torch.testing.assert_close(found, run(logits, ignored))
    rows = torch.zeros(9, dtype=torch.bool).index_fill(0, outside, True)
    assert torch.equal(loss.isnan(), rows if loss.dim() else torch.tensor(True))
    # Their factor is NaN; the mean's, over all that are not ignored, is a number.
    assert torch.equal(dx.isnan(), rows[:, None].expand(9, 27))


@pytest.mark.parametrize("upstream", [1.0, 0.3, math.inf, math.nan])
def test_upstream_gradients_where_nobody_may_look(upstream, monkeypatch) -> None:
    """What is 0, as an ignored row is, stays 0."""
    monkeypatch.setattr(eager, "_MASKED", 3)
    dx = torch.tensor([[0.0, 0.0], [0.5, -0.25], [0.0, 2.0]])
    dloss = torch.tensor(upstream)
    expected = torch.where(dx == 0, dx, dx * upstream)
    for x in (dx.clone(), dx.clone().as_subclass(Elsewhere)):
        found = eager.cross_entropy_scale(x, dloss)
        assert found.data_ptr() == x.data_ptr()
        torch.testing.assert_close(found.as_subclass(Tensor), expected, equal_nan=True)


def test_one_chunk_where_nobody_may_look() -> None:
    """A launch for each chunk would take longer than what a cache saves."""
    x, target, _ = example((9, 27), torch.float32, "cpu")
    elsewhere = x.as_subclass(Elsewhere), target.as_subclass(Elsewhere)
    rows = cross_entropy_rows.Rows.of(*elsewhere, None, -100, 0.0, 0.0, 0.0, 1.0)
    assert len(list(rows.chunks())) == 1


@pytest.mark.parametrize("largest", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"z_loss": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [(9, 27), (2, 27, 9)], ids=str)
def test_ignored_rows_are_cleared_where_weights_are_not_finite(shape, options, largest) -> None:
    """0 times the rest is 0 otherwise, in one pass less."""
    logits, target, weight = example(shape, torch.float32, "cpu", weighted=True, ignored=0.5)
    assert weight is not None
    weight[0] = largest
    logits.requires_grad_()
    with Operations(2 * 27) as operations:
        fused.cross_entropy(logits, target, weight, **options).backward()
    assert logits.grad is not None
    assert not logits.grad.movedim(1, -1)[target == -100].any()
    cleared = operations.seen["index_fill_"] + operations.seen["masked_fill_"]
    assert (cleared > 0) == (largest != 1.0)
