"""fused.vocab_parallel_cross_entropy: the numbers of one process with all of the logits.

What each process computes, and the merging, run here in one process, on both implementations; the
function itself over real processes.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

import fused
from fused import backend
from fused.cross_entropy import loss_dtype_of, options_of
from fused.eager import cross_entropy_rows
from fused.eager import vocab_parallel_cross_entropy as closed_form
from tests import processes
from tests.graphs import check_replay
from tests.test_cross_entropy import REDUCTIONS, check_against_torch, example, torchs
from tests.test_cross_entropy_closed_form import Elsewhere

LAYOUT = 2**24 - 1  # the largest number that stands for the widths of all slices
ALL = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 30.0, "logit_scale": 0.7}


class Slices(torch.autograd.Function):
    """What the processes do, one after the other."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, widths: list[int], o: Any) -> Tensor:
        ctx.kernels = backend.implementation("vocab_parallel_cross_entropy", logits)
        ctx.numbers = (o.ignore_index, o.label_smoothing, o.softcap, o.logit_scale)
        n_all = sum(widths)
        ctx.shards = [(sum(widths[:k]), n_all) for k in range(len(widths))]
        ctx.slices = [part.contiguous() for part in logits.split(widths, 1)]
        own = [
            ctx.kernels.shard_fwd(part, target, shard, LAYOUT, *ctx.numbers)
            for part, shard in zip(ctx.slices, ctx.shards, strict=True)
        ]
        loss, ctx.stats, ctx.scale = ctx.kernels.merged(
            torch.stack(own), ctx.slices[0], target, n_all, LAYOUT, o.ignore_index, o.reduction,
            o.z_loss, loss_dtype_of(logits, target, None),
        )  # fmt: skip
        ctx.target = target
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None]:
        own = [
            ctx.kernels.shard_bwd(
                dloss, part, ctx.target, shard, ctx.stats, ctx.scale, *ctx.numbers, False
            )
            for part, shard in zip(ctx.slices, ctx.shards, strict=True)
        ]
        return torch.cat(own, 1), None, None, None


def sliced(*widths: int) -> Callable[..., Tensor]:
    """The function over slices of these widths, called as cross_entropy is."""

    def function(
        logits: Tensor,
        target: Tensor,
        weight: None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> Tensor:
        options = options_of(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale)
        return Slices.apply(logits, target, list(widths), options)

    return function


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy_rows, "CHUNK", 64)


# One slice without classes; rows and classes on both sides of what one program merges (128 rows),
# of what is held (8,192 classes; 4,096 of float64), and of the edges (4,096).
CASES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((5, 12), (4, 0, 8)),
    ((129, 7), (3, 4)),
    ((3, 10, 2), (5, 5)),
    ((2, 12300), (4099, 8201)),
]


@pytest.mark.parametrize(
    "options, dtype",
    [({}, torch.float32), (ALL, torch.float64), (ALL, torch.bfloat16)],
    ids=["plain-float32", "all-float64", "all-bfloat16"],
)
@pytest.mark.parametrize("shape, widths", CASES, ids=str)
def test_matches_torch(shape, widths, options, dtype, implementation, device) -> None:
    tensors = example(shape, dtype, device)
    for reduction in REDUCTIONS if len(shape) == 3 else ["mean"]:
        check_against_torch(
            *tensors, implementation, sliced(*widths), reduction=reduction, **options
        )


@pytest.mark.parametrize("ignore_index", [0, 4, 7])
def test_ignore_index_counts_from_the_first_of_all_classes(
    ignore_index, implementation, device
) -> None:
    """Not from the first of a slice, where other classes have that place."""
    logits = torch.randn(8, 8, dtype=torch.float64, device=device)
    target = torch.arange(8, device=device)
    function = sliced(4, 4)
    check_against_torch(
        logits, target, None, implementation, function, ignore_index=ignore_index, reduction="none"
    )


@pytest.mark.parametrize(
    "target",
    [torch.tensor([156, 0, 99], dtype=torch.uint8), torch.tensor([1, -100, 99], dtype=torch.int32)],
    ids=["uint8", "int32"],
)
def test_target_dtypes(target, implementation, device) -> None:
    """As a uint8 the ignored -100 would be 156, which is a class."""
    logits = torch.randn(3, 160, device=device)
    check_against_torch(logits, target.to(device), None, implementation, sliced(90, 70))


