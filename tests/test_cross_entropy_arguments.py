"""What cross-entropy takes, in which dtypes, and what it refuses, with torch's kind of error."""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused
from tests.exactness import assert_as_exact_as, ulps_for
from tests.test_cross_entropy import check_against_torch, example, small_chunks  # noqa: F401


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_negative_smoothing_is_none(kind, implementation, device) -> None:
    """As torch takes it."""
    tensors = example((5, 9, 3), torch.float32, device, kind, True)
    check_against_torch(*tensors, implementation, label_smoothing=-0.5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_target_dtypes(dtype, implementation, device) -> None:
    logits, target, _ = example((9, 27), torch.float32, device, ignored=0)
    check_against_torch(logits, target.to(dtype), None, implementation)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_ignore_index_beyond_the_targets_dtype(dtype, implementation, device) -> None:
    """-100 is not 156, though a uint8 cannot tell, nor 2**32 + 3 an int32's 3."""
    logits, _, _ = example((3, 200), torch.float32, device)
    target = torch.tensor([156, 3, 0], dtype=dtype, device=device)
    for ignore_index in (-100, 2**32 + 3):
        check_against_torch(logits, target, None, implementation, ignore_index=ignore_index)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 26, 255])
def test_ignore_index(ignore_index, implementation, device) -> None:
    logits, target, weight = example((9, 27), torch.float32, device, weighted=True, ignored=0)
    target[::3] = ignore_index
    check_against_torch(
        logits, target, weight, implementation, ignore_index=ignore_index, label_smoothing=0.1
    )
    correct = fused.cross_entropy_with_stats(logits, target, ignore_index=ignore_index).correct
    assert correct == ((logits.argmax(1) == target) & (target != ignore_index)).sum()


def test_result_dtypes_promote_as_torchs(implementation, device) -> None:
    half, single, double = torch.float16, torch.float32, torch.float64
    for a, b, c in [(half, single, half), (single, double, single), (half, half, single)]:
        logits, target, weight = example((5, 9), single, device, "probabilities", weighted=True)
        arguments = logits.to(a), target.to(b), weight.to(c)
        ours, theirs = fused.cross_entropy(*arguments), F.cross_entropy(*arguments)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
        if double in (a, b):  # either suffices to compute in it
            exact = F.cross_entropy(*(t.double() for t in arguments))
            torch.testing.assert_close(ours, exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("of", ["logits", "probabilities"])
@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}], ids=str)
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_of_a_narrower_dtype_than_is_computed_in(
    narrow, options, of, implementation, device
) -> None:
    logits, target, _ = example((5, 9), torch.float64, device, "probabilities")
    if of == "logits":
        logits = logits.to(narrow)
    else:
        target = target.to(narrow)
    exact = logits.double().requires_grad_(), target.double().requires_grad_()
    found = logits.requires_grad_(), target.requires_grad_(of == "probabilities")
    fused.cross_entropy(*found, **options).backward()
    F.cross_entropy(*exact).backward()
    for ours, expected in zip(found, exact, strict=True):
        if ours.requires_grad:
            assert_as_exact_as(
                ours.grad,
                expected.grad.to(ours.dtype),
                expected.grad,
                ulps=ulps_for(ours.dtype, implementation),
            )


def test_autocast_computes_in_float32(implementation, device) -> None:
    logits, target, weight = example((9, 27), torch.bfloat16, device, weighted=True)
    logits.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = fused.cross_entropy(logits, target, weight.float())
        # PyTorch's own loss is rounded to bfloat16 under autocast on a GPU.
        theirs = F.cross_entropy(logits.float(), target, weight.float())
        for function in (fused.cross_entropy, F.cross_entropy):
            with pytest.raises(RuntimeError, match="expected (weight of dtype|scalar type)"):
                function(logits, target, weight.double())
        wide = fused.cross_entropy(logits.double(), target)
    assert ours.dtype == torch.float32 and wide.dtype == torch.float64
    torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(ours, logits)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("largest", [1.0, 1e40])  # which is infinite in float32
