"""fused.cross_entropy on the closed forms and on the Triton kernels, against torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from tests.exactness import assert_as_exact_as, ulps_for

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
# One row, one class, around a power of two, more than one tile of classes in every dtype.
SHAPES = [(1, 27), (5, 1), (32, 27), (3, 127), (3, 128), (3, 129), (70, 8), (2, 1000), (2, 8200)]


def example(
    n: int, c: int, dtype: torch.dtype, device: torch.device, ignored: float = 0.2
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 10007 + c)
    logits = (torch.randn(n, c, generator=generator) * 3).to(dtype)
    target = torch.randint(0, c, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < ignored] = -100
    return logits.to(device), target.to(device)


def check_against_torch(
    logits: Tensor, target: Tensor, implementation: str, ulps: float | None = None, **options
) -> None:
    """Loss and gradient, with a random upstream gradient, are as exact as torch's."""
    ulps = ulps or ulps_for(logits.dtype, implementation)
    ours, theirs, exact = (
        t.detach().requires_grad_() for t in (logits, logits.clone(), logits.double())
    )
    losses = (
        fused.cross_entropy(ours, target, **options),
        F.cross_entropy(theirs, target.long(), **options),
        F.cross_entropy(exact, target.long(), **options),
    )
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(losses[0].shape, generator=generator).to(losses[0])
    for loss in losses:
        loss.backward(upstream.to(loss.dtype))
    assert_as_exact_as(*losses, ulps=ulps, what="loss")
    assert_as_exact_as(ours.grad, theirs.grad, exact.grad, ulps=ulps, what="gradient")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, c", SHAPES)
def test_matches_torch(n, c, dtype, reduction, implementation, device) -> None:
    logits, target = example(n, c, dtype, device)
    check_against_torch(logits, target, implementation, reduction=reduction)


def test_notebook_gradient_within_1e_8(implementation, device) -> None:
    """At the notebook's shape in float32, dlogits is within 1e-8 of autograd's."""
    logits, target = example(32, 27, torch.float32, device, ignored=0)
    ours, theirs = logits.requires_grad_(), logits.detach().clone().requires_grad_()
    fused.cross_entropy(ours, target).backward()
    (-theirs.log_softmax(1)[range(32), target].mean()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_target_dtypes(dtype, implementation, device) -> None:
    logits, target = example(9, 27, torch.float32, device, ignored=0)
    check_against_torch(logits, target.to(dtype), implementation)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 26, 255])
def test_ignore_index(ignore_index, implementation, device) -> None:
    logits, target = example(9, 27, torch.float32, device, ignored=0)
    target[::3] = ignore_index
    check_against_torch(logits, target, implementation, ignore_index=ignore_index)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_rows_ignored(reduction, implementation, device) -> None:
    """The mean is NaN, the sum 0, and the gradient 0 in every case."""
    logits = torch.randn(4, 27, device=device, requires_grad=True)
    target = torch.full((4,), -100, device=device)
    loss = fused.cross_entropy(logits, target, reduction=reduction)
    expected = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True, rtol=0, atol=0)
    loss.backward(torch.ones_like(loss))
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch(reduction, implementation, device) -> None:
    logits = torch.randn(0, 27, device=device, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=device)
    loss = fused.cross_entropy(logits, target, reduction=reduction)
    expected = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True, rtol=0, atol=0)
    loss.backward(torch.ones_like(loss))
    assert logits.grad.shape == (0, 27)


STRIDES = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced classes": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every other class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row expanded": lambda x: x[:1].expand_as(x),
    "pointer off by one": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_non_contiguous_logits(strides, implementation, device) -> None:
    logits, target = example(9, 27, torch.float32, device)
    check_against_torch(STRIDES[strides](logits), target, implementation)


def test_non_contiguous_target(implementation, device) -> None:
    logits, target = example(9, 27, torch.float32, device)
    check_against_torch(logits, target.repeat_interleave(3)[::3], implementation)
    check_against_torch(logits, target[:1].expand(9), implementation)


def test_upstream_vector_of_stride_0(implementation, device) -> None:
    """`.sum()` sends back a vector of stride 0: every row its own factor, not grad_output[0]'s."""
    logits, target = example(9, 27, torch.float32, device)
    ours, theirs = logits.requires_grad_(), logits.detach().clone().requires_grad_()
    fused.cross_entropy(ours, target, reduction="none").sum().backward()
    F.cross_entropy(theirs, target, reduction="none").sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_logits_are_never_changed(implementation, device) -> None:
    """Nor is the gradient of a second backward through the same graph another one."""
    logits, target = example(9, 27, torch.float32, device)
    before = logits.clone()
    with torch.no_grad():
        fused.cross_entropy(logits, target)
    loss = fused.cross_entropy(logits.requires_grad_(), target)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_logits_changed_after_forward_raise_in_backward(implementation, device) -> None:
    logits, target = example(9, 27, torch.float32, device)
    scaled = logits.requires_grad_() * 2
    loss = fused.cross_entropy(scaled, target)
    scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


