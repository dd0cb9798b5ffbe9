"""Derivatives of every kind, torch.compile, and PyTorch's own samples for batch norm."""

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fused
from fused.eager import batch_norm_small
from tests.exactness import same_bits
from tests.test_batch_norm import (
    ACTIVATIONS,
    DTYPES,
    TWINS,
    check_against_torch,
    example,
    run,
    torchs,
)


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu", None])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradcheck_and_gradgradcheck(
    training, correction, activation, implementation, device
) -> None:
    t = example((2, 2, 2), torch.float64, device, residual=True)
    mean, var = t["running_mean"], t["running_var"]
    names = ("input", "weight", "bias", "residual")

    def function(*leaves: Tensor) -> Tensor:
        return fused.batch_norm(
            **dict(zip(names, leaves, strict=True)), running_mean=mean.clone(),
            running_var=var.clone(), training=training, correction=correction,
            activation=activation,
        )  # fmt: skip

    leaves = [t[name].requires_grad_() for name in names]
    torch.autograd.gradcheck(function, leaves)
    # Second derivatives are torch's own operations on both. Triton's come of what it has kept: y
    # for tanh, signs for relu.
    if implementation == "eager" or (training and correction and activation in ("tanh", "relu")):
        torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradient_penalty_is_torchs(training, implementation, device) -> None:
    """A second derivative as people take it, in float32, with the channel parameters' as well."""
    results = []
    for function in (fused.batch_norm, torchs):
        t = example((6, 3, 4), torch.float32, device)
        x, w = t["input"].requires_grad_(), t["weight"].requires_grad_()
        y = function(**t, training=training, activation="tanh")
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), (x, w)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("again", [False, True])
def test_bias_gradient_beyond_the_range_of_half_precision(again, implementation, device) -> None:
    """Summed in float32, also where it is to be differentiated again."""
    norm = fused.BatchNorm1d(3, device=device)
    y = norm(torch.randn(512, 3, dtype=torch.float16, device=device))
    upstream = torch.full_like(y, 200.0)
    (gradient,) = torch.autograd.grad(y, norm.bias, upstream, create_graph=again)
    torch.testing.assert_close(gradient, torch.full_like(norm.bias, 512 * 200.0))


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_functional_derivatives(training, correction, implementation, device) -> None:
    t = example((4, 3, 2), torch.float64, device)
    mean, var = t.pop("running_mean"), t.pop("running_var")
    statistics = {} if training else {"running_mean": mean, "running_var": var}
    options: dict[str, Any] = {"training": training, "correction": correction}

    def loss(x: Tensor, w: Tensor) -> Tensor:
        arguments = {"running_mean": None, "running_var": None, **statistics, "bias": t["bias"]}
        return (
            fused.batch_norm(x, weight=w, activation="silu", **arguments, **options).square().sum()
        )

    x, w = t["input"].requires_grad_(), t["weight"].requires_grad_()
    expected = torch.autograd.grad(loss(x, w), (x, w))
    x, w = x.detach(), w.detach()
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(x, w), expected)
    torch.testing.assert_close(torch.func.jacrev(loss)(x, w), expected[0])
    several = torch.stack((x, x + 1, x * 2))
    by_batch = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(several, w)
    torch.testing.assert_close(by_batch[0], expected[0])