@pytest.mark.parametrize("linear", [False, True])
def test_class_weights_of_float64_beside_probabilities_of_float32(
    linear, largest, implementation, device
) -> None:
    """The loss is of float64 then, and computed so."""
    logits, target, _ = example((5, 9), torch.float32, device, "probabilities")
    weight = torch.rand(9, dtype=torch.float64, device=device)
    weight[3] = largest
    one = torch.eye(9, device=device)
    losses: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for wide in (False, True):
        x = logits.double() if wide else logits
        leaf = x.detach().requires_grad_()
        if linear:
            loss = fused.linear_cross_entropy(leaf, one.to(x.dtype), target, weight=weight)
        else:
            loss = fused.cross_entropy(leaf, target, weight)
        losses.append(loss)
        gradients += torch.autograd.grad(loss, leaf)
    assert losses[0].isfinite()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    if largest == 1:
        torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-6, atol=0)


X, Y = torch.zeros(4, 27), torch.zeros(4, dtype=torch.int64)
P, W = torch.full((4, 27), 1 / 27), torch.ones(27)
# (error, call, message): the error is the one that torch raises for the same mistake.
REFUSED = {
    "reduction": (ValueError, {"input": X, "target": Y, "reduction": "avg"}, "got 'avg'"),
    "rows": (ValueError, {"input": X, "target": Y[:3]}, r"shape \(4,\).* got \(3,\)"),
    "one index": (ValueError, {"input": X, "target": Y[0]}, r"got \(\)"),
    "two indices": (ValueError, {"input": X[0], "target": Y[:2]}, r"got \(2,\)"),
    "one index with an axis": (
        RuntimeError,
        {"input": X[0], "target": Y[:1], "label_smoothing": 0.1},
        r"shape \(\).* got \(1,\)",
    ),
    "no rows": (RuntimeError, {"input": X[0, 0], "target": Y[0]}, r"got \(\)"),
    "2-D target": (RuntimeError, {"input": X, "target": Y[:, None]}, r"got \(4, 1\)"),
    "inner": (RuntimeError, {"input": X[..., None], "target": Y[:, None, None]}, r"\(4, 1, 1\)"),
    "integers": (NotImplementedError, {"input": X.long(), "target": Y}, "got torch.int64"),
    "8 bits": (
        NotImplementedError,
        {"input": X.to(torch.float8_e4m3fn), "target": Y},
        "got torch.float8_e4m3fn",
    ),
    "float target": (RuntimeError, {"input": X, "target": Y.float()}, "got torch.float32"),
    "int16 target": (RuntimeError, {"input": X, "target": Y.short()}, "got torch.int16"),
    "whole numbers": (RuntimeError, {"input": X, "target": P.long()}, "holds probabilities"),
    "ignored probabilities": (
        RuntimeError,
        {"input": X, "target": P, "ignore_index": 2},
        "no ignore_index",
    ),
    "0 among probabilities": (
        RuntimeError,
        {"input": X, "target": P, "ignore_index": 0},
        "no ignore_index",
    ),
    "weight": (RuntimeError, {"input": X, "target": Y, "weight": W[:5]}, r"\(27,\).* got \(5,\)"),
    "weight dtype": (
        RuntimeError,
        {"input": X, "target": Y, "weight": W.double()},
        "weight of dtype torch.float32.* got torch.float64",
    ),
    "weight gradient": (
        RuntimeError,
        {"input": X, "target": Y, "weight": W.clone().requires_grad_()},
        "needs no gradient for class indices",
    ),
    "smoothing": (RuntimeError, {"input": X, "target": Y, "label_smoothing": 1.1}, "got 1.1"),
    "smoothing, and target": (
        RuntimeError,
        {"input": X, "target": Y[:1], "label_smoothing": 1.1},
        "got 1.1",
    ),
    "device": (RuntimeError, {"input": X, "target": Y.to("meta")}, "on cpu.* got meta"),
    "weight device": (
        RuntimeError,
        {"input": X, "target": Y, "weight": W.to("meta")},
        "expected weight on cpu.* got meta",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refuses_what_torch_refuses(mistake, monkeypatch) -> None:
    error, arguments, message = REFUSED[mistake]
    with pytest.raises(error, match=message):
        fused.cross_entropy(**arguments)
    monkeypatch.undo()  # small calls go another way
    with pytest.raises(error, match=message):
        fused.cross_entropy(**arguments)
    with pytest.raises(error):
        F.cross_entropy(**arguments)


class OwnIndex:
    def __index__(self) -> int:
        return 2


CALLS: dict[str, Any] = {
    "cross_entropy": lambda **options: fused.cross_entropy(X, Y, **options),
    "weighted": lambda **options: fused.cross_entropy(X, Y, W, **options),
    "with_stats": lambda **options: fused.cross_entropy_with_stats(X, Y, **options),
    "linear": lambda **options: fused.linear_cross_entropy(X, X.new_zeros(27, 27), Y, **options),
    "vocab_parallel": lambda **options: fused.vocab_parallel_cross_entropy(X, Y, **options),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("ignore_index", [False, True, 2.0, None, "a", torch.tensor(2.0)], ids=repr)
def test_refuses_an_ignore_index_that_is_no_int(ignore_index, name, monkeypatch) -> None:
    """In silence False would be class 0: torch's fourth argument once was size_average."""
    if name == "linear" and ignore_index is None:
        pytest.skip("there None is -100, as torch has it")
    for _ in range(2):  # then with small calls, which go another way
        with pytest.raises(TypeError, match="expected ignore_index to be an int, such as -100"):
            CALLS[name](ignore_index=ignore_index)
        monkeypatch.undo()
    with pytest.raises(TypeError):
        F.cross_entropy(X, Y, ignore_index=ignore_index)


@pytest.mark.parametrize("name", CALLS)
def test_takes_as_ignore_index_what_torch_takes_for_an_int(name, monkeypatch) -> None:
    numpy = pytest.importorskip("numpy")
    for _ in range(2):
        expected = CALLS[name](ignore_index=2)
        for index in (numpy.int64(2), numpy.uint8(2), torch.tensor(2), OwnIndex()):
            torch.testing.assert_close(CALLS[name](ignore_index=index), expected, rtol=0, atol=0)
            F.cross_entropy(X, Y, ignore_index=index)
        monkeypatch.undo()


def test_refuses_a_target_of_one_row_that_has_neither_shape_nor_dtype() -> None:
    """A RuntimeError as of torch 2.13, which looks at the dtype first; before, a ValueError."""
    with pytest.raises(RuntimeError, match=r"got \(2,\)"):
        fused.cross_entropy(X[0], P[0, :2])
    with pytest.raises((RuntimeError, ValueError)):
        F.cross_entropy(X[0], P[0, :2])


def test_a_weight_with_a_gradient_where_none_is_formed() -> None:
    arguments = X, Y, W.clone().requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(fused.cross_entropy(*arguments), F.cross_entropy(*arguments))


def test_refuses_a_negative_cap() -> None:
    with pytest.raises(RuntimeError, match="softcap above 0, or None, got -1"):
        fused.cross_entropy(X, Y, softcap=-1.0)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "option, value",
    [
        ("softcap", 0.0),
        ("softcap", -1.0),
        ("softcap", math.nan),
        ("z_loss", math.nan),
        ("z_loss", math.inf),
        ("logit_scale", math.nan),
        ("logit_scale", -math.inf),
    ],
)
def test_refuses_numbers_out_of_range(option, value, name, monkeypatch) -> None:
    what = "above 0, or None" if option == "softcap" else "to be finite"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"expected {option} {what}, got {value}"):
            CALLS[name](**{option: value})
        monkeypatch.undo()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("option", ["logit_scale", "z_loss", "label_smoothing"])
def test_refuses_no_number(option, name, monkeypatch) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match=f"expected {option} to be a number, got None"):
            CALLS[name](**{option: None})
        monkeypatch.undo()