INF = float("inf")
MASKED = {
    "one": lambda x, y: x.index_fill(1, torch.tensor([5]), -INF),
    "first block": lambda x, y: torch.cat((torch.full_like(x[:, :4200], -INF), x[:, 4200:]), 1),
    "all but one": lambda x, y: torch.full_like(x, -INF).scatter(1, y[:, None], 1.0),
    "target": lambda x, y: x.scatter(1, y[:1, None], -INF),
    "a whole row": lambda x, y: x.index_fill(0, torch.tensor([1]), -INF),
    "plus infinity": lambda x, y: x.index_fill(1, torch.tensor([7]), INF),
    "nan": lambda x, y: x.index_fill(1, torch.tensor([7]), float("nan")),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("masked", MASKED)
def test_masked_logits(masked, reduction, implementation) -> None:
    """NaN and infinity exactly where torch has them, with -inf over whole blocks of a row too."""
    logits, target = example(3, 8200, torch.float32, torch.device("cpu"), ignored=0)
    target[:] = torch.tensor([5000, 6000, 8199])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = MASKED[masked](logits, target).to(device)
    check_against_torch(logits, target.to(device), implementation, reduction=reduction)


EXTREME = {
    "all near -110": lambda x: x - 110,
    "all near 3e4": lambda x: x + 3e4,
    "one 1e4 above": lambda x: x.index_add(
        1, torch.tensor([3], device=x.device), torch.full_like(x[:, :1], 1e4)
    ),
}


@pytest.mark.parametrize("extreme", EXTREME)
def test_extreme_logits(extreme, implementation, device) -> None:
    logits, target = example(9, 668, torch.float32, device)
    logits = EXTREME[extreme](logits)
    assert fused.cross_entropy(logits, target).isfinite()
    check_against_torch(logits, target, implementation)


def test_half_precision_gradients_do_not_flush_to_zero(implementation, device) -> None:
    """1/N is not rounded to float16 before a loss scale arrives: no gradient is lost."""
    n, c = 512, 256
    logits = torch.zeros(n, c, dtype=torch.float16, device=device, requires_grad=True)
    target = torch.arange(n, device=device) % c
    (fused.cross_entropy(logits, target) * 2.0**15).backward()
    expected = 2.0**15 / n / c
    smallest = logits.grad.abs().min().item()
    assert smallest == pytest.approx(expected, rel=1e-2)


def test_confident_predictions_keep_their_gradient(implementation, device) -> None:
    """p - 1 is formed before rounding: a bfloat16 p of 1 would leave a gradient of 0."""
    logits = torch.zeros(2, 27, dtype=torch.bfloat16, device=device)
    logits[:, 3] = 12.0
    logits.requires_grad_()
    target = torch.full((2,), 3, device=device)
    fused.cross_entropy(logits, target, reduction="sum").backward()
    exact = torch.softmax(logits.double(), 1)[:, 3] - 1
    torch.testing.assert_close(logits.grad[:, 3].double(), exact, rtol=1e-2, atol=0)


def test_target_out_of_range_on_the_closed_form() -> None:
    logits, target = example(9, 27, torch.float32, torch.device("cpu"))
    target[4] = 31
    message = r"expected target in \[0, 27\) or ignore_index=-100, got 31 at row 4"
    with fused.backend.use("eager"), pytest.raises(IndexError, match=message):
        fused.cross_entropy(logits, target)
    target[4] = -1
    with fused.backend.use("eager"), pytest.raises(IndexError, match="got -1 at row 4"):
        fused.cross_entropy(logits, target)


@pytest.mark.parametrize("outside", [27, 31, -1, 2**40, -(2**40)])
def test_target_out_of_range_on_the_kernels(outside, device) -> None:
    """No look on the host, no read out of bounds: the row's loss and gradient are NaN."""
    logits, target = example(9, 27, torch.float32, device, ignored=0)
    target[4] = outside
    with fused.backend.use("triton"):
        loss = fused.cross_entropy(logits.requires_grad_(), target, reduction="none")
        loss.backward(torch.ones_like(loss))
    rows = torch.arange(9, device=device) == 4
    torch.testing.assert_close(loss.isnan(), rows)
    torch.testing.assert_close(logits.grad.isnan(), rows[:, None].expand(9, 27))


def test_two_runs_are_bitwise_equal(implementation, device) -> None:
    logits, target = example(70, 129, torch.float32, device)
    gradients = []
    for _ in range(2):
        x = logits.clone().requires_grad_()
        fused.cross_entropy(x, target).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_gradcheck(implementation, device) -> None:
    logits, target = example(3, 5, torch.float64, device)
    logits.requires_grad_()
    for reduction in REDUCTIONS:
        torch.autograd.gradcheck(
            lambda x, r=reduction: fused.cross_entropy(x, target, reduction=r), logits
        )


def test_module(implementation, device) -> None:
    logits, target = example(9, 27, torch.float32, device)
    module = fused.CrossEntropyLoss(ignore_index=3, reduction="sum")
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    target = target.clamp_min(0)
    expected = F.cross_entropy(logits, target, ignore_index=3, reduction="sum")
    torch.testing.assert_close(module(logits, target), expected)


X, Y = torch.zeros(4, 27), torch.zeros(4, dtype=torch.int64)
REFUSED = {
    "reduction": (ValueError, lambda: fused.cross_entropy(X, Y, reduction="avg"), "got 'avg'"),
    "1-D input": (ValueError, lambda: fused.cross_entropy(X[0], Y), r"shape \(N, C\), got \(27,\)"),
    "rows": (ValueError, lambda: fused.cross_entropy(X, Y[:3]), r"shape \(4,\) .*got \(3,\)"),
    "2-D target": (ValueError, lambda: fused.cross_entropy(X, Y[:, None]), r"got \(4, 1\)"),
    "integer input": (TypeError, lambda: fused.cross_entropy(X.long(), Y), "got torch.int64"),
    "float target": (TypeError, lambda: fused.cross_entropy(X, Y.float()), "got torch.float32"),
    "device": (ValueError, lambda: fused.cross_entropy(X, Y.to("meta")), "on cpu.* got meta"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refuses(mistake) -> None:
    error, call, message = REFUSED[mistake]
    with pytest.raises(error, match=message):
        call()
