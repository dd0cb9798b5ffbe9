"""fused.batch_norm on the closed forms and on the Triton kernels, against torch's."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fused
from fused.eager import batch_norm as eager
from fused.eager import layout
from tests.exactness import PHASES, assert_as_exact_as, ulps_for

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Two rows, one channel, around powers of two, more than one tile of rows in every dtype.
SHAPES = [(2, 3), (32, 64), (7, 1), (33, 65), (127, 5), (129, 200), (1100, 3)]
INNER = [(4, 5, 7), (3, 5, 4, 6), (2, 3, 2, 3, 4), (5, 2, 1), (2, 3, 1, 1)]
ACTIVATIONS: dict[str | None, Any] = {
    None: lambda z: z,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the closed form: several of rows, and of the positions of an image."""
    monkeypatch.setattr(eager, "_CHUNK", 32)
    monkeypatch.setattr(layout, "LEAST_POSITIONS", 2)


def example(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, residual: bool = False
) -> dict[str, Any]:
    """An input, parameters and running statistics, the last four as mixed precision keeps them."""
    generator = torch.Generator().manual_seed(hash(shape) % 2**31)
    other = torch.float64 if dtype == torch.float64 else torch.float32
    c = shape[1]
    tensors = {
        "input": (torch.randn(shape, generator=generator) * 2 + 0.5).to(device, dtype),
        "running_mean": torch.randn(c, generator=generator).to(device, other),
        "running_var": (torch.rand(c, generator=generator) + 0.5).to(device, other),
        "weight": (torch.randn(c, generator=generator) + 1).to(device, other),
        "bias": torch.randn(c, generator=generator).to(device, other),
    }
    if residual:
        tensors["residual"] = torch.randn(shape, generator=generator).to(device, dtype)
    return tensors


def torchs(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5, correction=0, activation=None, residual=None,
) -> Tensor:  # fmt: skip
    """Batch norm, residual and activation in torch's own operations.

    Bessel's correction goes through the identity: with n rows it is the biased form with
    weight * sqrt((n-1)/n) and eps * (n-1)/n.
    """
    if correction == 1 and training:
        n = input.numel() // input.shape[1]
        share = (n - 1) / n
        if weight is None:
            weight = torch.ones_like(running_mean if running_mean is not None else input[0])
        weight, eps = weight * share**0.5, eps * share
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return ACTIVATIONS[activation](z if residual is None else z + residual)


def directly(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1,
    eps=1e-5, correction=0, activation=None, residual=None,
) -> Tensor:  # fmt: skip
    """The same from its definition, for float64, with autograd's gradients."""
    dims = [d for d in range(input.dim()) if d != 1]
    mean, var = running_mean, running_var
    if training:
        mean, var = input.mean(dims), input.var(dims, correction=correction)
        batch = {0: mean, 1: input.var(dims, correction=1)}
        with torch.no_grad():
            for i, running in enumerate((running_mean, running_var)):
                if running is not None:
                    running.copy_((1 - momentum) * running + momentum * batch[i])

    def across(vector: Tensor) -> Tensor:
        return vector.view(1, -1, *[1] * (input.dim() - 2))

    z = (input - across(mean)) * across((var + eps).rsqrt())
    z = z if weight is None else z * across(weight)
    z = z if bias is None else z + across(bias)
    return ACTIVATIONS[activation](z if residual is None else z + residual)


def run(function, tensors: dict[str, Any], upstream: Tensor, **options) -> dict[str, Tensor]:
    """Output, gradients and running statistics of one call."""
    t = {k: v if v is None else v.detach() for k, v in tensors.items()}
    for name in ("running_mean", "running_var"):
        t[name] = t[name] if t[name] is None else t[name].clone()
    leaves = {
        name: t[name].requires_grad_()
        for name in ("input", "weight", "bias", "residual")
        if t.get(name) is not None
    }
    output = function(**t, **options)
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream.to(output.dtype))
    results = {"output": output}
    results |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return results | {k: t[k] for k in ("running_mean", "running_var") if t[k] is not None}