def test_refuses_a_scale_that_is_learned_and_still_is_1(monkeypatch) -> None:
    monkeypatch.undo()  # the usual number, of a small call
    with pytest.raises(TypeError, match="expected logit_scale to be a number.*got a Tensor"):
        fused.cross_entropy(X, Y, logit_scale=torch.tensor(1.0, requires_grad=True))


def test_an_infinite_cap_is_none() -> None:
    torch.testing.assert_close(
        fused.cross_entropy(P, Y, softcap=float("inf"), z_loss=0.1),
        fused.cross_entropy(P, Y, z_loss=0.1),
    )


@pytest.mark.parametrize("name", ["logit_scale", "softcap", "z_loss", "label_smoothing"])
def test_refuses_numbers_that_are_tensors(name) -> None:
    """A temperature that is learned would get no gradient, in silence."""
    options = {name: torch.tensor(0.5, requires_grad=True)}
    with pytest.raises(TypeError, match=f"expected {name} to be a number.*got a Tensor"):
        fused.cross_entropy(X, Y, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_numbers_that_torch_takes_for_floats(reduction, implementation, device) -> None:
    logits, target, weight = example((9, 27), torch.float32, device, weighted=True)
    numbers = (torch.tensor(0.1), np.float32(0.1), True, 0, float("nan"), -0.5)
    for number in numbers:
        options = {"label_smoothing": number, "reduction": reduction}
        ours = fused.cross_entropy(logits, target, weight, **options)
        torch.testing.assert_close(ours, F.cross_entropy(logits, target, weight, **options))


def test_the_old_name_of_mean(implementation, device) -> None:
    logits, target, _ = example((9, 27), torch.float32, device)
    loss = nn.CrossEntropyLoss(reduction="elementwise_mean")
    fused.convert(loss)
    for function in (loss, functools.partial(fused.cross_entropy, reduction="elementwise_mean")):
        with pytest.warns(UserWarning, match='is now called "mean"'):
            found = function(logits, target)
        torch.testing.assert_close(found, F.cross_entropy(logits, target))


def test_weights_in_a_row_for_images(implementation, device) -> None:
    logits, target, weight = example((9, 27, 5), torch.float32, device, weighted=True)
    ours, theirs = (f(logits, target, weight[None]) for f in (fused.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "arguments",
    [([[1.0]], Y), (None, Y), (X, None), (X, [0]), (X, Y, [1.0] * 27), (X, Y.numpy())],
    ids=["input", "no input", "no target", "target", "weight", "array"],
)
def test_refuses_what_is_no_tensor(arguments) -> None:
    for function in (fused.cross_entropy, fused.cross_entropy_with_stats, F.cross_entropy):
        with pytest.raises(TypeError, match="Tensor"):
            function(*arguments)
    with pytest.raises(TypeError, match="expected label_smoothing to be a number, got '0.1'"):
        fused.cross_entropy(X, Y, label_smoothing="0.1")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_refuses_weights_of_other_dtypes_under_autocast(dtype, implementation) -> None:
    for function in (fused.cross_entropy, F.cross_entropy):
        with torch.autocast("cpu"), pytest.raises(RuntimeError):
            function(X, Y, torch.ones(X.shape[1]).to(dtype))


@pytest.mark.parametrize("shape", [(9,), (9, 27), (800, 700), (3, 5, 4, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_losses_are_changed_in_place(options, shape, implementation, device) -> None:
    """As torch's may be, by a mask; what is known of the rows does not change with them."""
    if implementation == "triton" and shape == (800, 700):
        pytest.skip("large for the closed forms only")
    logits, target, _ = example(shape, torch.float32, device)
    found: list[Any] = []
    for function in (fused.cross_entropy, F.cross_entropy):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, target, reduction="none", **options)
        loss.mul_(0.5)
        found.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    torch.testing.assert_close(*found)
    stats = fused.cross_entropy_with_stats(
        logits.requires_grad_(), target, reduction="none", **options
    )
    before = stats.row_loss.clone()
    stats.loss.mul_(2.0)
    torch.testing.assert_close(stats.row_loss, before, rtol=0, atol=0)


def test_losses_of_composed_operations_are_changed_in_place(implementation, device) -> None:
    x, w = torch.randn(2, 4, 3, device=device)
    target = torch.rand(4, 4, device=device).requires_grad_()
    found = fused.linear_cross_entropy_with_stats(x.requires_grad_(), w, target, reduction="none")
    before = found.row_loss.clone()
    found.loss.mul_(2.0)
    torch.testing.assert_close(found.row_loss, before, rtol=0, atol=0)