def test_functional_modules(implementation, device) -> None:
    """torch.func refuses to write to captured buffers, ours as torch's; without them it works."""
    x = torch.randn(9, 3, device=device)
    for Module in (fused.BatchNorm1d, nn.BatchNorm1d):
        norm = Module(3, device=device)
        with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
            torch.func.grad(lambda z, f=norm: f(z).square().sum())(x)
    ours, theirs = (
        Module(3, track_running_stats=False, device=device)
        for Module in (fused.BatchNorm1d, nn.BatchNorm1d)
    )
    gradients = [torch.func.grad(lambda z, f=f: (f(z) ** 3).sum())(x) for f in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_running_statistics_of_all_batches_of_a_vmap(implementation, device) -> None:
    norm = fused.BatchNorm1d(3, device=device)
    with pytest.raises(RuntimeError, match="running_var, which will be updated in place, were not"):
        torch.func.vmap(norm)(torch.randn(2, 9, 3, device=device))


@pytest.mark.parametrize("level", [contextlib.nullcontext, forward_ad.dual_level])
@pytest.mark.parametrize("rows", [6, 2000])
def test_a_checkpoint_updates_the_running_statistics_twice(
    rows, level, implementation, device
) -> None:
    """As torch's, at every size, though recomputation stops where nothing is left to save. The
    gradient is the one without it."""
    double: dict[str, Any] = {"dtype": torch.float64, "device": device}
    x = torch.randn(rows, 3, **double, requires_grad=True)
    norms = fused.BatchNorm1d(3, **double), nn.BatchNorm1d(3, **double)
    for norm in norms:

        def call(x: Tensor, norm: nn.Module = norm) -> Tensor:
            with level():
                return norm(x)

        found = torch.autograd.grad((checkpoint(call, x, use_reentrant=False) ** 3).sum(), x)
        assert norm.num_batches_tracked == 2
        expected = torch.autograd.grad((copy.deepcopy(norm)(x) ** 3).sum(), x)
        exact = same_bits(device) if level is contextlib.nullcontext else {}
        torch.testing.assert_close(found, expected, **exact)
    torch.testing.assert_close(norms[0].state_dict(), norms[1].state_dict())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager mode", "compiled"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "jacfwd", "vmap grad"])
def test_running_statistics_that_a_transform_captured(
    transform, compiled, implementation, device
) -> None:
    """The function updates them, as torch's does."""
    x = torch.randn(9, 3, device=device)
    results = []
    for batch_norm in (fused.batch_norm, F.batch_norm):
        running: tuple[Tensor, ...] = torch.zeros(3, device=device), torch.ones(3, device=device)

        def loss(x: Tensor, *running: Tensor, f: Any = batch_norm) -> Tensor:
            return (f(x, *running, training=True) ** 3).sum()

        def of(x: Tensor, f: Any = loss, r: Any = running) -> Tensor:
            return f(x, *r)

        def derivative(x: Tensor, *running: Tensor, f: Any = loss, of: Any = of) -> Tensor:
            if transform == "vmap grad":  # of batches, each with statistics of its own
                return torch.func.vmap(torch.func.grad(f))(torch.stack((x, 2 * x)), *running)
            if transform == "jvp":
                return torch.func.jvp(of, (x,), (x.square(),))[1]
            return getattr(torch.func, transform)(of)(x)

        if transform == "vmap grad":
            running = tuple(t.repeat(2, 1) for t in running)
        if compiled:
            derivative = torch.compile(derivative, backend="aot_eager", fullgraph=True)
        gradient = derivative(x, *running)
        results.append((gradient, *running))
    assert results[0][1].all()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("captured", ["both", "variance"])
def test_captured_running_statistics_as_others(captured, implementation, device) -> None:
    """Also where one of the two is an argument, and where what is not finite is left out."""
    x = torch.randn(9, 3, device=device)
    x[4, 1] = torch.inf

    def norm(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        options: Any = {"training": True, "skip_nonfinite": True}
        return fused.batch_norm(x, mean, var, **options).nan_to_num().sum()

    ours, expected = ((torch.zeros(3, device=device), torch.ones(3, device=device)) for _ in "ab")
    norm(x, *expected)
    if captured == "both":
        torch.func.grad(lambda x: norm(x, *ours))(x)
    else:
        torch.func.grad(lambda x, mean: norm(x, mean, ours[1]))(x, ours[0])
    torch.testing.assert_close(ours, expected)


def test_running_statistics_far_from_0_that_a_transform_captured(implementation, device) -> None:
    """Not of PyTorch's sums, one row after the other."""
    x = torch.randn(20_000, 2, device=device) + 1e4
    running = torch.zeros(2, device=device), torch.ones(2, device=device)
    torch.func.grad(lambda x: fused.batch_norm(x, *running, training=True, momentum=1.0).sum())(x)
    exact = x.double()
    torch.testing.assert_close(running[0].double(), exact.mean(0), rtol=2e-7, atol=0)
    torch.testing.assert_close(running[1].double(), exact.var(0), rtol=1e-5, atol=0)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A compiler without a past, in memory or on disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_compiled_without_a_break_and_with_the_bits_of_eager(
    channels_last, training, momentum, compiler, implementation, device
) -> None:
    results = []
    for compiled in (False, True):
        norm = fused.BatchNorm2d(
            3, momentum=momentum, activation="tanh", correction=1, device=device
        ).train(training)
        t = example((4, 3, 5, 2), torch.float32, device, residual=True)
        x, residual = t["input"], t["residual"].requires_grad_()
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        function = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
        for _ in range(2):
            y = function(x, residual)
        leaves = [x, residual, *norm.parameters()]
        results.append((y, *torch.autograd.grad(y.sum(), leaves), *norm.buffers()))
        assert y.stride() == x.stride()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("affine, residual, correction", [(True, True, 1), (False, False, 0)])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", None])
def test_compiled_small_steps_have_the_bits_of_eager(
    activation, affine, residual, correction, compiler, implementation, device
) -> None:
    """Eager mode leaves those on the CPU to PyTorch's own operations, where its kernel is exact:
    not of a mean that is far from 0."""
    for offset in (0.0, 1e4):
        results = []
        for compiled in (False, True):
            norm = fused.BatchNorm1d(
                5, affine=affine, activation=activation, correction=correction, device=device
            )
            t = example((33, 5), torch.float32, device, residual=True)
            leaves = [(t["input"] + offset).requires_grad_(), *norm.parameters()]
            if residual:
                leaves.append(t["residual"].requires_grad_())
            step = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
            y = step(leaves[0], leaves[-1] if residual else None)
            gradients = torch.autograd.grad(y, leaves, torch.cos(t["residual"].detach()))
            results.append((y, *gradients, *norm.buffers()))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("kind", ["evaluation", "cumulative", "skip_nonfinite"])
def test_compiled_small_calls_that_eager_mode_does_itself(
    kind, compiler, implementation, device
) -> None:
    """As small as those it leaves to PyTorch; with the bits of its own."""
    results = []
    for compiled in (False, True):
        norm = fused.BatchNorm1d(
            5, momentum=None if kind == "cumulative" else 0.1, activation="gelu", correction=1,
            skip_nonfinite=kind == "skip_nonfinite", device=device,
        ).train(kind != "evaluation")  # fmt: skip
        t = example((33, 5), torch.float32, device)
        leaves = [t["input"].requires_grad_(), *norm.parameters()]
        step = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
        y = step(leaves[0])
        gradients = torch.autograd.grad(y, leaves, torch.cos(leaves[0].detach()))
        results.append((y, *gradients, *norm.buffers()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_small_steps_skip_what_is_not_finite(compiler, implementation, device) -> None:
    results = []
    for compiled in (False, True):
        norm = fused.BatchNorm1d(5, skip_nonfinite=True, device=device)
        x = example((33, 5), torch.float32, device)["input"]
        x[3, 2] = float("inf")
        step = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
        results.append((step(x.requires_grad_()), *norm.buffers()))
        assert all(buffer.isfinite().all() for buffer in norm.buffers())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("activation", [None, "tanh", "relu", "gelu"])
@pytest.mark.parametrize("correction", [0, 1])
def test_compiled_small_steps_by_one_implementation_and_another(
    correction, activation, compiler, device
) -> None:
    """What the forward hands on is the same by either, though PyTorch's own knows one form only."""
    pytest.importorskip("triton")
    t = example((33, 5), torch.float32, device)
    upstream = torch.cos(t["input"])
    norm = fused.BatchNorm1d(5, correction=correction, activation=activation, device=device)
    results = []
    for backends in (("eager", "eager"), ("eager", "triton"), ("triton", "eager")):
        torch.compiler.reset()
        function = torch.compile(norm, fullgraph=True, backend="aot_eager")
        leaves = [t["input"].clone().requires_grad_(), norm.weight, norm.bias]
        with fused.backend.use(backends[0]):
            y = function(leaves[0])
        with fused.backend.use(backends[1]):
            results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled_by_inductor_with_dynamic_shapes(
    training, compiler, implementation, device
) -> None:
    ours, theirs = (
        fused.BatchNorm2d(3, activation="silu", device=device).train(training) for _ in range(2)
    )
    compiled = torch.compile(lambda x: ours(x * 2) + 1, fullgraph=True, dynamic=True)
    for n in (4, 9, 17):
        results = []
        for function in (compiled, lambda x: theirs(x * 2) + 1):
            x = example((n, 3, 5, 2), torch.float32, device)["input"].requires_grad_()
            y = function(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_signs_cross_a_compiled_graph(channels_last, compiler, implementation, device) -> None:
    """relu with a residual: the bits of eager mode; and right whichever implementation serves a
    graph that was compiled for another, forward and backward."""
    t = example((3, 5, 3, 3), torch.float32, device, residual=True)
    if channels_last:
        t["input"] = t["input"].contiguous(memory_format=torch.channels_last)
    norm = fused.BatchNorm2d(5, activation="relu", device=device)
    upstream = torch.randn_like(t["input"])

    def step(function: Any, *backends: str) -> tuple[Tensor, ...]:
        leaves = [t[name].detach().requires_grad_() for name in ("input", "residual")]
        with fused.backend.use(backends[0]):
            y = function(*leaves)
        with fused.backend.use(backends[-1]):
            return y, *torch.autograd.grad(y, [*leaves, norm.weight], upstream)

    expected = step(norm, implementation)
    function = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(function, implementation), expected, rtol=0, atol=0)
    other = {"eager": "triton", "triton": "eager"}[implementation]
    for backends in ((other,), (implementation, other), (other, implementation)):
        torch.testing.assert_close(step(function, *backends), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_residual", [False, True])
def test_half_precision_crosses_a_compiled_graph(with_residual, compiler, device) -> None:
    """Whichever implementation the graph was compiled for: only one of them keeps relu's output."""
    t = example((3, 5, 3, 3), torch.bfloat16, device, residual=True)
    names = ("input", "residual") if with_residual else ("input",)
    upstream = torch.randn_like(t["input"])
    norm = fused.BatchNorm2d(5, activation="relu", device=device)

    def step(function: Any, forward: str, backward: str) -> tuple[Tensor, ...]:
        leaves = [t[name].detach().requires_grad_() for name in names]
        with fused.backend.use(forward):
            y = function(*leaves)
        with fused.backend.use(backward):
            return y, *torch.autograd.grad(y, [*leaves, norm.weight], upstream)

    expected = step(norm, "eager", "eager")
    for first, second in (("triton", "eager"), ("eager", "triton")):
        torch.compiler.reset()
        function = torch.compile(norm, fullgraph=True, backend="aot_eager")
        for backends in ((first, first), (first, second), (second, first), (second, second)):
            torch.testing.assert_close(step(function, *backends), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("kind", ["training", "cumulative", "no statistics", "evaluation"])
def test_opcheck(kind, activation, implementation, device) -> None:
    t = example((3, 2, 4, 2), torch.float32, device, residual=True)
    tensors = [t[name] for name in ("input", "weight", "bias", "residual")]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    statistics = [t["running_mean"], t["running_var"]]
    if kind == "evaluation":
        operator = torch.ops.fused.batch_norm_eval
        arguments = (*tensors, *statistics, 1e-5, activation, True)
    else:
        operator = torch.ops.fused.batch_norm_fwd
        if kind == "no statistics":
            statistics = [None, None]
        tracked = torch.ones((), dtype=torch.int64, device=device)
        momentum = None if kind == "cumulative" else 0.1
        counter = tracked if kind == "cumulative" else None
        arguments = (*tensors, *statistics, counter, momentum, 1e-5, 1, activation, True, True)
    torch.library.opcheck(operator, arguments)
    with torch.no_grad():
        y, mean, rstd, signs, *_ = operator(*arguments)
    detached = [tensor.detach() for tensor in tensors[:3]]
    kept = signs if activation == "relu" else None
    options = (1e-5, 1, activation, kind != "evaluation", kind == "training")
    backward = (y, *detached, kept, mean, rstd, *options, activation is not None)
    torch.library.opcheck(torch.ops.fused.batch_norm_bwd, backward)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_opcheck_of_another_order_of_dimensions(training, implementation, device) -> None:
    """Neither contiguous nor channels_last: results have the strides that were promised."""
    t = example((3, 2, 4, 3), torch.float32, device, residual=True)
    x, residual = (t[name].mT.contiguous().mT for name in ("input", "residual"))
    tensors = (x, t["weight"], t["bias"], residual)
    statistics = (t["running_mean"], t["running_var"])
    if training:
        operator = torch.ops.fused.batch_norm_fwd
        options: tuple[Any, ...] = (None, 0.1, 1e-5, 0, "tanh", False, True)
    else:
        operator = torch.ops.fused.batch_norm_eval
        options = (1e-5, "tanh", True)
    torch.library.opcheck(operator, (*tensors, *statistics, *options), test_utils="test_faketensor")
    y, mean, rstd, *_ = operator(*tensors, *statistics, *options)
    backward = (y, *tensors[:3], y, mean, rstd, 1e-5, 0, "tanh", training, False, True)
    torch.library.opcheck(torch.ops.fused.batch_norm_bwd, backward, test_utils="test_faketensor")


@pytest.mark.filterwarnings("ignore")
def test_opcheck_of_narrow_parameters(implementation, device) -> None:
    """Their gradients and the new statistics have the dtypes that were promised."""
    t = {k: v.bfloat16() for k, v in example((4, 3, 5), torch.float32, device).items()}
    tensors = (t["input"], t["weight"], t["bias"], None)
    options = (None, 0.1, 1e-5, 0, None, False, True)
    arguments = (*tensors, t["running_mean"], t["running_var"], *options)
    operators = torch.ops.fused.batch_norm_fwd, torch.ops.fused.batch_norm_bwd
    torch.library.opcheck(operators[0], arguments, test_utils="test_faketensor")
    y, mean, rstd, *_ = operators[0](*arguments)
    backward = (y, *tensors, mean, rstd, 1e-5, 0, None, True, False, False)
    torch.library.opcheck(operators[1], backward, test_utils="test_faketensor")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_for_an_empty_batch_with_signs(compiler, implementation, device) -> None:
    norm = fused.BatchNorm2d(3, activation="relu", device=device)
    x, residual = (torch.zeros(0, 3, 2, 2, device=device, requires_grad=True) for _ in range(2))
    y = torch.compile(norm, fullgraph=True, backend="aot_eager")(x, residual)
    gradients = torch.autograd.grad(y.sum(), (x, residual, norm.weight))
    assert [g.shape for g in gradients] == [x.shape, x.shape, (3,)]
    assert norm.num_batches_tracked == 1


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_signs_are_taken_where_a_backward_needs_them(compiler, implementation, device) -> None:
    """Of relu with a residual, and of a call that may be differentiated."""
    t = example((3, 5, 3, 3), torch.float32, device, residual=True)
    tensors = [t[name] for name in ("input", "weight", "bias", "residual")]
    for residual, keep in ((True, True), (False, True), (True, False)):
        given = tensors if residual else [*tensors[:3], None]
        options = (None, None, None, 0.1, 1e-5, 0, "relu", False, keep)
        signs = torch.ops.fused.batch_norm_fwd(*given, *options)[3]
        assert (signs.numel() > 0) == (residual and keep)
    norm = fused.BatchNorm2d(5, activation="relu", device=device)
    with torch.no_grad():
        y = torch.compile(norm, fullgraph=True, backend="aot_eager")(t["input"], t["residual"])
        torch.testing.assert_close(y, norm(t["input"], t["residual"]), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["gelu", None])
def test_opcheck_of_small_steps(activation, implementation, device) -> None:
    t = example((33, 5), torch.float32, device, residual=True)
    names = ("input", "weight", "bias", "residual", "running_mean", "running_var")
    tensors = [t[name].requires_grad_(not name.startswith("running")) for name in names]
    arguments = (*tensors, None, 0.1, 1e-5, 1, activation, False, True)
    torch.library.opcheck(torch.ops.fused.batch_norm_fwd, arguments)
    with torch.no_grad():
        y, mean, rstd, *_ = torch.ops.fused.batch_norm_fwd(*arguments)
    kept = tensors[3].detach() if activation else None
    detached = [tensor.detach() for tensor in tensors[:3]]
    options = (1e-5, 1, activation, True, True, activation is not None)
    backward = (torch.ones_like(y), *detached, kept, mean, rstd, *options)
    torch.library.opcheck(torch.ops.fused.batch_norm_bwd, backward)


def test_what_pytorchs_own_operations_serve() -> None:
    """Few rows, as their sums are plain ones; and means that are not far from 0, as those are off
    by R * n**0.5 / 2**24 standard deviations where the mean is R of them."""
    shapes: list[tuple[int, ...]] = [(1024, 256), (2, 2**17), (1025, 2), (1024, 257), (0, 3)]
    found = [batch_norm_small.is_small(torch.zeros(shape)) for shape in [*shapes, (2, 3, 4)]]
    assert found == [True, True, False, False, False, False]
    x = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])
    for offset, served in ((15, True), (-15, True), (17, False), (-17, False), (math.inf, False)):
        mean, var = torch.zeros(2), torch.ones(2)
        x[:, 1] = torch.tensor([-1.0, 1.0]) + offset
        result = batch_norm_small.batch_norm_small(
            x, None, None, None, mean, var, None, 1.0, 1e-5, 0, None
        )
        assert (result is not None) == served
        assert mean.tolist() == [0.0, offset if served else 0.0]
        assert var.tolist() == ([2.0, 2.0] if served else [1.0, 1.0])


def test_autocast_leaves_it_alone(implementation, device) -> None:
    """As torch's: half-precision input keeps its dtype, parameters stay in float32."""
    norm = fused.BatchNorm2d(3, activation="relu", device=device)
    x = torch.randn(2, 3, 4, 4, device=device).bfloat16().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and norm.weight.grad.dtype == torch.float32


# Ignored: what torch warns of when its test tools are imported.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pytorchs_own_samples(dtype, implementation, device) -> None:
    from torch.testing._internal.common_methods_invocations import op_db

    infos = [op for op in op_db if op.name == "nn.functional.batch_norm"]
    assert infos
    count = 0
    for info in infos:
        for sample in info.sample_inputs(device, dtype, requires_grad=True):
            names = ("running_mean", "running_var", "weight", "bias")
            t = {"input": sample.input, **dict(zip(names, sample.args, strict=True))}
            count += 1
            if sample.input.dim() < 2:
                ours = fused.batch_norm(**t, **sample.kwargs)
                torch.testing.assert_close(ours, F.batch_norm(**t, **sample.kwargs))
                continue
            t = {k: v if v is None else v.detach() for k, v in t.items()}
            check_against_torch(t, implementation, **sample.kwargs)
    assert count >= 24


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("twin", ["1d", "2d", "3d"])
def test_pytorchs_own_module_samples(twin, training, implementation, device) -> None:
    from torch.testing._internal.common_modules import module_db

    Ours, Theirs, _ = TWINS[twin]
    (info,) = (m for m in module_db if m.module_cls is Theirs)
    for dtype in (torch.float32, torch.float64):
        cases = info.module_inputs_func(info, device, dtype, requires_grad=True, training=training)
        for case in cases:
            results = []
            for Module in (Ours, Theirs):
                arguments = case.constructor_input
                norm = Module(*arguments.args, **arguments.kwargs).to(device, dtype)
                norm.train(training)
                (x,) = case.forward_input.args
                y = norm(x)
                upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
                gradients = torch.autograd.grad(y, [x, *norm.parameters()], upstream)
                results.append((y, *gradients, *norm.buffers()))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("twin", list(TWINS))
def test_pytorchs_own_module_error_inputs(twin, training, implementation, device) -> None:
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

    Ours, Theirs, _ = TWINS[twin]
    (info,) = (m for m in module_db if m.module_cls is Theirs)
    if info.module_error_inputs_func is None:
        pytest.skip("this PyTorch has no error inputs for batch norm")
    errors = info.module_error_inputs_func(
        info, device, torch.float32, requires_grad=False, training=training
    )
    count = 0
    for case in errors:
        inputs = case.module_error_input
        assert case.error_on == ModuleErrorEnum.FORWARD_ERROR
        norm = Ours(*inputs.constructor_input.args, **inputs.constructor_input.kwargs)
        with pytest.raises(case.error_type):
            norm(*inputs.forward_input.args, **inputs.forward_input.kwargs)
        count += 1
    assert count > 0


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
def test_derivative_of_the_activation_at_large_arguments(
    activation, implementation, device
) -> None:
    """Neither NaN nor overflow at |z| of 100, and as exact as torch's."""
    t = example((8, 2), torch.float32, device)
    t["weight"] = t["weight"] * 0 + 60.0
    upstream = torch.ones(8, 2, device=device)
    ours = run(fused.batch_norm, t, upstream, activation=activation)
    theirs = run(torchs, t, upstream, activation=activation)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_second_derivatives_of_relu_are_there_where_they_are_0(
    training, residual, implementation, device
) -> None:
    """As torch's: a gradient penalty may be differentiated, whatever it gives."""
    found = []
    for ours in (True, False):
        t = example((6, 3, 4), torch.float32, device, residual=True)
        x, r = t["input"].requires_grad_(), t["residual"]
        arguments: Any = (t["running_mean"], t["running_var"], None, None, training)
        if ours:
            r_given = r if residual else None
            y = fused.batch_norm(x, *arguments, activation="relu", residual=r_given)
        else:
            z = F.batch_norm(x, *arguments)
            y = F.relu(z + r if residual else z)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (penalty,) = torch.autograd.grad(dx.square().sum(), x)
        found.append((dx.detach(), penalty))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