def test_strides_of_the_target(implementation, device) -> None:
    logits, target, _ = example((3, 10, 4), torch.float32, device)
    for strided in (target.T.contiguous().T, target.repeat_interleave(2, 1)[:, ::2]):
        check_against_torch(logits, strided, None, implementation, sliced(5, 5))


NOTHING = float("-inf")


@pytest.mark.parametrize("shift", [0.0, -110.0, 3e4])
def test_masked_slices_and_extreme_logits(shift, implementation, device) -> None:
    """Loss and gradient are torch's: with a slice, a target or everything at -inf."""
    logits = torch.randn(6, 8, device=device) + shift
    logits[0, :4] = NOTHING  # the slice without the target
    logits[1, :4] = NOTHING  # the target's
    logits[2] = NOTHING
    logits[3, 6] = NOTHING  # the target alone
    logits[4, 1] += 1e4
    target = torch.tensor([6, 2, 1, 6, 1, 5], device=device)
    check_against_torch(logits, target, None, implementation, sliced(4, 4), reduction="none")


def test_confident_predictions_keep_their_gradient(implementation, device) -> None:
    """p - 1 is rounded to half precision once, whichever slice has the target."""
    logits = torch.zeros(2, 8, dtype=torch.bfloat16, device=device)
    logits[0, 1] = logits[1, 6] = 20.0
    target = torch.tensor([1, 6], device=device)
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(sliced(4, 4)(leaf, target, reduction="sum"), leaf)
    exact = torch.softmax(logits.double(), 1) - F.one_hot(target, 8)
    # In float32 p - 1 is good to 6e-8, beside 1.4e-8: a multiple of that, and not 0 in bfloat16.
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=6e-8)
    assert (found[exact > 0] > 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_and_all_ignored(reduction, implementation, device) -> None:
    for rows in (0, 3):
        logits = torch.randn(rows, 8, device=device, requires_grad=True)
        target = torch.full((rows,), -100, device=device)
        loss = sliced(4, 4)(logits, target, reduction=reduction)
        expected = F.cross_entropy(logits, target, reduction=reduction)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0, equal_nan=True)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.eq(0).all()


@pytest.mark.parametrize("outside", [-1, 8, -(2**62), 2**62])
def test_target_that_is_no_class(outside, implementation, device) -> None:
    logits = torch.randn(3, 8, device=device)
    target = torch.tensor([6, outside, 1], device=device)
    function = sliced(4, 4)
    if implementation == "eager" and device.type == "cpu":
        with pytest.raises(IndexError, match=rf"target in \[0, 8\).* got {outside} at row 1"):
            function(logits, target)
        return
    leaf = logits.clone().requires_grad_()
    loss = function(leaf, target, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist()
    assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_part_of_larger_memory(inplace, implementation, device) -> None:
    """A slice that is a view, as of a buffer for all; and its gradient in its place."""
    kernels = backend.implementation("vocab_parallel_cross_entropy", torch.empty(0, device=device))
    logits, target, _ = example((5, 12), torch.float32, device)
    numbers = (-100, 0.0, 0.0, 1.0)
    views = [logits[:, :4], logits[:, 4:]]
    own = [kernels.shard_fwd(v, target, (4 * k, 12), LAYOUT, *numbers) for k, v in enumerate(views)]
    loss, *saved = kernels.merged(
        torch.stack(own), views[0], target, 12, LAYOUT, -100, "sum", 0.0, torch.float32
    )
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, target, reduction="sum")
    torch.testing.assert_close(loss, expected.detach())
    (gradient,) = torch.autograd.grad(expected, leaf)
    for k, view in enumerate(views):
        dx = kernels.shard_bwd(
            torch.ones_like(loss), view, target, (4 * k, 12), *saved, *numbers, inplace
        )
        torch.testing.assert_close(dx, gradient[:, 4 * k : 4 * k + view.shape[1]])
        assert (dx.data_ptr() == view.data_ptr()) == inplace


