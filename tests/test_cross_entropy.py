"""fused.cross_entropy on the closed forms and on the Triton kernels, against torch's."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

import fused
from fused.eager import cross_entropy as eager
from fused.eager import cross_entropy_rows, cross_entropy_small, layout
from fused.kernels import tuning
from tests.exactness import PHASES, assert_as_exact_as, ulps_for

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
# On both sides of every threshold of kernels/tuning.py: what one program holds, and so one launch
# computes (32 rows); several rows a program (128 classes), and several threads a row (3 classes or
# more, which are no groups of 16 bytes); rows that are held (8,192 classes, 4,096 of float64), with
# and without edges (from 4,096 classes on).
SHAPES = [
    *[(1, 27), (5, 1), (70, 3), (32, 27), (33, 27), (70, 8), (33, 127), (9, 129)],
    *[(2, 4096), (2, 4097), (2, 8192), (2, 8201)],
]
EXTRAS = ("z_loss", "softcap", "logit_scale")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form itself, in several chunks, in shapes that one or torch's own would serve."""
    monkeypatch.setattr(cross_entropy_small, "SMALL", 0)
    monkeypatch.setattr(cross_entropy_rows, "CHUNK", 128)
    monkeypatch.setattr(layout, "LEAST_POSITIONS", 2)


def example(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    kind: str = "indices",
    weighted: bool = False,
    ignored: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logits, target, weight); `kind` is "indices" or "probabilities"."""
    generator = torch.Generator().manual_seed(hash(shape) % 2**31)
    logits = (torch.randn(shape, generator=generator) * 3).to(dtype)
    classes = shape[min(1, len(shape) - 1)]
    if kind == "indices":
        rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
        target = torch.randint(0, classes, rows, generator=generator)
        target[torch.rand(rows, generator=generator) < ignored] = -100
    else:
        target = torch.rand(shape, generator=generator).softmax(min(1, len(shape) - 1)).to(dtype)
    weight = (torch.rand(classes, generator=generator) + 0.5).to(device, dtype)
    return logits.to(device), target.to(device), weight if weighted else None


def torchs(logits: Tensor, target: Tensor, weight: Tensor | None = None, **options) -> Tensor:
    """F.cross_entropy, with our extra options by composition."""
    if not any(name in options for name in EXTRAS):
        target = target if target.is_floating_point() else target.long()
        return F.cross_entropy(logits, target, weight, **options)
    no_batch = logits.dim() == 1
    if no_batch:
        logits, target = logits.unsqueeze(0), target.unsqueeze(0)
    loss = eager.cross_entropy_composed(
        logits,
        target,
        weight,
        options.get("ignore_index", -100),
        options.get("reduction", "mean"),
        options.get("label_smoothing", 0.0),
        options.get("z_loss", 0.0),
        options.get("softcap") or 0.0,
        options.get("logit_scale", 1.0),
        logits.dtype,
        False,
    )[0]
    return loss.squeeze(0) if no_batch and loss.dim() else loss


def size_of_terms(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int = -100,
    reduction: str = "mean",
    logit_scale: float = 1.0,
    **_: Any,
) -> float:
    """How large the terms are whose difference is dinput: a row's weight in the loss, times p."""
    dim = min(1, logits.dim() - 1)
    w = torch.ones(logits.shape[dim]) if weight is None else weight.double().cpu()
    parts = 1.0
    if reduction == "mean" and target.is_floating_point():
        parts = logits.numel() / logits.shape[dim]
    elif reduction == "mean":
        counted = target.cpu()[target.cpu() != ignore_index].long()
        parts = w[counted].sum().abs().item()
    return logit_scale * w.abs().max().item() / parts if parts else 0.0


