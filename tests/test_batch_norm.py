"""fused.batch_norm on the closed forms and on the Triton kernels, against torch's."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from tests.exactness import assert_as_exact_as, ulps_for

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Two rows, one channel, around powers of two, more than one tile of rows in every dtype.
SHAPES = [(2, 3), (32, 64), (7, 1), (33, 65), (127, 5), (129, 200), (1100, 3)]


def example(n: int, c: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """An input, parameters and running statistics, the last four as mixed precision keeps them."""
    generator = torch.Generator().manual_seed(n * 10007 + c)
    other = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "input": (torch.randn(n, c, generator=generator) * 2 + 0.5).to(device, dtype),
        "running_mean": torch.randn(c, generator=generator).to(device, other),
        "running_var": (torch.rand(c, generator=generator) + 0.5).to(device, other),
        "weight": (torch.randn(c, generator=generator) + 1).to(device, other),
        "bias": torch.randn(c, generator=generator).to(device, other),
    }


def bessel(input, running_mean, running_var, weight, bias, training, eps=1e-5) -> Tensor:
    """Bessel-corrected batch norm through torch's own: with n rows it is the biased one with
    weight * sqrt((n-1)/n) and eps * (n-1)/n."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, eps=eps)
    share = (input.shape[0] - 1) / input.shape[0]
    return F.batch_norm(
        input, running_mean, running_var, weight * share**0.5, bias, True, eps=eps * share
    )