def test_host_never_looks_at_values() -> None:
    """On the meta device there are none."""
    logits = torch.zeros(6, 9, 2, device="meta", requires_grad=True)
    target = torch.zeros(6, 2, dtype=torch.int64, device="meta")
    with backend.use("eager"):
        loss = sliced(4, 5)(logits, target, **ALL)
        (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.shape == logits.shape


@pytest.mark.parametrize("outside", [-1, 8, 2**62])
def test_the_closed_form_where_nobody_may_look(outside) -> None:
    """In one chunk: the numbers of the CPU, and NaN for a target that is no class."""
    logits, target, _ = example((20, 8), torch.float32, "cpu")
    wrong = target.clone()
    wrong[7], target[7] = outside, -100

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        loss = sliced(4, 4)(leaf, y, reduction="none", logit_scale=0.7)
        (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        return loss.detach().as_subclass(Tensor), gradient.as_subclass(Tensor)

    with backend.use("eager"):
        expected = run(logits, target)
        found = run(logits.as_subclass(Elsewhere), target.as_subclass(Elsewhere))
        loss, gradient = run(logits.as_subclass(Elsewhere), wrong.as_subclass(Elsewhere))
        (rows, scratch), *others = closed_form._chunks(logits.as_subclass(Elsewhere), torch.float32)
    torch.testing.assert_close(found, expected)
    row = torch.arange(20) == 7
    assert torch.equal(loss.isnan(), row)
    assert torch.equal(gradient.isnan(), row[:, None].expand(20, 8))
    assert not others and logits[rows].shape == scratch.shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_host_synchronisation(reduction, device) -> None:
    """What comes before and after the collective is captured in a CUDA graph, and replayed."""
    logits, target, _ = example((9, 37), torch.float32, device)
    logits.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = sliced(17, 20)(logits, target, reduction=reduction, **ALL)
        return loss, *torch.autograd.grad(loss, logits, torch.full_like(loss, 0.7))

    check_replay(step, [logits, target])


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_alone_it_is_cross_entropy(options, implementation, device) -> None:
    logits, target, _ = example((5, 12), torch.float32, device)
    found, expected = (
        function(logits, target, **options)
        for function in (fused.vocab_parallel_cross_entropy, fused.cross_entropy)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# mistake: (input's shape, target, options, error, message)
MISTAKES: dict[str, tuple[tuple[int, ...], Tensor, dict[str, Any], type[Exception], str]] = {
    "no batch": ((4,), torch.tensor(1), {}, RuntimeError, r"shape \(N, C\).*got \(4,\)"),
    "probabilities": ((2, 4), torch.rand(2, 4), {}, RuntimeError, "class indices.*float32"),
    "rows": ((2, 4), torch.zeros(3).long(), {}, ValueError, r"shape \(2,\)"),
    "reduction": ((2, 4), torch.zeros(2).long(), {"reduction": "all"}, ValueError, "got 'all'"),
    "widths": ((2, 4), torch.zeros(2).long(), {"widths": [3]}, ValueError, r"4 at.*\[3\]"),
    "more widths": ((2, 4), torch.zeros(2).long(), {"widths": [4, 4]}, ValueError, "1 processes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake) -> None:
    shape, target, options, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        fused.vocab_parallel_cross_entropy(torch.zeros(shape), target, **options)


# The ranks that share the logits, in a world of three; the widths of their slices; the logits'
# shape and dtype; options.
WORLD = 3
OVER_PROCESSES: list[
    tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype, dict[str, Any]]
] = [
    ((0, 1, 2), (4, 0, 5), (6, 9), torch.float32, {"label_smoothing": 0.1}),
    ((0, 1, 2), (3, 3, 3), (5, 9), torch.float64, ALL),
    ((0, 2), (4, 4), (5, 8), torch.float32, {}),
    ((0, 2), (3, 7), (3, 10, 2), torch.bfloat16, {"reduction": "none", **ALL}),
    ((0, 2), (4, 4), (5, 8), torch.float64, {"reduction": "sum", "inplace": True}),
]
COLLECTIVES = ("all_gather", "all_gather_single", "all_gather_into_tensor", "all_reduce")


def worker(rank: int, folder: str) -> None:
    """What each process runs: every case of its own, with both implementations."""
    called = processes.counted(*COLLECTIVES)
    pair = dist.new_group([0, 2])
    results: list[tuple[Tensor, Tensor, list[str]]] = []
    for ranks, widths, shape, dtype, options in OVER_PROCESSES:
        if rank not in ranks:
            continue
        logits, target, _ = example(shape, dtype, "cpu")
        for implementation in ("eager", "triton"):
            called.clear()
            leaf = logits.split(widths, 1)[ranks.index(rank)].clone().requires_grad_()
            with backend.use(implementation):
                loss = fused.vocab_parallel_cross_entropy(
                    leaf * 1,
                    target,
                    pair if len(ranks) == 2 else None,
                    widths=None if len(set(widths)) == 1 else widths,
                    **options,
                )
            (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.7))
            results.append((loss.detach(), gradient, list(called)))
    torch.save((results, errors(rank, pair)), f"{folder}/{rank}.pt")


def errors(rank: int, pair: Any) -> dict[str, str]:
    """What goes wrong in every process, and how it says so."""
    logits, target, _ = example((5, 3 + rank), torch.float32, "cpu", ignored=0)
    target, logits, widths = target % 3, logits.requires_grad_(), [3, 4, 5]
    function = fused.vocab_parallel_cross_entropy
    not_the_same = [2, 4, 6] if rank == 1 else widths  # though as many in all

    def overwritten() -> None:
        own = logits * 1
        kept = own.square().sum()
        (kept + function(own, target, widths=widths, inplace=True)).backward()

    mistakes: dict[str, Callable[[], Any]] = {
        "unequal": lambda: function(logits, target),
        "not the same": lambda: function(logits, target, widths=not_the_same),
        "outside": lambda: function(logits, target + 10, widths=widths),
        "twice": lambda: torch.autograd.grad(
            function(logits, target, widths=widths), logits, create_graph=True
        ),
        "functional": lambda: torch.func.grad(function)(logits.detach(), target, widths=widths),
        "overwritten": overwritten,
    }
    if rank == 1:
        mistakes["elsewhere"] = lambda: function(logits, target, pair)
    said = {}
    for name, mistake in mistakes.items():
        try:
            mistake()
        except (ValueError, IndexError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    with backend.use("triton"):  # as on a GPU, nobody looks
        said["kernels"] = str(function(logits, target).item())
        said["kernels, not the same"] = str(function(logits, target, widths=not_the_same).item())
    return said


SAID = {
    "unequal": "ValueError: .*expected slices of equal width.* here they make (9|12|15) classes",
    "not the same": "ValueError: .*make 12 classes, others make 12 classes at rank [01]",
    "outside": r"IndexError: .*target in \[0, 12\)",
    "twice": "RuntimeError: .*expected create_graph=False",
    "functional": "RuntimeError: .*expected no transform of torch.func",
    "overwritten": "RuntimeError: .*modified by an inplace operation",
    "elsewhere": "RuntimeError: .*expected a group that this process is one of",
    "kernels": "nan",
    "kernels, not the same": "nan",
}


def test_equals_one_process_with_all_logits(tmp_path) -> None:
    """In one spawn: a process costs seconds to start."""
    pytest.importorskip("triton")
    processes.run(worker, WORLD, tmp_path)
    found, said = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)), strict=True)

    for ranks, widths, shape, dtype, options in OVER_PROCESSES:
        logits, target, _ = example(shape, dtype, "cpu")
        leaf = logits.double().requires_grad_()
        expected = torchs(leaf, target, **{k: v for k, v in options.items() if k != "inplace"})
        (gradient,) = torch.autograd.grad(expected, leaf, torch.full_like(expected, 0.7))
        close = {
            torch.float64: {"rtol": 1e-12, "atol": 1e-12},
            torch.float32: {"rtol": 1e-5, "atol": 1e-6},
            torch.bfloat16: {"rtol": 2**-7, "atol": 2**-9},
        }[dtype]
        for _ in ("eager", "triton"):
            losses, gradients, calls = zip(*(found[rank].pop(0) for rank in ranks), strict=True)
            assert all(loss.dtype == dtype and torch.equal(loss, losses[0]) for loss in losses)
            torch.testing.assert_close(losses[0].double(), expected.detach(), **close)
            assert tuple(g.shape[1] for g in gradients) == widths
            torch.testing.assert_close(torch.cat(gradients, 1).double(), gradient, **close)
            assert all(len(called) == 1 for called in calls), calls
    for rank, by_name in enumerate(said):
        assert by_name.keys() == SAID.keys() - ({"elsewhere"} if rank != 1 else set())
        for name, message in by_name.items():
            assert re.match(SAID[name], message), (rank, name, message)


def test_one_number_for_all_widths() -> None:
    """The same without `widths` as with equal ones; another for others that are as many in all."""
    from fused.vocab_parallel_cross_entropy import _shard

    assert _shard(4, 1, 3, None) == _shard(4, 1, 3, [4, 4, 4]) and _shard(4, 1, 3, None)[0] == (
        4,
        12,
    )
    others = {_shard(4, 1, 3, [4 - k, 4, 4 + k])[1] for k in range(-4, 5)}
    assert len(others) == 9 and all(0 <= layout < 2**24 for layout in others)


def test_functional_transforms_are_refused_in_words(half_a_group) -> None:
    target = torch.tensor([0, 1])
    loss = lambda x: fused.vocab_parallel_cross_entropy(x, target)  # noqa: E731
    for transform in (torch.func.grad(loss), torch.func.jacrev(loss)):
        with pytest.raises(RuntimeError, match="expected no transform of torch.func among several"):
            transform(torch.randn(2, 4))


def test_inplace_is_seen_by_autograd(half_a_group, implementation, device) -> None:
    """The gradient takes the logits' memory: no graph that saved them may run; nor may a leaf's."""
    logits, target, _ = example((5, 4), torch.float32, device)
    leaf, function = logits.requires_grad_(), fused.vocab_parallel_cross_entropy
    with pytest.raises(RuntimeError, match="inplace=False for a leaf that requires grad"):
        function(leaf, target, inplace=True)
    with torch.no_grad():
        function(leaf, target, inplace=True)
    own = leaf * 1
    squares = own.square().sum()
    function(own, target, inplace=True).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_inplace_of_views_that_autograd_lets_nobody_change(
    half_a_group, implementation, device
) -> None:
    logits, target, _ = example((5, 4), torch.float32, device)
    leaf, found = logits.requires_grad_(), []
    for inplace in (True, False):
        views = torch.stack((leaf, leaf * 2)).unbind()
        losses = [
            fused.vocab_parallel_cross_entropy(view, target, inplace=inplace) for view in views
        ]
        found.append(torch.autograd.grad(losses[0] + losses[1], leaf))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_alone_it_takes_the_logits_memory(implementation, device) -> None:
    logits, target, _ = example((5, 4), torch.float32, device)
    own = logits.requires_grad_() * 1
    edge = get_gradient_edge(own)
    loss = fused.vocab_parallel_cross_entropy(own, target, inplace=True)
    (gradient,) = torch.autograd.grad(loss, edge)
    assert gradient.data_ptr() == own.data_ptr()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("reduction, options", [("mean", {}), ("none", ALL)], ids=["mean", "none"])
def test_compiled_without_a_break_and_with_the_bits_of_eager(
    reduction, options, half_a_group, implementation, device
) -> None:
    """Whatever the shape, which is a variable of the graph."""

    def function(x: Tensor, target: Tensor) -> Tensor:
        return fused.vocab_parallel_cross_entropy(x, target, reduction=reduction, **options)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 4, 2), (3, 7, 3)):
        logits, target, _ = example(shape, torch.float32, device)
        results = []
        for f in (function, compiled):
            leaf = logits.clone().requires_grad_()
            loss = f(leaf, target)
            results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction, half_a_group, implementation, device) -> None:
    logits, target, _ = example((3, 5, 2), torch.float32, device)
    logits = logits.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    numbers = (2, 0, 10, LAYOUT, -100, reduction, 0.1, 0.1, 3.0, 0.7, torch.float32)
    arguments = (logits, target, dist.group.WORLD.group_name, *numbers)
    torch.library.opcheck(torch.ops.fused.vocab_parallel_cross_entropy_fwd.default, arguments)
    with torch.no_grad():
        loss, stats, scale = torch.ops.fused.vocab_parallel_cross_entropy_fwd(*arguments)
    backward = (loss, logits.detach(), target, stats, scale, 0, 10, -100, 0.1, 3.0, 0.7)
    torch.library.opcheck(torch.ops.fused.vocab_parallel_cross_entropy_bwd.default, backward)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("loss_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_a_graph_expects_of_half_precision(
    loss_dtype, half_a_group, implementation, device
) -> None:
    """Statistics in float32 whatever the logits are; of the loss the dtype is given (autocast)."""
    logits, target, _ = example((3, 5, 2), torch.bfloat16, device)
    numbers = (2, 0, 10, LAYOUT, -100, "mean", 0.1, 0.1, 3.0, 0.7, loss_dtype)
    arguments = (logits, target, dist.group.WORLD.group_name, *numbers)
    operator = torch.ops.fused.vocab_parallel_cross_entropy_fwd.default
    torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_among_half_of_the_processes(device) -> None:
    """A graph, too, gathers as many shards as its own group has."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        half = dist.new_group([0, 1])
        logits, target, _ = example((5, 4), torch.float32, device)
        function = partial(fused.vocab_parallel_cross_entropy, group=half)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, target), function(logits, target))
    finally:
        dist.destroy_process_group()