def check_against_torch(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    implementation: str,
    function: Callable[..., Tensor] = fused.cross_entropy,
    **options: Any,
) -> None:
    """Loss and gradients, with a random upstream gradient, are as exact as torch's."""
    soft = target.is_floating_point()

    def run(function, convert) -> tuple[Tensor, ...]:
        leaves = [convert(logits.detach()).requires_grad_()]
        t, w = target, weight
        if soft:
            t = convert(target.detach()).requires_grad_()
            leaves.append(t)
        if weight is not None:
            w = convert(weight.detach())
            if soft:
                leaves.append(w.requires_grad_())
        loss = function(leaves[0], t, w, **options)
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(loss.shape, generator=generator).to(loss)
        return loss, *torch.autograd.grad(loss, leaves, upstream)

    ours = run(function, lambda t: t.clone() if t.is_contiguous() else t.detach())
    theirs = run(torchs, torch.clone)
    exact = run(torchs, torch.Tensor.double)
    ulps = ulps_for(logits.dtype, implementation)
    scale = size_of_terms(logits, target, weight, **options)
    names = ("loss", "dinput", *(["dtarget"] if soft else []), "dweight")
    # A row's loss is log s - (z_y - m), with s at least 1: of a confident row's little is left.
    reduced = options.get("reduction", "mean") != "none"
    rows = logits.numel() // logits.shape[min(1, logits.dim() - 1)] if reduced else 1
    least_of = {"dinput": scale, "loss": scale * rows / options.get("logit_scale", 1.0)}
    for name, a, b, c in zip(names, ours, theirs, exact, strict=False):
        least = least_of.get(name, 0.0)
        size = max(least, c.detach()[c.isfinite()].abs().max().item()) if c.isfinite().any() else 1
        # Sums over classes (a row's loss) and rows (the mean's, dweight's) round once more each.
        assert_as_exact_as(a, b, c, ulps=2 * ulps, scale=size, what=name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(shape, dtype, reduction, implementation, device) -> None:
    check_against_torch(*example(shape, dtype, device), implementation, reduction=reduction)


def test_more_rows_than_each_program_counts(implementation, device) -> None:
    check_against_torch(*example((4097, 8), torch.float32, device, weighted=True), implementation)


@pytest.mark.parametrize("weighted", [False, True])
def test_many_more_rows_than_each_program_counts(
    weighted, implementation, monkeypatch, device
) -> None:
    """Two programs count them, and three add up; who adds up their sums takes two at a time."""
    monkeypatch.setattr(tuning, "INTERPRETED_PROGRAMS", 3)
    monkeypatch.setattr(tuning, "scan", lambda n: 2)
    check_against_torch(
        *example((8201, 2), torch.float32, device, weighted=weighted), implementation
    )


@pytest.mark.parametrize("options, dtype", [("plain", torch.float32), ("all", torch.bfloat16)])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 40, 3)], ids=str)
def test_gradient_in_the_forward_is_the_backwards(
    shape, dtype, options, implementation, device
) -> None:
    """To the last bit, where the upstream gradient is 1; and so in a second run."""
    logits, target, weight = example(shape, dtype, device, weighted=options == "all")
    numbers = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.7}
    logits.requires_grad_()
    results = []
    for grad_in_forward in (True, False, True):
        loss = fused.cross_entropy(
            logits, target, weight, grad_in_forward=grad_in_forward,
            **numbers if options == "all" else {},
        )  # fmt: skip
        results.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0, equal_nan=True)


# (shape, options, upstream gradient): the launches of forward and backward
LAUNCHES: list[tuple[tuple[int, int], dict[str, Any], list[str], list[str]]] = [
    ((32, 27), {}, ["fwd"], ["scale"]),
    ((33, 27), {}, ["fwd", "sum"], ["scale"]),
    ((4097, 8), {}, ["count", "fwd", "sum"], ["scale"]),
    ((4097, 8), {"reduction": "sum"}, ["fwd", "sum"], ["scale"]),
    ((32, 27), {"reduction": "none"}, ["fwd"], ["bwd"]),
    ((32, 27), {"grad_in_forward": False}, ["fwd"], ["bwd"]),
]


@pytest.mark.parametrize("shape, options, forward, backward", LAUNCHES, ids=str)
def test_launches(shape, options, forward, backward, monkeypatch, device) -> None:
    kernels = pytest.importorskip("fused.kernels.cross_entropy")
    launched: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for name, kernel in list(vars(kernels).items()):
        if name.endswith("_kernel"):
            short = name.removeprefix("_cross_entropy_").removesuffix("_kernel")
            monkeypatch.setattr(kernels, name, Counted(short, kernel))
    logits, target, _ = example(shape, torch.float32, device)
    with fused.backend.use("triton"):
        loss = fused.cross_entropy(logits.requires_grad_(), target, **options)
        assert launched == forward
        loss.backward(torch.ones_like(loss))
    assert launched == forward + backward