def run(function, tensors: dict[str, Tensor], upstream: Tensor, **options) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one call."""
    t = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    leaves = [t[name].requires_grad_() for name in ("input", "weight", "bias")]
    output = function(**t, **options)
    gradients = torch.autograd.grad(output, leaves, upstream.to(output.dtype))
    names = ("output", "dinput", "dweight", "dbias", "running_mean", "running_var")
    values = (output, *gradients, t["running_mean"], t["running_var"])
    return dict(zip(names, values, strict=True))


def check_against_torch(
    tensors: dict[str, Tensor], implementation: str, correction: int, **options
) -> None:
    generator = torch.Generator().manual_seed(1)
    shape, device = tensors["input"].shape, tensors["input"].device
    upstream = torch.randn(shape, generator=generator).to(device)
    torchs = F.batch_norm if correction == 0 else bessel
    ours = run(fused.batch_norm, tensors, upstream, correction=correction, **options)
    theirs = run(torchs, tensors, upstream, **options)
    exact = run(torchs, {k: v.double() for k, v in tensors.items()}, upstream, **options)
    # dx is a difference of terms of the size of weight * rstd * dy; for two rows they cancel.
    x, weight = tensors["input"].double(), tensors["weight"].double()
    scale = (weight * (x.var(0) + 1e-5).rsqrt() * upstream).abs().max().item()
    for name in ours:
        ulps = ulps_for(ours[name].dtype, implementation)  # twice: statistics are rounded before
        assert_as_exact_as(
            ours[name],
            theirs[name],
            exact[name],
            ulps=2 * ulps,
            scale=scale if name == "dinput" else None,
            what=name,
        )


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, c", SHAPES)
def test_matches_torch(n, c, dtype, training, correction, implementation, device) -> None:
    tensors = example(n, c, dtype, device)
    check_against_torch(tensors, implementation, correction, training=training)


def test_notebook_gradient_within_2e_9(implementation, device) -> None:
    """At the notebook's shape in float32, dhprebn is within 2e-9 of the chunked steps' autograd,
    for an upstream gradient of the size that the notebook has there."""
    t = example(32, 64, torch.float32, device)
    x = t["input"].requires_grad_()
    upstream = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(device) * 3e-3
    diff = x - 1 / 32 * x.sum(0, keepdim=True)
    var = 1 / 31 * (diff**2).sum(0, keepdim=True)
    y = t["weight"] * (diff * (var + 1e-5) ** -0.5) + t["bias"]
    (expected,) = torch.autograd.grad(y, x, upstream)
    ours = fused.batch_norm(x, None, None, t["weight"], t["bias"], True, correction=1)
    (dx,) = torch.autograd.grad(ours, x, upstream)
    torch.testing.assert_close(dx, expected, rtol=0, atol=2e-9)


@pytest.mark.parametrize("correction", [0, 1])
def test_evaluation_has_its_own_gradient(correction, implementation, device) -> None:
    """Frozen statistics do not depend on the input: dx = weight * rstd * dy, row by row."""
    t = example(5, 3, torch.float32, device)
    x = t["input"].requires_grad_()
    y = fused.batch_norm(**t, training=False, correction=correction)
    upstream = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(dx, upstream * t["weight"] * (t["running_var"] + 1e-5).rsqrt())


@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_without_weight_or_bias(given, training, implementation, device) -> None:
    t = example(9, 3, torch.float32, device)
    for name in {"weight", "bias"} - {given}:
        t[name] = None
    t["input"].requires_grad_()
    copies = {k: v if v is None else v.detach().clone() for k, v in t.items()}
    copies["input"].requires_grad_()
    ours = fused.batch_norm(**t, training=training)
    theirs = F.batch_norm(**copies, training=training)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    theirs.backward(upstream)
    torch.testing.assert_close(t["input"].grad, copies["input"].grad)


STRIDES = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced channels": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one channel expanded": lambda x: x[:, :1].expand_as(x),
    "pointer off by one": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("strides", STRIDES)
def test_non_contiguous_input_and_gradient(strides, training, implementation, device) -> None:
    t = example(33, 5, torch.float32, device)
    plain = t["input"].requires_grad_()
    ours = fused.batch_norm(**{**t, "input": STRIDES[strides](plain)}, training=training)
    upstream = STRIDES[strides](torch.randn_like(ours))
    (dx,) = torch.autograd.grad(ours, plain, upstream)
    t = example(33, 5, torch.float32, device)
    plain = t["input"].requires_grad_()
    theirs = F.batch_norm(**{**t, "input": STRIDES[strides](plain)}, training=training)
    (expected,) = torch.autograd.grad(theirs, plain, upstream)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_stride_0(implementation, device) -> None:
    """`.sum()` sends back one number with stride 0: the gradient of the sum is 0 but for weight."""
    t = example(33, 5, torch.float32, device)
    x = t["input"].requires_grad_()
    fused.batch_norm(**t, training=True).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("correction", [0, 1])
def test_large_offset(correction, implementation, device) -> None:
    """Mean 1e4, standard deviation 1, float32: the variance is right to 1e-3 (E[x^2] - E[x]^2
    would be off by all of it)."""
    n = 2000
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    x = x.to(device, torch.float32)
    mean, var = torch.zeros(3, device=device), torch.zeros(3, device=device)
    y = fused.batch_norm(x, mean, var, training=True, momentum=1.0, correction=correction)
    torch.testing.assert_close(var.double(), x.double().var(0), rtol=1e-3, atol=0)
    expected = (x.double() - x.double().mean(0)) / x.double().var(0, correction=correction).sqrt()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3)


def test_constant_channel(implementation, device) -> None:
    x = torch.full((32, 3), 7.0, device=device, requires_grad=True)
    y = fused.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=0)
    y.backward(torch.randn_like(y))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("correction", [0, 1])
def test_running_variance_is_unbiased_whatever_the_correction(
    correction, implementation, device
) -> None:
    x = example(9, 3, torch.float32, device)["input"]
    mean, var = torch.zeros(3, device=device), torch.zeros(3, device=device)
    fused.batch_norm(x, mean, var, training=True, momentum=1.0, correction=correction)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(var, x.var(0))


def test_running_statistics_are_seen_to_change(implementation, device) -> None:
    """Autograd's version counter moves, so a graph that saved the old values refuses to run."""
    t = example(9, 3, torch.float32, device)
    scale = torch.ones(3, device=device, requires_grad=True)
    saved = (scale * t["running_var"]).sum()
    fused.batch_norm(**t, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_evaluation_backward_does_not_follow_later_statistics(implementation, device) -> None:
    t = example(9, 3, torch.float32, device)
    x = t["input"].requires_grad_()
    y = fused.batch_norm(**t, training=False)
    expected = t["weight"] * (t["running_var"] + 1e-5).rsqrt()
    t["running_var"].fill_(100.0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, expected.expand_as(x))


def test_input_is_never_changed(implementation, device) -> None:
    t = example(33, 5, torch.float32, device)
    before = t["input"].clone()
    t["input"].requires_grad_()
    fused.batch_norm(**t, training=True).square().sum().backward()
    torch.testing.assert_close(t["input"].detach(), before, rtol=0, atol=0)


def test_empty_batch(implementation, device) -> None:
    t = example(0, 3, torch.float32, device)
    t["weight"].requires_grad_()
    before = t["running_mean"].clone()
    y = fused.batch_norm(**t, training=True)
    assert y.shape == (0, 3)
    y.sum().backward()
    torch.testing.assert_close(t["weight"].grad, torch.zeros_like(t["weight"]))
    torch.testing.assert_close(t["running_mean"], before)


def test_two_runs_are_bitwise_equal(implementation, device) -> None:
    t = example(1100, 65, torch.float32, device)
    upstream = torch.randn_like(t["input"])
    first, second = (run(fused.batch_norm, t, upstream, training=True) for _ in range(2))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradcheck(training, correction, implementation, device) -> None:
    t = example(4, 3, torch.float64, device)
    mean, var = t["running_mean"], t["running_var"]

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fused.batch_norm(x, mean.clone(), var.clone(), w, b, training, correction=correction)

    leaves = [t[name].requires_grad_() for name in ("input", "weight", "bias")]
    torch.autograd.gradcheck(function, leaves)


MODULES: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.3},
    "cumulative": {"momentum": None},
    "negative momentum": {"momentum": -0.1},
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