def check_against_torch(tensors: dict[str, Any], implementation: str, **options) -> None:
    """Output, gradients and running statistics are as exact as torch's, or as torch's through the
    identity, measured by the definition in float64."""
    generator = torch.Generator().manual_seed(1)
    x = tensors["input"]
    upstream = torch.randn(x.shape, generator=generator).to(x)
    ours = run(fused.batch_norm, tensors, upstream, **options)
    # Contiguous: torch's own backward is wrong for some other strides, see the pitfalls' tests.
    plain = {k: v if v is None else v.contiguous() for k, v in tensors.items()}
    theirs = run(torchs, plain, upstream, **options)
    exactly = {k: v if v is None else v.double() for k, v in plain.items()}
    exact = run(directly, exactly, upstream, **options)
    # Gradients are sums and differences of terms that may cancel: measured by the terms, sums by
    # the sum of their magnitudes (a normal variable's mean magnitude is 0.8).
    dims = [d for d in range(x.dim()) if d != 1]
    weight = tensors.get("weight")
    slope = torch.ones(x.shape[1], device=x.device) if weight is None else weight.double()
    rstd = (x.double().var(dims) + 1e-5).rsqrt()
    terms = upstream.abs().max().item()
    z = run(directly, exactly, upstream, **{**options, "activation": None})["output"]
    scales = {
        "output": z.abs().max().item(),
        "running_mean": x.abs().max().item(),
        "dinput": terms * (slope * rstd).abs().max().item(),
        "dweight": 0.8 * 0.8 * x.numel() / x.shape[1],
        "dbias": 0.8 * x.numel() / x.shape[1],
    }
    for name in ours:
        ulps = ulps_for(ours[name].dtype, implementation)  # twice: statistics are rounded before
        size = max(scales.get(name, 0.0), exact[name].abs().max().item())
        assert_as_exact_as(
            ours[name], theirs[name], exact[name], ulps=2 * ulps, scale=size, what=name
        )


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_torch(shape, dtype, training, correction, implementation, device) -> None:
    tensors = example(shape, dtype, device)
    check_against_torch(tensors, implementation, training=training, correction=correction)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", INNER, ids=str)
def test_inner_dimensions(shape, dtype, training, channels_last, implementation, device) -> None:
    tensors = example(shape, dtype, device)
    if channels_last:
        if len(shape) not in CHANNELS_LAST:
            pytest.skip("has no such format")
        x = tensors["input"].contiguous(memory_format=CHANNELS_LAST[len(shape)])
        tensors["input"] = x
    check_against_torch(tensors, implementation, training=training)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu", None])
def test_activation_and_residual(
    activation, training, correction, with_residual, implementation, device
) -> None:
    for dtype in (torch.float32, torch.float64):
        tensors = example((3, 5, 4, 6), dtype, device, with_residual)
        options = {"training": training, "correction": correction, "activation": activation}
        check_against_torch(tensors, implementation, **options)


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu"])
def test_activation_in_half_precision(activation, implementation, device) -> None:
    """z is not rounded before the activation, so against float64 we are closer than torch."""
    tensors = example((32, 64), torch.bfloat16, device, residual=True)
    check_against_torch(tensors, implementation, training=True, activation=activation)


@pytest.mark.parametrize("dtype, end", [(torch.float32, 0.4), (torch.float64, 0.1)], ids=str)
def test_tanh_of_the_kernels_next_to_0(dtype, end, device) -> None:
    """Good to some units in its own last place, on both sides of where its series ends."""
    pytest.importorskip("triton")
    x = torch.linspace(-end, end, 4000, dtype=dtype, device=device).view(-1, 4)
    mean, var = torch.zeros_like(x[0]), torch.ones_like(x[0])
    with fused.backend.use("triton"):
        y = fused.batch_norm(x, mean, var, eps=0.0, activation="tanh")
    units = 5 if device.type == "cpu" else 8  # a GPU's exp2 and rsqrt are good to 2 each
    rtol = units * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_tanh_keeps_its_digits_where_tanh_is_near_1(dtype, device) -> None:
    """1 - tanh^2 has none left there, in float32 from 9 on."""
    pytest.importorskip("triton")
    x = torch.linspace(-40, 40, 801, dtype=dtype, device=device)[:, None].requires_grad_()
    mean, var = (
        torch.zeros(1, dtype=dtype, device=device),
        torch.ones(1, dtype=dtype, device=device),
    )
    with fused.backend.use("triton"):
        y = fused.batch_norm(x, mean, var, eps=1e-30, activation="tanh")
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    # exp(-|x|) of a float32 |x| that was rounded: |x| units.
    rtol = 60 * torch.finfo(dtype).eps
    torch.testing.assert_close(dx.double(), x.double().cosh() ** -2, rtol=rtol, atol=0)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("layouts", list(itertools.permutations(["last", "first", "neither"])))
def test_residual_and_gradient_in_other_formats_than_the_input(
    layouts, activation, implementation, device
) -> None:
    t = example((3, 5, 4, 6), torch.float32, device, residual=True)
    convert = {
        "last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "first": lambda x: x.contiguous(),
        "neither": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    }
    x, residual = (convert[layouts[i]](t[n]) for i, n in enumerate(("input", "residual")))
    upstream = convert[layouts[2]](torch.randn_like(x))
    expected = run(torchs, t, upstream.contiguous(), training=True, activation=activation)
    strided = {**t, "input": x, "residual": residual}
    ours = run(fused.batch_norm, strided, upstream, training=True, activation=activation)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5)