def test_sums_of_many_classes_are_exact() -> None:
    """Torch's softmax adds one element after the other: 7e-6 here."""
    logits = torch.randn(64, 32000, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = 20.0
    exact = logits.double().softmax(1)
    leaf = logits.requires_grad_()
    with fused.backend.use("eager"):
        fused.cross_entropy(leaf, torch.zeros(64, dtype=torch.int64), reduction="sum").backward()
    assert leaf.grad is not None
    error = (leaf.grad - exact)[:, 5].abs().max()
    assert error < 1e-6, error


class LargeResults(TorchDispatchMode):
    """Counts new tensors of at least so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.seen = elements, set[int]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and tensor.numel() >= self.elements:
                self.seen.add(tensor.data_ptr())
        return result


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_memory_but_the_gradients(dtype, inplace, monkeypatch, device) -> None:
    """Nothing else of half the logits' size, with the closed form in chunks."""
    monkeypatch.setattr(cross_entropy_rows, "CHUNK", 8 * 300)
    leaf, target, weight = example((64, 300), dtype, "cpu", weighted=True)
    logits = leaf.requires_grad_() * 1
    edge = get_gradient_edge(logits)
    with fused.backend.use("eager"), LargeResults(leaf.numel() // 2) as large:
        loss = fused.cross_entropy(
            logits, target, weight, inplace=inplace, label_smoothing=0.1, z_loss=0.1, softcap=9.0
        )
        (gradient,) = torch.autograd.grad(loss, edge)
    assert large.seen - {logits.data_ptr()} == (set() if inplace else {gradient.data_ptr()})
    with fused.backend.use("eager"), LargeResults(leaf.numel() // 2) as large, torch.no_grad():
        fused.cross_entropy(leaf, target, weight, label_smoothing=0.1, softcap=9.0)
    assert not large.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(27,), (32, 27), (2, 27, 3)], ids=str)
def test_small_calls_on_a_cpu_are_torchs(shape, reduction, dtype, monkeypatch) -> None:
    """In float32, so that nothing is rounded before the end."""
    monkeypatch.undo()
    logits, target, _ = example(shape, dtype, "cpu")
    target, options = target.clamp(min=0), {"reduction": reduction, "ignore_index": 0}
    ours, theirs = logits.clone().requires_grad_(), logits.float().requires_grad_()
    with fused.backend.use("eager"):
        loss = fused.cross_entropy(ours, target, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fused.cross_entropy(ours, target, **options).dtype == torch.float32
    expected = F.cross_entropy(theirs, target, **options)
    assert type(loss.grad_fn).__name__ != "CrossEntropyFunctionBackward"
    torch.testing.assert_close(loss, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
    loss.backward(torch.ones_like(loss))
    expected.backward(torch.ones_like(expected))
    torch.testing.assert_close(ours.grad, theirs.grad.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(1, 27), (33, 27), (2, 27, 3), (2, 9, 3, 2), (2, 3, 2, 1, 3)])
def test_gradient_of_small_calls_without_autograd(shape, reduction, dtype, monkeypatch) -> None:
    """To the last bit what autograd finds; also where every row is ignored."""
    monkeypatch.undo()
    for ignore_index in (0, -100):
        logits, target, _ = example(shape, dtype, "cpu", ignored=0)
        target = target.clamp(min=0) if ignore_index == 0 else torch.full_like(target, -100)
        leaf = logits.clone().requires_grad_()
        with fused.backend.use("eager"):
            loss = fused.cross_entropy(leaf, target, None, ignore_index, reduction)
        upstream = torch.randn_like(loss)
        (expected,) = torch.autograd.grad(loss, leaf, upstream)
        found = cross_entropy_small.cross_entropy_small_bwd(
            upstream, logits, target, ignore_index, reduction
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_gradient_of_small_calls_that_ignore_what_is_no_class() -> None:
    logits, target, _ = example((9, 27), torch.float32, "cpu", ignored=0)
    target[::2] = 1000
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(leaf, target, ignore_index=1000), leaf)
    found = cross_entropy_small.cross_entropy_small_bwd(
        torch.ones(()), logits, target, 1000, "mean"
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "option", [{"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 3.0}, {"logit_scale": 0.5}]
)
def test_small_calls_with_an_option_are_ours(option, monkeypatch) -> None:
    monkeypatch.undo()
    logits, target, _ = example((9, 27), torch.float32, "cpu")
    with fused.backend.use("eager"):
        loss = fused.cross_entropy(logits, target, **option)
    torch.testing.assert_close(loss, torchs(logits, target, **option))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_small_calls_that_torchs_own_does_not_serve(monkeypatch) -> None:
    """Other dtypes; where the kernels are asked for; a graph, which they may replay."""
    monkeypatch.undo()
    logits, target, _ = example((9, 27), torch.float32, "cpu")
    with fused.backend.use("eager"):
        for dtype in (torch.int32, torch.uint8):
            others = target.clamp(min=0).to(dtype), target.clamp(min=0)
            same = (fused.cross_entropy(logits, t, ignore_index=0) for t in others)
            torch.testing.assert_close(*same)
        wide = logits.double(), target
        both = fused.cross_entropy(*wide), F.cross_entropy(*wide)
        torch.testing.assert_close(*both, rtol=1e-12, atol=0)
        with pytest.raises(RuntimeError, match="index 31 is out of bounds"):  # as of torch
            torch.func.vmap(fused.cross_entropy)(logits.unsqueeze(0), target.unsqueeze(0) * 0 + 31)
    if not torch.cuda.is_available():
        with fused.backend.use("triton"):
            loss = fused.cross_entropy(logits.clone().requires_grad_(), target)
        assert type(loss.grad_fn).__name__ == "CrossEntropyFunctionBackward"
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch.compile(fused.cross_entropy, fullgraph=True, backend=backend)(logits, target)
    assert "torch.ops.fused.cross_entropy_fwd" in graphs[0]


OPTIONS = list(itertools.product(["indices", "probabilities"], [False, True], [0.0, 0.1, 1.0]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind, weighted, label_smoothing", OPTIONS)
@pytest.mark.parametrize("shape", [(7,), (9, 27), (2, 5, 3), (2, 5, 2, 3), (1, 2100)], ids=str)
def test_all_options_together(
    shape, kind, weighted, label_smoothing, reduction, implementation, device
) -> None:
    tensors = example(shape, torch.float32, device, kind, weighted)
    check_against_torch(
        *tensors, implementation, reduction=reduction, label_smoothing=label_smoothing
    )


@pytest.mark.parametrize("wants", [*itertools.product([False, True], repeat=3)][1:], ids=str)
def test_gradients_of_what_requires_one(wants, implementation, device) -> None:
    """Of logits, probabilities and class weights, in every combination."""
    tensors = example((9, 27), torch.float32, device, "probabilities", weighted=True)
    found = []
    for function in (fused.cross_entropy, F.cross_entropy):
        leaves = [t.clone().requires_grad_(want) for t, want in zip(tensors, wants, strict=True)]
        function(leaves[0], leaves[1], leaves[2], label_smoothing=0.1).backward()
        found.append([t.grad for t in leaves])
    for ours, theirs, want in zip(*found, wants, strict=True):
        assert (ours is not None) == want
        if want:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_options_in_every_dtype(kind, dtype, implementation, device) -> None:
    tensors = example((5, 9, 3), dtype, device, kind, True)
    check_against_torch(*tensors, implementation, label_smoothing=0.1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize(
    "extra",
    [
        {"z_loss": 1e-2},
        {"softcap": 3.0},
        {"logit_scale": 0.5},
        {"z_loss": 1e-2, "softcap": 30.0, "logit_scale": 1.7, "label_smoothing": 0.1},
    ],
    ids=lambda extra: "+".join(extra),
)
def test_extras(extra, kind, reduction, implementation, device) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensors = example((5, 130), dtype, device, kind, weighted=True)
        check_against_torch(*tensors, implementation, reduction=reduction, **extra)


@pytest.mark.parametrize("softcap", [1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("wide", [torch.float16, torch.float32, torch.float64], ids=str)
def test_cap_of_half_precision(wide, softcap, implementation, device) -> None:
    """As exact as results are that may be wider than the logits."""
    logits, target, _ = example((9, 27), torch.float16, device, "probabilities")
    target = target.to(wide).requires_grad_()
    dtype = torch.float32 if wide == torch.float16 else wide
    found = []
    for x, t in ((logits, target), (logits.to(dtype), target), (logits.double(), target.double())):
        function = fused.cross_entropy if x is logits else torchs
        loss = function(x, t, softcap=softcap).to(wide if t is target else torch.float64)
        found.append((loss, *torch.autograd.grad(loss, t)))
    for ours, theirs, exact, what in zip(*found, ("loss", "dtarget"), strict=True):
        ulps = 2 * ulps_for(wide, implementation)
        assert_as_exact_as(ours, theirs, exact, ulps=ulps, what=what)


def test_cap_of_half_precision_under_autocast(implementation, device) -> None:
    """Of bfloat16 logits, too, the loss is in float32."""
    logits, target, _ = example((70, 3), torch.bfloat16, device, ignored=0)
    options = {"softcap": 30.0, "reduction": "none"}
    with torch.autocast(device.type, torch.bfloat16):
        ours = fused.cross_entropy(logits, target, **options)
    theirs, exact = (torchs(x, target, **options) for x in (logits.float(), logits.double()))
    assert_as_exact_as(
        ours, theirs, exact, scale=1.0, ulps=2 * ulps_for(ours.dtype, implementation)
    )


def test_extras_by_their_formulas(implementation, device) -> None:
    logits, target, _ = example((5, 27), torch.float64, device, ignored=0)
    for scale, cap in ((0.7, 3.0), (-0.7, None)):
        z = scale * logits if cap is None else cap * torch.tanh(scale * logits / cap)
        lse = z.logsumexp(1)
        expected = (lse - z[range(5), target] + 0.1 * lse**2).mean()
        loss = fused.cross_entropy(logits, target, z_loss=0.1, softcap=cap, logit_scale=scale)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(7,), (9, 300), (2, 8201), (2, 5, 3)], ids=str)
def test_stats(shape, reduction, kind, implementation, device) -> None:
    logits, target, weight = example(shape, torch.float32, device, kind, weighted=True)
    logits.requires_grad_()
    options = {"weight": weight, "reduction": reduction}
    output = fused.cross_entropy_with_stats(logits, target, **options)
    dim = min(1, logits.dim() - 1)
    torch.testing.assert_close(output.loss, fused.cross_entropy(logits, target, **options))
    rows = F.cross_entropy(logits, target, weight, reduction="none")
    torch.testing.assert_close(output.row_loss, rows.detach())
    soft = target.is_floating_point()
    counted = torch.ones_like(rows, dtype=torch.bool) if soft else target != -100
    lse = torch.where(counted, logits.detach().logsumexp(dim), 0.0)
    torch.testing.assert_close(output.lse, lse)
    hit = counted & (logits.argmax(dim) == (target.argmax(dim) if soft else target))
    assert output.correct.dtype == torch.int64 and output.correct.shape == ()
    assert output.correct == hit.sum()
    prediction = torch.where(counted, logits.detach().argmax(dim), -1)
    torch.testing.assert_close(output.prediction, prediction)
    assert [t.requires_grad for t in output] == [True, False, False, False, False]


@pytest.mark.parametrize("classes", [2100, 8201])
def test_first_of_several_largest_logits_is_the_prediction(classes, implementation, device) -> None:
    logits = torch.zeros(3, classes, device=device)
    logits[:, [5, 9, classes - 1]] = 1.0
    target = torch.tensor([5, 9, classes - 1], device=device)
    assert fused.cross_entropy_with_stats(logits, target).correct == 1
    assert fused.cross_entropy_with_stats(logits, target).prediction.tolist() == [5, 5, 5]


def test_prediction_is_that_of_the_scores(implementation, device) -> None:
    """A negative scale turns the order round; a cap makes equals of what it saturates."""
    logits = torch.tensor([[1.0, 500.0, -2.0, 900.0]], device=device)
    target = torch.tensor([0], device=device)
    for options, best in (({}, 3), ({"logit_scale": -1.0}, 2), ({"softcap": 2.0}, 1)):
        stats = fused.cross_entropy_with_stats(logits, target, **options)
        assert stats.prediction.tolist() == [best]


@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's
@pytest.mark.parametrize("shape", [(4, 27), (4, 8201), (4, 300, 3)], ids=str)
def test_prediction_beside_a_nan_is_a_class(shape, implementation, device) -> None:
    logits, target, _ = example(shape, torch.float32, device, ignored=0)
    logits[0] = logits[1, 0] = logits[2, -1] = float("nan")
    prediction = fused.cross_entropy_with_stats(logits, target).prediction
    assert (prediction >= 0).all() and (prediction < shape[1]).all()
    torch.testing.assert_close(prediction[3], logits[3].argmax(0))


@pytest.mark.parametrize("ignore_index", [-1, 2])
def test_prediction_of_ignored_rows(ignore_index, implementation, device) -> None:
    """Is -1, which counts as no hit where that is what ignored rows have for a target."""
    logits = torch.eye(3, device=device)
    target = torch.tensor([0, ignore_index, 1], device=device)
    stats = fused.cross_entropy_with_stats(logits, target, ignore_index=ignore_index)
    assert stats.prediction.tolist() == [0, -1, 2] and stats.correct == 1


def test_notebook_gradient_within_1e_8(implementation, device) -> None:
    """At the notebook's shape in float32, dlogits is within 1e-8 of autograd's."""
    logits, target, _ = example((32, 27), torch.float32, device, ignored=0)
    ours, theirs = logits.requires_grad_(), logits.detach().clone().requires_grad_()
    fused.cross_entropy(ours, target).backward()
    (-theirs.log_softmax(1)[range(32), target].mean()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-8)


def test_module(implementation, device) -> None:
    logits, target, weight = example((9, 27), torch.float32, device, weighted=True, ignored=0)
    ours = fused.CrossEntropyLoss(weight, ignore_index=3, reduction="sum", label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(weight, ignore_index=3, reduction="sum", label_smoothing=0.1)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))
    ours.load_state_dict(theirs.state_dict())
    with pytest.warns(UserWarning, match="deprecated"):
        assert fused.CrossEntropyLoss(size_average=False).reduction == "sum"
    capped = fused.CrossEntropyLoss(softcap=3.0, z_loss=0.1, logit_scale=0.5, grad_in_forward=False)
    assert not capped.grad_in_forward and ours.grad_in_forward
    expected = fused.cross_entropy(logits, target, softcap=3.0, z_loss=0.1, logit_scale=0.5)
    torch.testing.assert_close(capped(logits, target), expected)


def test_module_shows_its_options() -> None:
    """Torch's shows none."""
    assert repr(fused.CrossEntropyLoss()) == "CrossEntropyLoss()"
    module = fused.CrossEntropyLoss(ignore_index=3, label_smoothing=0.1, z_loss=0.1, softcap=30.0)
    assert repr(module) == (
        "CrossEntropyLoss(ignore_index=3, label_smoothing=0.1, z_loss=0.1, softcap=30.0)"
    )
    module = fused.CrossEntropyLoss(
        reduction="sum", logit_scale=0.5, inplace=True, grad_in_forward=False
    )
    assert repr(module) == (
        "CrossEntropyLoss(reduction='sum', logit_scale=0.5, inplace=True, grad_in_forward=False)"
    )


@st.composite
def calls(draw) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Shapes, strides, dtypes and options of a call that torch accepts."""
    dims = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(1, 40 if i == 1 else 4)) for i in range(dims))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["indices", "probabilities"]))
    logits, target, weight = example(shape, dtype, "cpu", kind, draw(st.booleans()))
    order = draw(st.permutations(range(dims)))
    back = [order.index(i) for i in range(dims)]
    logits = logits.permute(order).contiguous().permute(back)
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(REDUCTIONS))}
    if draw(st.booleans()):
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 0.9]))
    if draw(st.booleans()):
        options["z_loss"] = draw(st.sampled_from([1e-4, 1e-1]))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([2.0, 30.0]))
    if draw(st.booleans()):
        options["logit_scale"] = draw(st.sampled_from([0.3, 2.0]))
    if kind == "indices":
        dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
        options["ignore_index"] = draw(
            st.sampled_from([0, 3] if dtype == torch.uint8 else [-100, 0])
        )
        target = target.masked_fill(target == -100, options["ignore_index"]).to(dtype)
    order = draw(st.permutations(range(target.dim())))
    back = [order.index(i) for i in range(target.dim())]
    return logits, target.permute(order).contiguous().permute(back), weight, options


@settings(
    max_examples=100,
    phases=PHASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(call=calls(), grad_in_forward=st.booleans())
def test_any_call(call, grad_in_forward, implementation, device) -> None:
    logits, target, weight, options = call
    weight = None if weight is None else weight.to(device)
    function = functools.partial(fused.cross_entropy, grad_in_forward=grad_in_forward)
    check_against_torch(
        logits.to(device), target.to(device), weight, implementation, function, **options
    )