@pytest.mark.parametrize("kind", MODULES)
def test_module_matches_torchs(kind, implementation, device) -> None:
    """Three steps of training, then evaluation: outputs and buffers are torch's."""
    ours = fused.BatchNorm1d(5, **MODULES[kind], device=device)
    theirs = torch.nn.BatchNorm1d(5, **MODULES[kind], device=device)
    theirs.load_state_dict(ours.state_dict())
    for seed in range(3):
        x = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)).to(device)
        torch.testing.assert_close(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict())
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_module_buffers_match_torchs(implementation, device) -> None:
    ours = fused.BatchNorm1d(5, momentum=None, device=device)
    theirs = torch.nn.BatchNorm1d(5, momentum=None, device=device)
    for seed in range(3):
        x = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)).to(device)
        ours(x), theirs(x)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


def test_module_with_bessels_correction(implementation, device) -> None:
    module = fused.BatchNorm1d(5, correction=1, device=device)
    assert "correction=1" in repr(module)
    x = torch.randn(9, 5, device=device)
    expected = (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt()
    torch.testing.assert_close(module(x), expected)


X, C = torch.zeros(4, 3), torch.ones(3)
REFUSED = {
    "one row": (lambda: fused.batch_norm(X[:1], C, C, training=True), "more than 1 row"),
    "3-D": (lambda: fused.batch_norm(X[None], C, C), r"shape \(N, C\), got \(1, 4, 3\)"),
    "correction": (lambda: fused.batch_norm(X, C, C, correction=2), "got 2"),
    "no statistics": (lambda: fused.batch_norm(X, None, C), "running_mean and running_var"),
    "weight": (lambda: fused.batch_norm(X, C, C, weight=C[:2]), r"weight of shape \(3,\)"),
    "device": (lambda: fused.batch_norm(X, C, C, weight=C.to("meta")), "on cpu.* got meta"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refuses(mistake) -> None:
    call, message = REFUSED[mistake]
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_integers() -> None:
    with pytest.raises(TypeError, match="got torch.int64"):
        fused.batch_norm(X.long(), C, C)
