"""fused.linear_cross_entropy, in one chunk and in several, against F.linear and F.cross_entropy."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused
from fused.eager.linear_cross_entropy import Problem, chunk_rows
from tests import test_cross_entropy_pitfalls as pitfalls
from tests.exactness import assert_as_exact_as, ulps_for
from tests.graphs import check_replay
from tests.test_cross_entropy import DTYPES, REDUCTIONS, torchs

D = 16
INF = float("inf")
EXTRAS = {"z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.7}

needs_torchs_own = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch has it from 2.13 on"
)


def example(
    n: int,
    classes: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    kind: str = "indices",
    ignored: float = 0.2,
    features: int = D,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input, linear_weight, linear_bias, target)."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, features, generator=generator)
    w = torch.randn(*classes, features, generator=generator) / 2
    b = torch.randn(classes, generator=generator)
    if kind == "indices":
        rows = (n, *classes[1:])
        target = torch.randint(0, classes[0], rows, generator=generator)
        target[torch.rand(rows, generator=generator) < ignored] = -100
    else:
        target = torch.rand(n, *classes, generator=generator).softmax(1).to(dtype)
    x, w, b, target = (t.to(device) for t in (x.to(dtype), w.to(dtype), b.to(dtype), target))
    return x, w, b, target


def unfused(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    b = None if b is None else b.reshape(-1)
    logits = F.linear(x, w.flatten(0, -2), b).view(*x.shape[:-1], *w.shape[:-1])
    return torchs(logits, target, **options)


def three_rows(w: Tensor) -> int:
    """A budget that holds three rows of logits."""
    return 3 * w.shape[:-1].numel() * w.dtype.itemsize


def check_against_torch(
    tensors: tuple[Tensor, ...], implementation: str, budget: int | None, **options: Any
) -> None:
    """Loss and gradients, with a random upstream gradient, are as exact as torch's."""
    x, w, b, target = tensors

    def run(function, convert) -> tuple[Tensor, ...]:
        leaves = [convert(t.detach()).requires_grad_() for t in (x, w, b)]
        t = convert(target) if target.is_floating_point() else target
        loss = function(*leaves, t)
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss)
        return loss, *torch.autograd.grad(loss, leaves, upstream)

    def ours(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return fused.linear_cross_entropy(
            x, w, t, linear_bias=b, memory_budget_bytes=budget, **options
        )

    def theirs(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return unfused(x, w, b, t, **options)

    results = zip(
        ("loss", "dx", "dw", "db"),
        run(ours, torch.clone),
        run(theirs, torch.clone),
        run(theirs, torch.Tensor.double),
        strict=True,
    )
    ulps = 2 * ulps_for(x.dtype, implementation)  # the gradients are scaled once more
    for name, a, expected, exact in results:
        # Sums over classes or rows, of terms that cancel, around the largest of the result.
        assert_as_exact_as(a, expected, exact, ulps=ulps, what=name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [(27,), (5, 2)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_matches_torch(kind, classes, dtype, reduction, implementation, device) -> None:
    tensors = example(8, classes, dtype, device, kind)
    for budget in (None, three_rows(tensors[1])):
        check_against_torch(tensors, implementation, budget, reduction=reduction)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_options_together(reduction, kind, implementation, device) -> None:
    tensors = example(8, (27,), torch.float32, device, kind)
    weight = torch.linspace(0.5, 1.5, 27, device=device)
    options = dict(EXTRAS, reduction=reduction, label_smoothing=0.1, weight=weight)
    for budget in (None, three_rows(tensors[1])):
        check_against_torch(tensors, implementation, budget, **options)


def masked_by_the_bias(implementation: str, device: torch.device) -> None:
    x, w, b, target = example(8, (300,), torch.float32, device)
    b[:260], target[target >= 0] = -INF, 290
    for budget in (None, three_rows(w)):
        check_against_torch((x, w, b, target), implementation, budget)


def target_of_minus_infinity(implementation: str, device: torch.device) -> None:
    """Its loss is an infinity, and what it sends back is finite."""
    for classes in ((27,), (5, 2)):
        x, w, b, target = example(8, classes, torch.float32, device, ignored=0)
        b[target[3]] = -INF
        for budget, reduction in itertools.product((None, three_rows(w)), ("mean", "none")):
            check_against_torch((x, w, b, target), implementation, budget, reduction=reduction)


def rows_of_minus_infinity(implementation: str, device: torch.device) -> None:
    """All rows, and every other one of those of a loss of one dimension."""
    for classes, where in (((27,), slice(None)), ((5, 2), (slice(None), 1))):
        x, w, b, target = example(8, classes, torch.float32, device, ignored=0)
        b[where] = -INF
        for budget, reduction in itertools.product((None, three_rows(w)), ("mean", "none")):
            check_against_torch((x, w, b, target), implementation, budget, reduction=reduction)


# Tests of cross_entropy's pitfalls, and the arguments to call them with.
PITFALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "upstream, mean": (pitfalls.test_upstream_gradient_other_than_1, {"reduction": "mean"}),
    "upstream, none": (pitfalls.test_upstream_gradient_other_than_1, {"reduction": "none"}),
    "upstream of stride 0": (pitfalls.test_upstream_gradient_of_stride_0, {"shape": (9, 27)}),
    "upstream of stride 0, of images": (
        pitfalls.test_upstream_gradient_of_stride_0,
        {"shape": (3, 27, 4)},
    ),
    "upstream not contiguous": (pitfalls.test_upstream_gradient_that_is_not_contiguous, {}),
    "input unchanged": (pitfalls.test_logits_are_never_changed, {}),
    "near -110": (pitfalls.test_extreme_logits, {"extreme": "all near -110", "kind": "indices"}),
    "near 3e4": (pitfalls.test_extreme_logits, {"extreme": "all near 3e4", "kind": "indices"}),
    "one 1e4 above": (
        pitfalls.test_extreme_logits,
        {"extreme": "one 1e4 above", "kind": "indices"},
    ),
    "1128 classes": (pitfalls.test_classes_that_are_no_multiple_of_a_block, {"classes": 1128}),
    "ignored rows": (
        pitfalls.test_ignored_rows_have_loss_and_gradient_0,
        {"reduction": "mean", "label_smoothing": 0.1, "upstream": 1.0, "dtype": torch.float32},
    ),
    "ignored rows, bfloat16": (
        pitfalls.test_ignored_rows_have_loss_and_gradient_0,
        {"reduction": "mean", "label_smoothing": 0.0, "upstream": 1.0, "dtype": torch.bfloat16},
    ),
    "all ignored": (
        pitfalls.test_all_rows_ignored,
        {"reduction": "mean", "label_smoothing": 0.0},
    ),
    "total weight 0": (
        pitfalls.test_total_weight_0,
        {"others": 1.0, "label_smoothing": 0.1},
    ),
    "float16": (pitfalls.test_float16_gradients_do_not_flush_to_zero, {}),
    "confident": (pitfalls.test_confident_predictions_keep_their_gradient, {}),
    "log-sum-exp in float32": (pitfalls.test_log_sum_exp_is_kept_in_float32, {}),
    "masked": (masked_by_the_bias, {}),
    "masked target": (target_of_minus_infinity, {}),
    "masked rows": (rows_of_minus_infinity, {}),
}


@pytest.mark.parametrize("pitfall", PITFALLS)
def test_pitfalls_of_cross_entropy(pitfall, implementation, device, monkeypatch) -> None:
    """The same tests, with the logits as input and the identity as linear weight."""

    def through_linear(function: Any) -> Any:
        def call(x: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Any:
            features = x.shape[1:].numel()
            eye = torch.eye(features, dtype=x.dtype, device=x.device).view(*x.shape[1:], -1)
            return function(x.flatten(1), eye, target, weight=weight, **options)

        return call

    for name in ("cross_entropy", "cross_entropy_with_stats"):
        monkeypatch.setattr(fused, name, through_linear(getattr(fused, f"linear_{name}")))
    test, arguments = PITFALLS[pitfall]
    test(**arguments, implementation=implementation, device=device)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("budget", [None, 3 * 27 * 4])
def test_stats_are_those_of_cross_entropy(budget, reduction, implementation, device) -> None:
    x, w, b, target = example(8, (27,), torch.float32, device)
    target[::2] = F.linear(x, w, b)[::2].argmax(1)  # some are right, in every chunk
    weight = torch.linspace(0.5, 1.5, 27, device=device)
    options = {"reduction": reduction, "weight": weight, "label_smoothing": 0.1, **EXTRAS}
    ours = fused.linear_cross_entropy_with_stats(
        x, w.requires_grad_(), target, linear_bias=b, memory_budget_bytes=budget, **options
    )
    expected = fused.cross_entropy_with_stats(F.linear(x, w, b), target, **options)
    torch.testing.assert_close(tuple(ours), tuple(expected))
    assert [t.requires_grad for t in ours] == [True, False, False, False, False]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_a_batch(reduction, implementation, device) -> None:
    x, w, b, _ = example(1, (27,), torch.float32, device)
    options = {"linear_bias": b, "reduction": reduction}
    one = torch.tensor(3, device=device)
    ours = fused.linear_cross_entropy_with_stats(x[0], w, one, **options)
    expected = fused.linear_cross_entropy_with_stats(x, w, one.unsqueeze(0), **options)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b.squeeze(), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch(reduction, implementation, device) -> None:
    x, w, b, target = example(0, (27,), torch.float32, device)
    check = [t.requires_grad_() for t in (x, w, b)]
    loss = fused.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
    expected = unfused(x, w, b, target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    gradients = torch.autograd.grad(loss, check, torch.ones_like(loss))
    assert [g.shape for g in gradients] == [t.shape for t in check]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_rows_ignored(reduction, dtype, implementation, device) -> None:
    x, w, b, target = example(8, (27,), dtype, device, ignored=2.0)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    for budget in (None, three_rows(w)):
        loss = fused.linear_cross_entropy(
            x, w, target, linear_bias=b, reduction=reduction, memory_budget_bytes=budget
        )
        expected = unfused(x, w, b, target, reduction=reduction)
        torch.testing.assert_close(loss, expected, equal_nan=True, rtol=0, atol=0)
        for gradient in torch.autograd.grad(loss, leaves, torch.ones_like(loss)):
            assert not gradient.any()


@pytest.mark.parametrize("n", [8, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [(27,), (9, 2)], ids=str)
def test_all_rows_ignored_with_class_weights(classes, dtype, n, implementation, device) -> None:
    """The gradients are 0 then, and NaN where rows count whose classes weigh nothing: as torch's"""
    x, w, b, target = example(n, classes, dtype, device, ignored=2.0)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    weight = torch.arange(classes[0], device=device).to(dtype)  # 0 of class 0
    for rows in (target, target * 0):
        expected = torch.autograd.grad(unfused(x, w, b, rows, weight=weight), leaves)
        for budget in (None, three_rows(w)):
            loss = fused.linear_cross_entropy(
                x, w, rows, linear_bias=b, weight=weight, memory_budget_bytes=budget
            )
            assert loss.isnan()
            found = torch.autograd.grad(loss, leaves)
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("classes", [(27,), (9, 2)], ids=str)
def test_no_features(classes, implementation, device) -> None:
    """The logits are the bias."""
    x, w, b, target = example(8, classes, torch.float32, device, features=0)
    for budget in (None, three_rows(w)):
        check_against_torch((x, w, b, target), implementation, budget)


def test_targets_of_few_bits(device) -> None:
    """As a uint8, -100 would be 156, which is a class here."""
    x, w, b, target = example(8, (200,), torch.float32, "cpu", ignored=0)
    target[::2] = 156
    ours = fused.linear_cross_entropy(x, w, target.byte(), linear_bias=b, reduction="none")
    torch.testing.assert_close(ours, unfused(x, w, b, target, reduction="none"))


def test_nan_in_ignored_rows_does_not_matter(device) -> None:
    """On the CPU they take no part in the products."""
    x, w, b, target = example(8, (27,), torch.float32, "cpu")
    x[target == -100] = float("nan")
    leaves = [t.requires_grad_() for t in (x, w, b)]
    for reduction in REDUCTIONS:
        loss = fused.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
        for gradient in torch.autograd.grad(loss.sum(), leaves):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_and_accumulation(reduction, implementation, device) -> None:
    """The gradients are handed over to .grad, and not changed there by a second backward."""
    x, w, b, target = example(8, (27,), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    loss = fused.linear_cross_entropy(
        x, w, target, linear_bias=b, reduction=reduction, memory_budget_bytes=three_rows(w)
    )
    loss.sum().backward(retain_graph=True)
    first = [t.grad.clone() for t in leaves]
    loss.sum().backward()
    for leaf, gradient in zip(leaves, first, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_gradient_is_kept_for_a_checkpoint(reduction, implementation, device) -> None:
    """Which would compute it twice."""
    x, w, b, target = example(8, (27,), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = fused.linear_cross_entropy(x.cos(), w, target, linear_bias=b, reduction=reduction)
        return y.sum() * 3

    with Products() as forward:
        checkpointed = checkpoint(loss, *leaves, use_reentrant=False)
    with Products() as backward:
        found = torch.autograd.grad(checkpointed, leaves)
    # The logits once more for the checkpoint, and once more for their gradient.
    assert (forward.count, backward.count) == (1, 4)
    torch.testing.assert_close(found, torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.parametrize("chunk", [None, 3])
def test_what_torchs_counter_of_operations_counts(chunk, implementation, device) -> None:
    """Each of the three products, as of F.linear and F.cross_entropy."""
    x, w, b, target = example(8, (27,), torch.float32, device)
    target = target.clamp(min=0)  # rows that are ignored are left out
    leaves = [t.requires_grad_() for t in (x, w, b)]
    budget = chunk and three_rows(w)
    with FlopCounterMode(display=False) as ours:
        loss = fused.linear_cross_entropy(x, w, target, linear_bias=b, memory_budget_bytes=budget)
        torch.autograd.grad(loss, leaves)
    with FlopCounterMode(display=False) as theirs:
        torch.autograd.grad(F.cross_entropy(F.linear(x, w, b), target), leaves)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        self.count += func.__name__.split(".")[0] in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wants", [*itertools.product([False, True], repeat=3)], ids=str)
def test_only_what_requires_a_gradient_is_computed(wants, implementation, device) -> None:
    x, w, b, target = example(8, (27,), torch.float32, device)
    for tensor, want in zip((x, w, b), wants, strict=True):
        tensor.requires_grad_(want)
    with Products() as products:
        loss = fused.linear_cross_entropy(x, w, target, linear_bias=b)
        assert loss.requires_grad == any(wants)
        if any(wants):
            loss.backward(retain_graph=True)
    assert products.count == 1 + wants[0] + wants[1]
    assert [t.grad is not None for t in (x, w, b)] == list(wants)
    if any(wants):
        with Products() as again:
            loss.backward()
        assert again.count == products.count


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_the_logits_alone(mode, reduction, implementation, device) -> None:
    """Of parameters and an input that require gradients: one product a chunk."""
    x, w, b, target = example(8, (27,), torch.float32, device, ignored=0)
    for tensor in (x, w, b):
        tensor.requires_grad_()
    expected = fused.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
    for budget, chunks in ((None, 1), (4 * 27 * 4, 2)):
        with mode(), Products() as products:
            loss = fused.linear_cross_entropy(
                x, w, target, linear_bias=b, reduction=reduction, memory_budget_bytes=budget
            )
        assert products.count == chunks and not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("wants", [(True, False), (False, True)], ids=str)
def test_gradients_of_probabilities_and_class_weights(wants, implementation, device) -> None:
    x, w, b, target = example(8, (27,), torch.float32, device, "probabilities")
    weight = torch.linspace(0.5, 1.5, 27, device=device)
    leaves = [t.requires_grad_(w) for t, w in zip((target, weight), wants, strict=True)]
    budget = {"memory_budget_bytes": three_rows(w)}
    loss = fused.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, **budget)
    expected = unfused(x, w, b, target, weight=weight)
    wanted = [t for t in leaves if t.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted)
    )
    with torch.no_grad(), Products() as products:  # where none is formed: three rows at a time
        fused.linear_cross_entropy(x, w, target, linear_bias=b, weight=weight, **budget)
    assert products.count == 3


def test_float16_gradients_do_not_flush_to_zero(implementation, device) -> None:
    """p - onehot over the number of rows comes with the loss scale, not before."""
    n, c = 128, 256
    x = torch.zeros(n, 1, dtype=torch.float16, device=device)
    w = torch.zeros(c, 1, dtype=torch.float16, device=device)
    b = torch.zeros(c, dtype=torch.float16, device=device, requires_grad=True)
    x[:, 0] = 1.0
    w.requires_grad_()
    target = torch.zeros(n, dtype=torch.int64, device=device)
    (fused.linear_cross_entropy(x, w, target, linear_bias=b) * 2.0**-10).backward()
    exact = 2.0**-10 / c
    assert w.grad[1:].min().item() == pytest.approx(exact, rel=1e-2)
    assert b.grad[1:].min().item() == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_gradients_do_not_overflow_before_the_mean(
    reduction, implementation, device
) -> None:
    """Sums over 16 rows that float16 cannot hold, where a sixteenth of them it can."""
    n, dtype = 16, torch.float16
    target = torch.zeros(n, dtype=torch.int64, device=device)
    exact: dict[str, Any] = {
        "dw": (30000.0, 0.0, 1.0, 30000 * -0.5),  # x * (p - 1)
        "dx": (0.0, 40000.0, 4.0, 4 * (40000 * -0.5 + -40000 * 0.5) / n),
        "db": (0.0, 0.0, 1e4, 1e4 * -0.5),
    }
    for name, (of_x, of_w, logit_scale, gradient) in exact.items():
        x = torch.full((n, 1), of_x, dtype=dtype, device=device, requires_grad=True)
        w = torch.tensor([[of_w], [-of_w]], dtype=dtype, device=device, requires_grad=True)
        b = torch.zeros(2, dtype=dtype, device=device, requires_grad=True)
        for budget in (None, three_rows(w)):
            loss = fused.linear_cross_entropy(
                x,
                w,
                target,
                linear_bias=b,
                reduction=reduction,
                logit_scale=logit_scale,
                memory_budget_bytes=budget,
            )
            upstream = torch.full_like(loss, 1.0 if reduction == "mean" else 1 / n)
            gradients = torch.autograd.grad(loss, (x, w, b), upstream)
            found = dict(zip(("dx", "dw", "db"), gradients, strict=True))
            assert all(g.isfinite().all() and g.dtype == dtype for g in found.values())
            assert found[name].flatten()[0].item() == pytest.approx(gradient, rel=1e-3)


@pytest.mark.parametrize(
    "weight, options",
    [
        (1e-3, {}),
        (1e6, {"label_smoothing": 0.1}),  # beyond float16's range
        (1.0, {"logit_scale": 1e-3}),
        (1e-3, {"z_loss": 1e-4}),
    ],
    ids=str,
)
def test_float16_gradients_whatever_the_class_weights(
    weight, options, implementation, device
) -> None:
    """Of 1,000 classes, whose probabilities times small weights float16 does not hold."""
    x, w, _, target = example(24, (1000,), torch.float32, device)
    weights = weight * (0.5 + torch.rand(1000, device=device))
    weights[0] = float("inf")  # of no row
    target[target == 0] = 1
    if "label_smoothing" in options:
        weights[0] = 1.0

    def run(function: Any, dtype: torch.dtype, budget: int | None = None) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w)]
        more = options | ({} if function is unfused else {"memory_budget_bytes": budget})
        with torch.autocast(device.type, torch.float16, enabled=dtype == torch.float32):
            loss = function(*leaves, target, weight=weights.to(dtype), **more)
        return [g.double() / 2**16 for g in torch.autograd.grad(loss * 2**16, leaves)]

    def unfused(x: Tensor, w: Tensor, target: Tensor, **options: Any) -> Tensor:
        return fused.cross_entropy(F.linear(x, w), target, **options)

    def errors(gradients: list[Tensor]) -> list[float]:
        return [
            ((ours - exact).abs().sum() / exact.abs().sum()).item()
            for ours, exact in zip(gradients, run(unfused, torch.float64), strict=True)
        ]

    allowed = [2 * error for error in errors(run(unfused, torch.float32))]
    for budget in (None, 5 * 1000 * 2):
        ours = errors(run(fused.linear_cross_entropy, torch.float32, budget))
        assert all(error <= most for error, most in zip(ours, allowed, strict=True)), ours


def test_float16_gradients_whatever_ignored_rows_would_weigh(implementation, device) -> None:
    """Their class, however heavy, has no part in the unit of the others' gradients."""
    x, w, _, target = example(24, (27,), torch.float32, device)
    weights = torch.ones(27, device=device)
    weights[5], target[target < 0] = 1e12, 5
    leaf = x.requires_grad_()
    options: dict[str, Any] = {"weight": weights, "ignore_index": 5}
    with torch.autocast(device.type, torch.float16):
        ours = fused.linear_cross_entropy(leaf, w, target, **options)
        theirs = F.cross_entropy(F.linear(leaf, w).float(), target, **options)
    found = [torch.autograd.grad(2.0**10 * loss, leaf)[0] for loss in (ours, theirs)]
    assert found[1].abs().max() > 1
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


def test_stats_of_ignored_rows_are_those_of_cross_entropy(implementation, device) -> None:
    """On the CPU such rows take no part in the products; their predictions are -1 all the same."""
    x, w, _, target = example(9, (27,), torch.float32, device)
    target[::3] = -100
    ours = fused.linear_cross_entropy_with_stats(x, w, target)
    theirs = fused.cross_entropy_with_stats(F.linear(x, w), target)
    torch.testing.assert_close(ours, theirs)
    assert (ours.prediction[::3] == -1).all()


@pytest.mark.parametrize("exponent", [-60, 60])
def test_float16_gradients_are_of_weights_of_any_unit(exponent, implementation, device) -> None:
    """The mean's: weights times a power of two are the same weights, to the last bit."""
    x, w, _, target = example(24, (1000,), torch.float16, device)
    weights = 0.5 + torch.rand(1000, device=device)
    found = []
    for weight in (weights, weights * 2.0**exponent):
        leaves = features, words = (x.float().requires_grad_(), w.float().requires_grad_())
        with torch.autocast(device.type, torch.float16):
            loss = fused.linear_cross_entropy(features, words, target, weight=weight)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sums", "z-loss", "range"])
def test_float16_gradients_that_are_large_or_small(name, implementation, device) -> None:
    """Probabilities that sum to 5,000, the square of a log-sum-exp of 10,000 with its whole weight,
    and class weights that differ by a factor of a million."""
    half = {"dtype": torch.float16, "device": device}
    options: dict[str, Any] = {"reduction": "sum"}
    upstream = 1.0
    if name == "sums":
        x, w = torch.ones(2, 4, **half), torch.arange(32.0, **half).view(8, 4) / 8
        target = torch.zeros(2, 8, **half)
        target[:, 1] = 5000
        options, expected = {}, (7304.0, 1e-3)
    elif name == "z-loss":
        x, w = torch.ones(2, 4, **half), torch.zeros(8, 4, **half)
        w[0], target = 2500.0, torch.zeros(2, dtype=torch.int64, device=device)
        options["z_loss"], upstream = 1.0, 2.0**-14
        expected = (2 * 10000 * 2500 * 2.0**-14, 1e-3)
    else:
        x, w, _, target = example(64, (1000,), torch.float32, "cpu", ignored=0)
        x, w, target = x.to(**half), w.to(**half), target.to(device)
        weight = torch.ones(1000, device=device)
        weight[::2], weight[1::2] = 1e3, 1e-3
        options["weight"], upstream = weight, 8.0
    leaf = x.requires_grad_()
    with torch.autocast(device.type, torch.float16, enabled=name == "range"):
        loss = fused.linear_cross_entropy(leaf, w, target, **options)
    (dx,) = torch.autograd.grad(loss * upstream, leaf)
    if name != "range":
        assert dx.flatten()[0].item() == pytest.approx(expected[0], rel=expected[1])
        return
    exact = leaf.detach().double().requires_grad_()
    options["weight"] = weight.double()
    loss = fused.cross_entropy(F.linear(exact, w.double()), target, **options)
    (goal,) = torch.autograd.grad(loss * upstream, exact)
    errors = (dx - goal).abs().amax(1) / goal.abs().amax(1)
    assert errors.max() < 5e-3


@pytest.mark.parametrize("ignored", ["all", "some"])
def test_what_is_ignored_has_no_gradient_whatever_comes_from_upstream(
    ignored, implementation, device
) -> None:
    """A loss of no rows is NaN, and so is the upstream gradient of what is made of it."""
    x, w, b, target = example(8, (27,), torch.float32, device, ignored=0)
    rows = torch.arange(8, device=device) % 3 == 0 if ignored == "some" else target >= 0
    target[rows] = -100
    leaves = [t.requires_grad_() for t in (x, w, b)]
    for budget in (None, three_rows(w)):
        loss = fused.linear_cross_entropy(x, w, target, linear_bias=b, memory_budget_bytes=budget)
        for upstream in (float("nan"), INF):
            gradients = torch.autograd.grad(
                loss, leaves, torch.full_like(loss, upstream), retain_graph=True
            )
            assert not gradients[0][rows].any()
            if ignored == "all":
                assert not any(g.any() for g in gradients)
            else:
                assert all(not g.isfinite().all() for g in gradients)


def test_float16_gradients_of_many_rows(implementation, device) -> None:
    """As exact as those of PyTorch, whose dz is that of the mean."""
    x, w, b, target = example(256, (10,), torch.float16, device, ignored=0)
    x[:, 0], w[:, 0] = 900.0, 0.0
    target[::3] = 0
    for budget in (None, 100 * 10 * 2):
        check_against_torch((x, w, b, target), implementation, budget)


def test_parameter_gradients_are_summed_in_float32_over_chunks(device) -> None:
    """1,024 equal terms in chunks of 1: in bfloat16 the sum would stop at some 2**8 of them."""
    n = 1024
    x = torch.ones(n, 1, dtype=torch.bfloat16, device=device)
    w = torch.zeros(2, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
    target = torch.zeros(n, dtype=torch.int64, device=device)
    b = torch.zeros(2, dtype=torch.bfloat16, device=device, requires_grad=True)
    loss = fused.linear_cross_entropy(
        x, w, target, linear_bias=b, reduction="sum", memory_budget_bytes=4
    )
    # With so small a weight one chunk would save memory: ask for the chunks' arithmetic itself.
    assert chunk_rows(n, 4, 4, 0) == 1
    for gradient in torch.autograd.grad(loss, (w, b)):
        assert gradient.flatten().tolist() == [-n / 2, n / 2]


def test_a_mean_of_float16_whose_sum_it_cannot_hold(implementation, device) -> None:
    x = torch.ones(6, 1, dtype=torch.float16, device=device)
    w = torch.tensor([[0.0], [-30000.0]], dtype=torch.float16, device=device)
    target = torch.ones(6, dtype=torch.int64, device=device)
    for budget in (None, three_rows(w)):
        loss = fused.linear_cross_entropy(x, w, target, memory_budget_bytes=budget)
        assert loss.item() == pytest.approx(30000, rel=1e-3)


@pytest.mark.parametrize(
    "n, row_bytes, budget, saved, rows",
    [
        (100, 10, 1000, 0, 100),  # fits
        (101, 10, 1000, 0, 51),  # two of one size, not 100 and 1
        (101, 10, 1000, 10, 101),  # one chunk needs no more than two and their sum
        (5000, 10, 20480, 0, 1667),
        (4200, 256512, 512 << 20, 0, 1400),  # of 2,092 that the budget allows: not 2092, 2092, 16
        (2200, 256512, 512 << 20, 0, 1100),
        (4096, 256512, 512 << 20, 0, 2048),
        (7, 10, 1, 0, 1),
        (0, 10, 1, 0, 1),
    ],
)
def test_chunks(n, row_bytes, budget, saved, rows) -> None:
    assert chunk_rows(n, row_bytes, budget, saved) == rows


@pytest.mark.parametrize("budget", [7, 100, 1000])
@pytest.mark.parametrize("n", [1, 8, 99, 101, 2500])
def test_chunks_have_more_than_half_of_the_rows_that_the_budget_allows(budget, n) -> None:
    rows = chunk_rows(n, 1, budget, 0)
    assert rows <= budget and (rows == n or rows > budget / 2)
    assert -(-n // rows) == -(-n // budget)  # and there are no more than need be


def problem(
    n: int, d: int, c: int, dtype: torch.dtype, reduction: str, trained: bool, budget: int
) -> Problem:
    """On the meta device, so that nothing is computed."""
    x = torch.empty(n, d, dtype=dtype, device="meta")
    w = torch.empty(c, d, dtype=dtype, device="meta", requires_grad=trained)
    target = torch.empty(n, dtype=torch.int64, device="meta")
    return Problem(
        x, w, None, target, None, -100, reduction, 0.0, 0.0, 0.0, 1.0, torch.float32, budget
    )


@pytest.mark.parametrize(
    "dtype, trained, chunks",
    [
        (torch.float32, False, 16),
        (torch.bfloat16, False, 8),
        (torch.bfloat16, True, 1),  # which saves the sum in float32
        (torch.float16, True, 8),  # whose sum is in float32 all the same
        (torch.float32, True, 16),  # which has none
    ],
    ids=str,
)
def test_chunks_by_default(dtype, trained, chunks) -> None:
    """Of 32 MB."""
    p = problem(4096, 2048, 32000, dtype, "mean", trained, 1)
    with Products() as products:
        fused.linear_cross_entropy(p.x, p.w, p.target)
    assert products.count == chunks * (1 + trained)


def test_only_a_pass_that_forms_dw_goes_beyond_the_budget() -> None:
    """Of bfloat16, for the memory of its sum: not evaluation, nor the forward of "none"."""
    p = problem(4096, 2048, 32000, torch.bfloat16, "none", True, 1)
    with torch.no_grad(), Products() as evaluated:
        fused.linear_cross_entropy(p.x, p.w, p.target)
    with Products() as forward:
        loss = fused.linear_cross_entropy(p.x, p.w, p.target, reduction="none")
    with Products() as backward:
        loss.backward(torch.empty_like(loss))
    assert (evaluated.count, forward.count, backward.count) == (8, 8, 2)


@pytest.mark.parametrize("budget", [1 << 20, 512 << 20, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n, c", [(4096, 128256), (8192, 128256), (65536, 32000)])
def test_scratch_is_what_the_docstring_says(n, c, dtype, budget) -> None:
    """At most the budget, and of half precision four bytes for each number of W besides."""
    p = problem(n, 4096, c, dtype, "mean", True, budget)
    row_bytes, half = c * dtype.itemsize, dtype.itemsize == 2
    wide = half and (dtype == torch.float16 or p.chunk(True) < n)
    scratch = p.chunk(True) * row_bytes + (4 * p.w.numel() if wide else 0)
    assert p.chunk(False) * row_bytes <= budget
    assert scratch <= budget + (4 * p.w.numel() if half else 0)
    if (n, dtype, budget) == (4096, torch.bfloat16, 512 << 20):
        assert scratch <= 1 << 30


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "dtype, classes, row", [(torch.bfloat16, 4099, 4104), (torch.float32, 4099, 4100)], ids=str
)
def test_rows_of_logits_begin_at_multiples_of_16_bytes(
    dtype, classes, row, reduction, device, monkeypatch
) -> None:
    """For the products' sake; accesses have 16 bytes none the less."""
    tuning = pytest.importorskip("fused.kernels.tuning")
    plan_of, found = tuning.cross_entropy, []

    def planned(x: Tensor, inplace: bool = False, **options: Any) -> Any:
        plan = plan_of(x, inplace, **options)
        found.append((x.stride(0), inplace, plan.VEC > 1))
        return plan

    monkeypatch.setattr(tuning, "cross_entropy", planned)
    x = torch.randn(5, 8, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn(classes, 8, dtype=dtype, device=device)
    with fused.backend.use("triton"):
        loss = fused.linear_cross_entropy(
            x, w, torch.arange(5, device=device), reduction=reduction, memory_budget_bytes=50_000
        )
        loss.sum().backward()
    assert found and all(stride == row and inplace and wide for stride, inplace, wide in found)


def test_no_value_is_looked_at() -> None:
    """On the meta device there are none."""
    x = torch.zeros(6, 4, device="meta", requires_grad=True)
    w = torch.zeros(9, 4, device="meta", requires_grad=True)
    target = torch.zeros(6, dtype=torch.int64, device="meta")
    for reduction in REDUCTIONS:
        loss = fused.linear_cross_entropy(x, w, target, reduction=reduction, memory_budget_bytes=80)
        dx, dw = torch.autograd.grad(loss.sum(), (x, w))
        assert (dx.shape, dw.shape) == (x.shape, w.shape)


# The mean's rows are counted by PyTorch, whose result is looked at on the CPU, and only there.
@pytest.mark.parametrize("reduction", ["sum", "none", pytest.param("mean", marks=pytest.mark.cuda)])
def test_captured_in_a_cuda_graph(reduction, device) -> None:
    x, w, b, target = example(9, (37,), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def step() -> tuple[Tensor, ...]:
        loss = fused.linear_cross_entropy(
            x, w, target, linear_bias=b, reduction=reduction, memory_budget_bytes=4 * 37 * 4
        )
        return loss, *torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.7))

    check_replay(step, [x, w, b, target])


def test_two_runs_are_bitwise_equal(implementation, device) -> None:
    x, w, b, target = example(9, (27,), torch.bfloat16, device)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def run() -> tuple[Tensor, ...]:
        loss = fused.linear_cross_entropy(
            x, w, target, linear_bias=b, memory_budget_bytes=three_rows(w)
        )
        return loss, *torch.autograd.grad(loss, leaves)

    torch.testing.assert_close(run(), run(), rtol=0, atol=0)


def test_row_of_a_bad_target_is_the_callers(device) -> None:
    x, w, _, target = example(8, (27,), torch.float32, "cpu", ignored=0)
    target[2], target[6] = -100, 31
    with pytest.raises(IndexError, match=r"expected target in \[0, 27\).*got 31 at row 6"):
        fused.linear_cross_entropy(x, w, target, memory_budget_bytes=three_rows(w))


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input": ({"input": torch.ones(2, 3, D)}, RuntimeError, r"input of shape \(D,\) or \(N, D\)"),
    "linear_weight": ({"linear_weight": torch.ones(D)}, RuntimeError, r"linear_weight of shape"),
    "features": ({"linear_weight": torch.ones(27, 3)}, RuntimeError, "as many features .* 16 and"),
    "linear_bias": ({"linear_bias": torch.ones(3)}, RuntimeError, r"linear_bias of shape \(27,\)"),
    "dtype": ({"linear_weight": torch.ones(27, D).double()}, RuntimeError, "dtype torch.float32"),
    "batch": (
        {"input": torch.ones(D), "linear_weight": torch.ones(27, 2, D)},
        RuntimeError,
        r"shape \(N, 16\), a batch",
    ),
    "ignore_index": (
        {"target": torch.ones(8, 27), "ignore_index": -100},
        RuntimeError,
        "no ignore_index for a target of probabilities",
    ),
    "target": ({"target": torch.zeros(7).long()}, ValueError, r"target of shape \(8,\)"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction to be one of"),
    "no budget": ({"memory_budget_bytes": 0}, ValueError, "memory_budget_bytes above 0"),
    "budget": ({"memory_budget_bytes": -1}, ValueError, "memory_budget_bytes above 0"),
    "budget of a float": ({"memory_budget_bytes": 100.0}, TypeError, "an int.* got 100.0"),
    "budget of NaN": ({"memory_budget_bytes": float("nan")}, TypeError, "an int.* got nan"),
    "budget of a word": ({"memory_budget_bytes": "1 GB"}, TypeError, "an int.* got '1 GB'"),
    "device": ({"linear_weight": torch.ones(27, D, device="meta")}, RuntimeError, "on cpu, where"),
    "bias device": ({"linear_bias": torch.ones(27, device="meta")}, RuntimeError, "on cpu, where"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused(mistake) -> None:
    changed, error, message = MISTAKES[mistake]
    arguments: dict[str, Any] = {
        "input": torch.ones(8, D),
        "linear_weight": torch.ones(27, D),
        "target": torch.zeros(8, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        fused.linear_cross_entropy(**(arguments | changed))


def test_module_shows_its_options() -> None:
    """Those of ours, behind torch's, if they are not the usual ones."""
    plain = fused.LinearCrossEntropyLoss(D, 5)
    assert "z_loss" not in plain.extra_repr() and not plain.extra_repr().startswith(",")
    module = fused.LinearCrossEntropyLoss(
        D, 5, z_loss=0.1, softcap=30.0, logit_scale=0.5, memory_budget_bytes=1 << 20
    )
    shown = "z_loss=0.1, softcap=30.0, logit_scale=0.5, memory_budget_bytes=1048576"
    assert module.extra_repr() == ", ".join(filter(None, [plain.extra_repr(), shown]))


@needs_torchs_own
def test_module_is_torchs(implementation, device) -> None:
    torch.manual_seed(0)
    theirs = nn.LinearCrossEntropyLoss(
        D, 5, out_features=(2,), bias=True, weight=torch.rand(5), reduction="sum"
    ).to(device)
    ours = fused.LinearCrossEntropyLoss(
        D, 5, out_features=(2,), bias=True, weight=torch.rand(5), reduction="sum", z_loss=0.0
    ).to(device)
    assert isinstance(ours, nn.LinearCrossEntropyLoss) and repr(ours)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x, _, _, target = example(8, (5, 2), torch.float32, device)
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    assert fused.convert(theirs) == ["the model itself: LinearCrossEntropyLoss"]
    assert type(theirs) is fused.LinearCrossEntropyLoss
    torch.testing.assert_close(ours(x, target), theirs(x, target), rtol=0, atol=0)


def test_module_passes_its_options(implementation, device) -> None:
    options = {"label_smoothing": 1.0, "ignore_index": 3, **EXTRAS}
    where = {"device": device, "dtype": torch.float64}
    weight = torch.linspace(0.5, 1.5, 27, device=device, dtype=torch.float64)
    module = fused.LinearCrossEntropyLoss(D, 27, bias=True, weight=weight, **where, **options)
    x, _, _, target = example(8, (27,), torch.float64, device, ignored=0)
    target[2] = 3
    expected = fused.linear_cross_entropy(
        x, module.linear.weight, target, linear_bias=module.linear.bias, weight=weight, **options
    )
    torch.testing.assert_close(module(x, target), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="memory_budget_bytes above 0"):
        fused.LinearCrossEntropyLoss(D, 27, memory_budget_bytes=0, **where)(x, target)


def test_module_mistakes() -> None:
    with pytest.raises(RuntimeError, match=r"weight of shape \(5,\)"):
        fused.LinearCrossEntropyLoss(D, 5, weight=torch.ones(4))
    with pytest.raises(RuntimeError, match="label_smoothing between 0 and 1"):
        fused.LinearCrossEntropyLoss(D, 5, label_smoothing=1.5)


def test_the_logits_are_never_held(device) -> None:
    """Peak memory above the inputs: at most a quarter of the pair's, where the logits are large."""
    from bench.cases import differentiable
    from bench.measure import peak_bytes

    n, classes = 1024, 4000
    x, w, _, target = example(n, (classes,), torch.float32, device, ignored=0)
    leaves = {"x": x.requires_grad_(), "w": w.requires_grad_()}
    upstream = torch.ones((), device=device)
    ours = differentiable(
        lambda: fused.linear_cross_entropy(x, w, target, memory_budget_bytes=2**21),
        leaves,
        upstream,
    )
    pair = differentiable(lambda: F.cross_entropy(F.linear(x, w), target), leaves, upstream)
    phases = [c.phases["fwd_bwd"] for c in (ours, pair)]
    for phase in phases:  # a GPU's library of products takes memory of its own, the first time
        phase.run(phase.prepare())
    peaks = [peak_bytes(phase, device) for phase in phases]
    assert peaks[1] >= 2 * 4 * n * classes
    assert peaks[0] <= peaks[1] / 4


def test_what_is_measured_beside_it() -> None:
    """The forward alone and the whole step; the bare products are of all rows at once."""
    from bench.bench_linear_cross_entropy import contenders
    from bench.cases import Case

    built = contenders(
        Case("linear_cross_entropy", (4096, 10), torch.float32, "d4"), torch.device("cpu")
    )
    counts: dict[str, list[int]] = {}
    for name in ("torch", "chunked", "fused", "products"):
        phases = built[name]().phases
        assert list(phases) == ["fwd", "fwd_bwd"]
        for phase in phases.values():
            with Products() as products:
                phase.run(phase.prepare())
            counts.setdefault(name, []).append(products.count)
    assert counts == dict.fromkeys(counts, [1, 3])


@needs_torchs_own
@pytest.mark.slow
def test_peak_memory_beside_torchs_own_chunks() -> None:
    """32,000 words: at most a quarter of the pair's, and no more than the chunked form's, both at
    their defaults."""
    from bench.bench_linear_cross_entropy import contenders
    from bench.cases import Case
    from bench.measure import peak_bytes

    cpu = torch.device("cpu")
    built = contenders(Case("linear_cross_entropy", (4096, 32000), torch.float32, "d256"), cpu)
    pair, ours, chunked = (
        peak_bytes(built[name]().phases["fwd_bwd"], cpu)
        for name in ("torch", "fused", "torch chunked")
    )
    assert ours <= pair / 4
    assert ours <= chunked