def test_notebook_gradient_within_2e_9(implementation, device) -> None:
    """At the notebook's shape in float32, dhprebn is within 2e-9 of the chunked steps' autograd,
    for an upstream gradient of the size that the notebook has there."""
    t = example((32, 64), torch.float32, device)
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
def test_running_variance_is_unbiased_whatever_the_correction(
    correction, implementation, device
) -> None:
    x = example((9, 3, 4), torch.float32, device)["input"]
    mean, var = torch.zeros(3, device=device), torch.zeros(3, device=device)
    fused.batch_norm(x, mean, var, training=True, momentum=1.0, correction=correction)
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(var, x.var((0, 2)))


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_running_statistics_are_seen_to_change(buffer, implementation, device) -> None:
    """Autograd's version counter moves, so a graph that saved the old values refuses to run."""
    t = example((9, 3), torch.float32, device)
    scale = torch.ones(3, device=device, requires_grad=True)
    saved = (scale * t[buffer]).sum()
    fused.batch_norm(**t, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_evaluation_backward_does_not_follow_later_statistics(implementation, device) -> None:
    t = example((9, 3), torch.float32, device)
    x = t["input"].requires_grad_()
    y = fused.batch_norm(**t, training=False)
    expected = t["weight"] * (t["running_var"] + 1e-5).rsqrt()
    t["running_var"].fill_(100.0)
    t["running_mean"].fill_(100.0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, expected.expand_as(x))


MODULES: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.3},
    "cumulative": {"momentum": None},
    "negative momentum": {"momentum": -0.1},
    "frozen": {"momentum": 0.0, "eps": 0.5},
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "cumulative, of none": {"momentum": None, "track_running_stats": False},
}
TWINS = {
    "1d": (fused.BatchNorm1d, nn.BatchNorm1d, (9, 5)),
    "1d with length": (fused.BatchNorm1d, nn.BatchNorm1d, (4, 5, 3)),
    "2d": (fused.BatchNorm2d, nn.BatchNorm2d, (4, 5, 3, 2)),
    "3d": (fused.BatchNorm3d, nn.BatchNorm3d, (2, 5, 3, 2, 2)),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("twin", TWINS)
def test_module_is_torchs_twin(twin, kind, implementation, device) -> None:
    """Three steps of training, then evaluation: outputs and buffers are torch's, and `state_dict`s
    go both ways."""
    Ours, Theirs, shape = TWINS[twin]
    ours, theirs = (
        Ours(5, **MODULES[kind], device=device),
        Theirs(5, **MODULES[kind], device=device),
    )
    assert isinstance(ours, Theirs)
    theirs.load_state_dict(ours.state_dict())
    for seed in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        torch.testing.assert_close(ours(x), theirs(x))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_module_whose_tracking_is_switched_off(implementation, device) -> None:
    """Its statistics stay as they are, and still serve evaluation."""
    ours, theirs = fused.BatchNorm1d(5, device=device), nn.BatchNorm1d(5, device=device)
    x = torch.randn(9, 5, device=device)
    for norm in (ours, theirs):
        norm.track_running_stats = False
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.num_batches_tracked == 0 and not ours.running_mean.any()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_module_options(implementation, device) -> None:
    module = fused.BatchNorm2d(5, correction=1, activation="relu", device=device)
    assert "correction=1, activation='relu'" in repr(module)
    x, residual = torch.randn(2, 4, 5, 3, 2, device=device)
    expected = F.relu(
        (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        + residual
    )
    torch.testing.assert_close(module(x, residual), expected)
    with pytest.raises(ValueError, match="expected 4D input"):
        module(x[0])
    careful = fused.BatchNorm1d(5, skip_nonfinite=True, device=device)
    assert repr(careful).endswith("track_running_stats=True, skip_nonfinite=True)")
    x = x[:, :, 0, 0].clone()
    x[1, 2] = torch.inf
    careful(x)
    assert careful.running_mean.isfinite().all() and careful.running_mean[2] == 0


X, C = torch.zeros(4, 3), torch.ones(3)
# (error, call, message): the error is the one that torch raises for the same mistake.
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "one row": (
        ValueError,
        {"input": X[:1], "running_mean": C, "running_var": C, "training": True},
        "more than 1 value per channel",
    ),
    "no statistics": (
        RuntimeError,
        {"input": X, "running_mean": None, "running_var": None},
        "in evaluation, got None",
    ),
    "one row of no channels": (
        ValueError,
        {"input": X[:1, :0], "running_mean": None, "running_var": None, "training": True},
        "more than 1 value per channel",
    ),
    "half of them": (
        ValueError,
        {"input": X, "running_mean": C, "running_var": None, "training": True},
        "only one of them",
    ),
    "half of them in evaluation": (
        RuntimeError,
        {"input": X, "running_mean": C, "running_var": None},
        "in evaluation, got None",
    ),
    "momentum": (
        TypeError,
        {"input": X, "running_mean": C, "running_var": C, "momentum": None},
        "momentum to be a number, got None",
    ),
    "shape": (
        RuntimeError,
        {"input": X, "running_mean": C[:2], "running_var": C},
        r"running_mean of shape \(3,\).* got \(2,\)",
    ),
    "weight": (
        RuntimeError,
        {"input": X, "running_mean": C, "running_var": C, "weight": C[:2]},
        r"weight of shape \(3,\)",
    ),
    "dtype": (
        RuntimeError,
        {"input": X, "running_mean": C, "running_var": C, "weight": C.half(), "bias": C.half()},
        "weight of torch.float16 beside running_mean of torch.float32",
    ),
    "integers": (
        NotImplementedError,
        {"input": X.long(), "running_mean": C, "running_var": C},
        "got torch.int64",
    ),
    "8 bits": (
        NotImplementedError,
        {"input": X.to(torch.float8_e4m3fn), "running_mean": C, "running_var": C},
        "got torch.float8_e4m3fn",
    ),
    "device": (
        RuntimeError,
        {"input": X, "running_mean": C.to("meta"), "running_var": C},
        "on cpu.* got meta",
    ),
    "gradient": (
        RuntimeError,
        {
            "input": X,
            "running_mean": C.clone().requires_grad_(),
            "running_var": C,
            "training": True,
        },
        "does not require grad",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refuses_what_torch_refuses(mistake) -> None:
    error, arguments, message = REFUSED[mistake]
    with pytest.raises(error, match=message):
        fused.batch_norm(**arguments)
    with pytest.raises(error):
        F.batch_norm(**arguments)


def test_eps(implementation, device) -> None:
    """0 only in evaluation, as in torch 2.13; before that, torch refuses other ones."""
    t = example((9, 3), torch.float32, device)
    expected = (t["input"] - t["running_mean"]) / t["running_var"].sqrt() * t["weight"] + t["bias"]
    torch.testing.assert_close(fused.batch_norm(**t, eps=0.0), expected)
    with pytest.raises(ValueError, match="eps must be positive, got 0.0"):
        fused.batch_norm(**t, training=True, eps=0.0)
    with pytest.raises(ValueError, match="eps must be positive or 0, got -1e-05"):
        fused.batch_norm(**t, eps=-1e-5)


@pytest.mark.parametrize(
    "options, message",
    [({"correction": 2}, "got 2"), ({"activation": "sine"}, "got 'sine'")],
    ids=["correction", "activation"],
)
def test_refuses_unknown_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        fused.batch_norm(X, C, C, **options)
    with pytest.raises(ValueError, match=message):
        fused.BatchNorm1d(3, **options)


def test_refuses_a_residual_that_does_not_fit() -> None:
    for residual in (X[:2], X.double()):
        with pytest.raises(RuntimeError, match=r"residual of input's shape \(4, 3\)"):
            fused.batch_norm(X, C, C, residual=residual)


def test_no_channels_have_no_variance_to_lack(implementation, device) -> None:
    assert fused.batch_norm(torch.zeros(5, 0, device=device), None, None, training=True).shape == (
        5,
        0,
    )


def test_refuses_our_options_where_there_are_no_channels() -> None:
    for options in ({"activation": "relu"}, {"residual": C}):
        with pytest.raises(
            RuntimeError, match=r"expected input of shape \(N, C, ...\), got \(3,\)"
        ):
            fused.batch_norm(C, None, None, training=True, **options)


@st.composite
def calls(draw) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes, strides, dtypes and options of a call that torch accepts."""
    dims = draw(st.integers(2, 5))
    shape = tuple(draw(st.integers(2 if i == 0 else 1, 40 if i == 0 else 6)) for i in range(dims))
    tensors = example(shape, draw(st.sampled_from(DTYPES)), "cpu", draw(st.booleans()))
    for name in ("input", "residual"):
        if name in tensors:
            order = draw(st.permutations(range(dims)))
            back = [order.index(i) for i in range(dims)]
            tensors[name] = tensors[name].permute(order).contiguous().permute(back)
    for name in ("weight", "bias"):
        if draw(st.booleans()):
            tensors[name] = None
    options = {
        "training": draw(st.booleans()),
        "correction": draw(st.sampled_from([0, 1])),
        "activation": draw(st.sampled_from(list(ACTIVATIONS))),
        "momentum": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "eps": draw(st.sampled_from([1e-5, 1e-3])),
    }
    return tensors, options


@settings(
    max_examples=60,
    phases=PHASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(call=calls())
def test_any_call(call, small_chunks, implementation, device) -> None:
    tensors, options = call
    tensors = {k: v if v is None else v.to(device) for k, v in tensors.items()}
    check_against_torch(tensors, implementation, **options)
