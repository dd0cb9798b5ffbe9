"""What batch norm keeps of its forward pass for the backward pass, and what it leaves free."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused
from fused.eager import batch_norm as eager
from fused.kernels.batch_norm_layout import by_channel, pack_signs, signs_shape, unpack_signs
from tests.test_batch_norm import DTYPES, check_against_torch, example, run, torchs
from tests.test_cross_entropy import LargeResults

# Whether the residual has to be kept. relu's backward takes the signs of z or y; tanh's takes y,
# unless that was rounded to half precision.
KEPT = [
    (None, torch.float32, False),
    ("relu", torch.float32, False),
    ("relu", torch.bfloat16, False),
    ("tanh", torch.float32, False),
    ("tanh", torch.bfloat16, True),
    ("gelu", torch.float32, True),
    ("silu", torch.float32, True),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation, dtype, kept", KEPT, ids=str)
def test_residual_is_free_unless_backward_needs_it(
    activation, dtype, kept, training, implementation, device
) -> None:
    t = example((4, 3, 2), dtype, device)
    x = t["input"].requires_grad_()
    residual = torch.randn(4, 3, 2, device=device).to(dtype)
    alive = weakref.ref(residual)
    y = fused.batch_norm(**t, training=training, residual=residual, activation=activation)
    del residual
    gc.collect()
    assert (alive() is not None) == kept
    y.sum().backward()
    assert x.grad is not None


def saved_bytes(call: Callable[[], Any]) -> dict[torch.dtype, int]:
    """Bytes of what autograd keeps, by dtype, each memory once"""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    sizes: dict[torch.dtype, int] = {}
    for t in found.values():
        sizes[t.dtype] = sizes.get(t.dtype, 0) + t.numel() * t.element_size()
    return sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_signs_are_a_sixteenth_of_the_input(dtype, device) -> None:
    pytest.importorskip("triton")
    t = example((4, 16, 4, 4), dtype, device, residual=True)
    t["input"].requires_grad_()
    with fused.backend.use("triton"):
        sizes = saved_bytes(lambda: fused.batch_norm(**t, training=True, activation="relu"))
        assert sizes[torch.uint8] == t["input"].numel() * dtype.itemsize // 16
        with torch.no_grad():
            assert not saved_bytes(lambda: fused.batch_norm(**t, training=True, activation="relu"))


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu"])
def test_what_stands_before_the_activation_is_never_written(
    activation, with_residual, implementation, monkeypatch, device
) -> None:
    """Forward and backward take no memory of half the input's size but the results'."""
    monkeypatch.setattr(eager, "_CHUNK", 64)
    t = example((32, 4, 8), torch.float32, device, residual=with_residual)
    leaves = [t[name].requires_grad_() for name in ("input", *["residual"] * with_residual)]
    with LargeResults(t["input"].numel() // 2) as forward:
        y = fused.batch_norm(**t, training=True, activation=activation)
    upstream = torch.ones_like(y)
    with LargeResults(t["input"].numel() // 2) as backward:
        gradients = torch.autograd.grad(y, leaves, upstream)
    given = {x.data_ptr() for x in (*leaves, upstream)}
    assert forward.seen - given == {y.data_ptr()}
    assert backward.seen - given - {y.data_ptr()} == {g.data_ptr() for g in gradients}


def formats(shape: tuple[int, ...]) -> dict[str, Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return {"contiguous": x, "transposed": x.transpose(0, 1).contiguous().transpose(0, 1)} | (
        {"channels last": last} if x.dim() > 2 else {}
    )


# Neighbours that are no multiple of a byte's, fewer than a byte's, one, and none beside another.
SIGNS = [(5, 19), (33, 3), (9, 1), (3, 5, 7, 7), (2, 3, 3), (2, 1, 13), (1, 4, 9), (4, 9, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SIGNS, ids=str)
def test_kernels_and_pytorch_pack_signs_alike(shape, dtype, device) -> None:
    pytest.importorskip("triton")
    from fused.kernels import batch_norm as kernels

    for x in formats(shape).values():
        x = x.to(device, dtype)
        options = {"eps": 1e-5, "correction": 0, "activation": "relu"}
        y, *_, signs = kernels.batch_norm_fwd(
            x, None, None, x, None, None, None, 0.0, skip_nonfinite=False, keep=True, **options
        )
        assert signs.shape == signs_shape(x)
        packed = pack_signs(y, x)
        assert packed.shape == signs.shape and packed.dtype == signs.dtype == torch.uint8
        for bits in (signs, packed):
            assert torch.equal(unpack_signs(bits, x), y > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_relu_with_a_residual(training, dtype, implementation, device) -> None:
    for x in formats((6, 11, 3, 3)).values():
        t = example((6, 11, 3, 3), dtype, device, residual=True)
        t["input"] = x.to(device, dtype)
        check_against_torch(t, implementation, training=training, activation="relu")


@pytest.mark.parametrize("wanted", ["input", "weight", "residual"])
def test_whatever_gradient_is_asked_for(wanted, implementation, device) -> None:
    """Also as what is differentiated again."""
    t = example((6, 3, 5), torch.float64, device, residual=True)
    leaf = t[wanted].requires_grad_()
    for activation in ("relu", "tanh", "gelu", None):
        results = []
        for function in (fused.batch_norm, torchs):
            y = function(**t, training=True, activation=activation)
            upstream = torch.ones_like(y).cumsum(0).requires_grad_()
            (first,) = torch.autograd.grad(y, leaf, upstream, retain_graph=True)
            (again,) = torch.autograd.grad(y, leaf, upstream, create_graph=True)
            (second,) = torch.autograd.grad(again.square().sum(), upstream)
            results.append((first, again, second))
        torch.testing.assert_close(*results)


def test_input_in_another_format_when_backward_comes(implementation, device) -> None:
    """Hooks that keep tensors elsewhere may give them back with other strides: signs are packed in
    the order that the forward pass saw."""
    t = example((3, 11, 5, 2), torch.float32, device, residual=True)
    upstream = torch.randn_like(t["input"])
    expected = run(torchs, t, upstream, training=True, activation="relu")
    last = t["input"].contiguous(memory_format=torch.channels_last)
    for x, change in ((last, Tensor.contiguous), (t["input"], to_channels_last)):
        with torch.autograd.graph.saved_tensors_hooks(change, lambda tensor: tensor):
            ours = run(
                fused.batch_norm, {**t, "input": x}, upstream, training=True, activation="relu"
            )
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5)


def to_channels_last(tensor: Tensor) -> Tensor:
    last = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
    return tensor.clone(memory_format=last)


def test_output_may_be_changed_where_signs_are_kept(implementation, device) -> None:
    """As behind torch's relu, autograd refuses where it is y that was kept."""
    t = example((6, 3, 2), torch.float32, device, residual=True)
    x = t["input"].requires_grad_()
    y = fused.batch_norm(**t, training=True, activation="relu")
    (expected,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    upstream = 2 * y.detach()
    y.add_(1.0)
    if implementation == "triton":
        torch.testing.assert_close(torch.autograd.grad(y, x, upstream)[0], expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, x, upstream)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_relu_stops_and_passes_what_torchs_does(with_residual, implementation, device) -> None:
    """An infinite gradient stops where the output is 0, as it is of -inf; a NaN in the output lets
    gradients by."""
    t = example((4, 2), torch.float32, device)
    residual = torch.tensor([[-50.0, 50.0]] * 4, device=device)
    if with_residual:
        t["residual"] = residual.clone()
        t["residual"][0, 0] = float("nan")
        t["residual"][2, 0] = -float("inf")
    else:
        t["bias"] = residual[0].clone()
        t["input"][2, 0] = -float("inf")
    upstream = torch.ones(4, 2, device=device)
    upstream[1, 0] = float("inf")
    results = [
        run(f, t, upstream, training=False, activation="relu") for f in (fused.batch_norm, torchs)
    ]
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], equal_nan=True)
    assert results[0]["dinput"][1, 0] == 0 and results[0]["output"][2, 0] == 0


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shape", [(9, 3), (9, 3, 5)], ids=str)
def test_relu_stops_at_0(shape, with_residual, implementation, device) -> None:
    t = example(shape, torch.float32, device, residual=with_residual)
    for name in ("weight", "bias", "residual")[: 2 + with_residual]:
        t[name].zero_()
    found = run(fused.batch_norm, t, torch.ones_like(t["input"]), training=True, activation="relu")
    for name in ("dbias", "dweight", *["dresidual"] * with_residual):
        assert not found[name].any(), name


def test_signs_lie_along_what_is_adjacent_in_memory() -> None:
    assert by_channel(torch.empty(4, 3, 1)) and not by_channel(torch.empty(4, 3, 5))
    assert not by_channel(torch.empty(4, 1, 1))
    x = torch.empty(2, 20, 3, 5, dtype=torch.bfloat16)
    assert signs_shape(x) == (2, 20, 2)
    assert signs_shape(x.contiguous(memory_format=torch.channels_last)) == (30, 3)
    assert signs_shape(torch.empty(20, 3).T) == (1, 20, 1)
