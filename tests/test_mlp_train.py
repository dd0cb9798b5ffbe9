"""fused.train_mlp: every method takes the reference's steps, alone and together, whole and cut."""

import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused
from fused import backend
from fused.eager import mlp_train as eager
from fused.mlp_train import MLPParameters, train_mlp_method
from fused.reference import mlp
from tests.graphs import Recording
from tests.test_backend import python
from tests.test_package import ROOT

HAS_NUMBA = importlib.util.find_spec("numba") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON = importlib.metadata.version("triton") if HAS_TRITON else ""
METHODS = [
    *(
        pytest.param(
            name, marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
        )
        for name in ("persistent", "graph")
    ),
    pytest.param("numba", marks=pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")),
    "eager",
]


@dataclass(frozen=True)
class Sizes:
    V: int = 27
    T: int = 3
    E: int = 10
    H: int = 200
    B: int = 32

    def __str__(self) -> str:
        return f"V{self.V}-T{self.T}-E{self.E}-H{self.H}-B{self.B}"


SMALL = Sizes(V=11, T=2, E=3, H=20, B=5)
# Interpreted, the time is that of programs, and every character is one of "graph".
FEW_CHARACTERS = Sizes(V=3, T=2, E=3, H=20, B=5)


def small(method: str) -> Sizes:
    return FEW_CHARACTERS if method == "graph" else SMALL


def start(
    sizes: Sizes, steps: int, method: str, models: int | None = None, dtype=torch.float32
) -> tuple[MLPParameters, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(parameters, x, y, index) where the method can serve them; with models in front if given."""
    g = torch.Generator().manual_seed(sum(sizes.__dict__.values()))
    V, T, E, H = sizes.V, sizes.T, sizes.E, sizes.H
    shapes = (V, E), (T * E, H), (H,), (H, V), (V,), (1, H), (1, H)
    front = () if models is None else (models,)
    p = MLPParameters(*(torch.randn(*front, *s, generator=g, dtype=dtype) for s in shapes))
    p = p._replace(W1=p.W1 * (T * E) ** -0.5, W2=p.W2 * 0.1, bngain=1 + p.bngain * 0.1)
    x, y = torch.randint(V, (300, T), generator=g), torch.randint(V, (300,), generator=g)
    index = torch.randint(300, (*front, steps, sizes.B), generator=g)
    on_gpu = method in ("persistent", "graph", "eager") and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    return MLPParameters(*(t.to(device) for t in p)), x.to(device), y.to(device), index.to(device)


def pairs_apart(p: MLPParameters, x: torch.Tensor, n: int) -> torch.Tensor:
    """Minibatches of two examples (n, 2) that no hidden unit takes for nearly the same: there each
    step would multiply the rounding of the one before by up to eps^-1/2."""
    h = p.C[x].flatten(1) @ p.W1
    gaps = torch.stack([(h - row).abs().amin(1) for row in h])
    best = gaps.flatten().topk(n).indices
    return torch.stack((best // len(x), best % len(x)), 1)


def expected(p: MLPParameters, x, y, index, lr: float) -> tuple[MLPParameters, torch.Tensor]:
    """The same steps by the 26 gradients of the reference, in float64."""
    q, losses = mlp.Parameters(*(t.double() for t in p)), []
    for rows in index:
        loss, tensors = mlp.forward(q, x[rows], y[rows])
        gradients = mlp.backward(tensors, x[rows], y[rows])
        q = mlp.Parameters(*(t - lr * gradients[n] for n, t in q._asdict().items()))
        losses.append(loss)
    return MLPParameters(*q), torch.stack(losses)


def assert_equal(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_close(ours, theirs, batch: int = 32) -> None:
    # Of 2 rows the gradient of batch norm is a difference of equal numbers, times up to eps^-1/2.
    atol = 1e-4 if batch == 2 else 1e-5
    (p, losses), (p_expected, losses_expected) = ours, theirs
    torch.testing.assert_close(losses, losses_expected.to(losses.dtype), rtol=1e-4, atol=0)
    for name, a, b in zip(p._fields, p, p_expected, strict=True):
        message = f"{name} differs by {(a - b).abs().max().item():.3g}"
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=atol, msg=message)


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_of_the_notebooks_network(method) -> None:
    # Interpreted, every program of a step costs as much as all of "persistent": small sizes there.
    data = start(SMALL if method == "graph" else Sizes(), 20, method)
    ours = fused.train_mlp(*data, 0.1, method=method)
    assert_close(ours, expected(*data, 0.1), batch=len(data[3][0]))
    assert_equal([ours[0].b1], [data[0].b1])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_twenty_steps_of_the_notebooks_network_by_graph() -> None:
    """Half a minute in the interpreter; against the closed form of PyTorch's operations, too."""
    data = start(Sizes(), 20, "graph")
    ours = fused.train_mlp(*data, 0.1, method="graph")
    assert_close(ours, expected(*data, 0.1))
    assert_close(ours, fused.train_mlp(*data, 0.1, method="eager"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(V=28, T=1, H=64, B=2),
        Sizes(V=27, T=8, E=3, H=100, B=48),
        Sizes(V=65, T=4, E=1, H=33, B=31),
        Sizes(V=2, T=5, E=7, H=1, B=70),
    ],
    ids=str,
)
def test_odd_sizes(method, sizes) -> None:
    data = start(sizes, 2 if method == "graph" else 4, method)
    assert_close(fused.train_mlp(*data, 0.1, method=method), expected(*data, 0.1), sizes.B)


@pytest.mark.skipif("not config.getoption('--compiled')", reason="of compiled kernels")
def test_no_warp_updates_a_gain_that_another_has_not_read(monkeypatch) -> None:
    """Every warp of "graph" goes on with the old one, and one writes the new one: without the
    emulator's leave to do so where only the writer's reading counts."""
    from triton.runtime import driver

    monkeypatch.setattr(driver.active, "without_updates", {"_mlp_backward_kernel"})
    data = start(FEW_CHARACTERS, 1, "graph")
    assert_close(fused.train_mlp(*data, 0.1, method="graph"), expected(*data, 0.1), batch=5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("B", [2, 32, 48])
@pytest.mark.parametrize("H", [64, 100, 200])
@pytest.mark.parametrize(
    "V, T", [(27, 1), (28, 2), (28, 3), (65, 4), (65, 5), (28, 6), (27, 7), (27, 8)]
)
def test_many_sizes(method, V, T, H, B) -> None:
    data = start(Sizes(V=V, T=T, H=H, B=B), 5, method)
    if B == 2:
        data = (*data[:3], pairs_apart(data[0], data[1], 5))
    assert_close(fused.train_mlp(*data, 0.1, method=method), expected(*data, 0.1), B)


@pytest.mark.parametrize("method", METHODS[1:])
def test_an_embedding_of_two_tiles(method) -> None:
    """Of 256 numbers each in "graph", whose table's other grid axes are characters and networks."""
    data = start(Sizes(V=3, T=2, E=300, H=20, B=5), 2, method)
    assert_close(fused.train_mlp(*data, 0.1, method=method), expected(*data, 0.1), 5)


@pytest.mark.parametrize("method", METHODS)
def test_a_minibatch_of_one_context(method) -> None:
    """Its variance is 0 and rstd eps^-1/2, the gradients of its embeddings the largest there are:
    beyond float16's numbers, of which "persistent" makes factors."""
    p, x, y, index = start(Sizes(V=3, T=2, E=3, H=200, B=5), 2, method)
    x[index[0]] = x[0].clone()
    data = p._replace(W2=p.W2 * 3, b2=p.b2 + 100), x, y, index  # exp(100) is no float32
    assert_close(fused.train_mlp(*data, 0.01, method=method), expected(*data, 0.01), batch=2)


GPUS = {
    "T4": (None, (7, 5), "", "graph"),
    "A100": (None, (8, 0), "", "persistent"),
    "H100": (None, (9, 0), "", "persistent"),
    "MI300": ("6.4", (9, 4), "gfx942:sramecc+:xnack-", "persistent"),
    "RX 7900": ("6.4", (11, 0), "gfx1100", "graph"),
}


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("gpu", GPUS)
def test_auto_on_gpus_without_tensor_cores(gpu, monkeypatch) -> None:
    """Without those that the kernel is laid out for, it takes minutes to compile, and spills."""
    import triton

    from fused.kernels import tuning

    hip, capability, arch, method = GPUS[gpu]
    tuning.has_matrix_units.cache_clear()
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(gcnArchName=arch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": 65536})
    driver = SimpleNamespace(active=SimpleNamespace(utils=utils))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    monkeypatch.setattr(backend, "name_for", lambda x: "triton")

    def on_gpu(*shape: int) -> Any:
        device = torch.device("cuda", 0)
        return SimpleNamespace(
            shape=torch.Size(shape), device=device, is_cuda=True, dtype=torch.float32
        )

    p: Any = (on_gpu(27, 10), on_gpu(30, 64))
    assert train_mlp_method(p, torch.zeros(9, 3), 16) == method
    tuning.has_matrix_units.cache_clear()


def errors_of_updates(
    before: MLPParameters, after: MLPParameters, exact: MLPParameters
) -> dict[str, float]:
    """Of each parameter, relative to how far it should have gone."""
    errors = {}
    for name, p, q, r in zip(before._fields, before, after, exact, strict=True):
        way = (r - p).norm()
        if way > 0:
            errors[name] = ((q.double() - r).norm() / way).item()
    return errors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "confidence, H", [(0.0, 20), (0.0, 300), (6.0, 20)], ids=["H20", "H300", "confident"]
)
def test_an_update_is_as_exact_as_float32s(method, confidence, H) -> None:
    """Beside large parameters a gradient could be wrong unseen: the step is long enough to show it.
    Of a network that is nearly sure of what comes all gradients are small: no factor of a product
    may underflow. Of many hidden units "graph" adds up more than one block of parts."""
    p, x, y, index = start(Sizes(V=3, T=2, E=3, H=H, B=8), 1, method)
    p.b2[1] += confidence
    data = p, x, torch.ones_like(y) if confidence else y, index
    lr = 0.1 / expected(*data, 0.0)[1].item()
    exact = expected(*data, lr)[0]
    of_float32 = errors_of_updates(p, fused.train_mlp(*data, lr, method="eager")[0], exact)
    errors = errors_of_updates(p, fused.train_mlp(*data, lr, method=method)[0], exact)
    assert errors.keys() == of_float32.keys() >= {"C", "W1", "W2", "b2", "bngain", "bnbias"}
    for name, error in errors.items():
        assert error <= 3 * of_float32[name] + 2e-6, name


def test_a_chunk_of_graph_is_captured_and_replayed(monkeypatch) -> None:
    """The capture changes nothing; the replay takes the steps, with what is then in memory."""
    pytest.importorskip("triton")
    from fused.kernels import mlp_step, tuning

    monkeypatch.setattr(tuning, "MLP_STEP_CHUNK", 2)
    p, x, _, _ = start(FEW_CHARACTERS, 1, "graph", models=2)
    lr = torch.tensor([0.1, 0.2], device=x.device)
    sizes = 2, FEW_CHARACTERS.B, FEW_CHARACTERS.T

    def steps_of(p: MLPParameters) -> mlp_step.Steps:
        parameters = p.C, p.W1, p.W2, p.b2, p.bngain.squeeze(1), p.bnbias.squeeze(1)
        arguments: list[Any] = [*(t.clone() for t in parameters), lr, 1e-5, *sizes]
        return mlp_step.Steps(*arguments)

    captured, launched = steps_of(p), steps_of(p)
    if not x.is_cuda:

        @contextmanager
        def graph(
            recording: Recording, stream: torch.device, capture_error_mode: str
        ) -> Iterator[None]:
            assert stream == x.device  # PyTorch's own may be on another
            assert capture_error_mode == "thread_local"
            before = [tensor.clone() for tensor in captured.parameters]
            with recording.capturing():
                yield
            for tensor, value in zip(captured.parameters, before, strict=True):
                tensor.copy_(value)  # a capture computes nothing

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    replayed = mlp_step.captured(captured)
    assert_equal(captured.parameters, launched.parameters)
    for _ in range(2):
        for mine, others in ((captured.x, launched.x), (captured.y, launched.y)):
            mine.copy_(others.random_(FEW_CHARACTERS.V))
        replayed.replay()
        launched.take_all(2)
        assert_equal(
            (captured.losses, *captured.parameters), (launched.losses, *launched.parameters)
        )


def test_a_call_of_no_steps_of_graph_compiles(monkeypatch) -> None:
    """So that who times steps need not count it, as with the other methods; nothing else."""
    pytest.importorskip("triton")
    from fused.kernels import mlp_step

    taken: list[int] = []
    take = mlp_step.Steps.take

    def counted(steps: mlp_step.Steps, i: int) -> None:
        taken.append(i)
        take(steps, i)

    monkeypatch.setattr(mlp_step.Steps, "take", counted)
    p, x, y, index = start(FEW_CHARACTERS, 0, "graph")
    found, losses = fused.train_mlp(p, x, y, index, float("inf"), method="graph")
    assert taken == [0] and losses.shape == (0,)
    assert_equal(found, p)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_models_together_are_models_alone(method, streams) -> None:
    """To the last bit, and model m takes the minibatches index[m % S] at its own rate."""
    p, x, y, index = start(small(method), 3, method, models=4)
    index = index[:streams]
    lr = torch.tensor([0.1, 0.03, 0.3, 0.0], device=x.device)
    together, losses = fused.train_mlp(p, x, y, index, lr, method=method)
    for m in range(4):
        one = MLPParameters(*(t[m] for t in p))
        alone, loss = fused.train_mlp(one, x, y, index[m % streams], lr[m], method=method)
        assert_equal([*alone, loss], [*(t[m] for t in together), losses[m]])
    assert_equal(MLPParameters(*(t[3] for t in together)), MLPParameters(*(t[3] for t in p)))


@pytest.mark.parametrize("method", METHODS)
def test_calls_and_runs_do_not_matter(method) -> None:
    """All steps at once, again, and in parts: the same to the last bit. A chunk is 64 steps."""
    kernels_on_a_cpu = method in ("persistent", "graph") and not torch.cuda.is_available()
    steps = 6 if kernels_on_a_cpu else 2 * eager.CHUNK + 6
    p, x, y, index = start(small(method), steps, method)
    whole, losses = fused.train_mlp(p, x, y, index, 0.1, method=method)
    again, losses_again = fused.train_mlp(p, x, y, index, 0.1, method=method)
    assert_equal([*again, losses_again], [*whole, losses])
    parts = []
    for rows in index.split([1, steps - 5, 4]):
        p, loss = fused.train_mlp(p, x, y, rows, 0.1, method=method)
        parts.append(loss)
    assert_equal([*p, torch.cat(parts)], [*whole, losses])


@pytest.mark.parametrize("method", METHODS)
def test_strides_do_not_matter(method) -> None:
    p, x, y, index = start(SMALL, 3, method)
    plain = fused.train_mlp(p, x, y, index, 0.1, method=method)
    columns = [t.mT.contiguous().mT for t in (x, y.expand(2, -1), index)]
    transposed = MLPParameters(*(t.mT.contiguous().mT if t.dim() > 1 else t for t in p))
    found = fused.train_mlp(transposed, columns[0], columns[1][0], columns[2], 0.1, method=method)
    assert_equal(found, plain)


@pytest.mark.parametrize("method", METHODS)
def test_in_place_on_request_only(method) -> None:
    p, x, y, index = start(SMALL, 2, method)
    before = MLPParameters(*(t.clone() for t in p))
    p.W1.requires_grad_()
    new, _ = fused.train_mlp(p, x, y, index, 0.1, method=method)
    assert_equal(p, before)
    same, _ = fused.train_mlp(p, x, y, index, 0.1, method=method, inplace=True)
    assert_equal(p, new)
    assert_equal(same, new)
    untouched, none = fused.train_mlp(p, x, y, index[:0], 0.1, method=method)
    assert_equal(untouched, p)
    assert none.shape == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_that_saved_a_parameter_notices(method) -> None:
    """Of every parameter that is written to; b1 is not."""
    p, x, y, index = start(small(method), 2, method)
    saved_with = [torch.ones_like(t, requires_grad=True) for t in p]
    graphs = [(t * ones).sum() for t, ones in zip(p, saved_with, strict=True)]
    fused.train_mlp(p, x, y, index, 0.1, method=method, inplace=True)
    for name, graph in zip(p._fields, graphs, strict=True):
        if name == "b1":
            graph.backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                graph.backward()


@pytest.mark.parametrize("models", [None, 2])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_returned_has_no_graph(method, models) -> None:
    p, x, y, index = start(small(method), 2, method, models)
    for t in p:
        t.requires_grad_()
    new, losses = fused.train_mlp(p, x, y, index, 0.1, method=method)
    assert not any(t.requires_grad for t in (*new, losses))
    same, losses = fused.train_mlp(p, x, y, index, 0.1, method=method, inplace=True)
    assert all(a is b for a, b in zip(same, p, strict=True)) and not losses.requires_grad
    assert_equal(same, new)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_inference_mode(method) -> None:
    """They have no version to count up."""
    with torch.inference_mode():
        p, x, y, index = start(small(method), 2, method)
        new, _ = fused.train_mlp(p, x, y, index, 0.1, method=method)
        fused.train_mlp(p, x, y, index, 0.1, method=method, inplace=True)
    assert_equal(p, new)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_diverges_does_not_touch_the_others(method) -> None:
    p, x, y, index = start(small(method), 4, method, models=2)
    lr = torch.tensor([1e30, 0.1], device=x.device)
    together, losses = fused.train_mlp(p, x, y, index, lr, method=method)
    assert losses[0, 0].isfinite() and not losses[0].isfinite().all()
    one = MLPParameters(*(t[1] for t in p))
    alone, loss = fused.train_mlp(one, x, y, index[1], 0.1, method=method)
    assert_equal([*alone, loss], [*(t[1] for t in together), losses[1]])


def test_float64() -> None:
    data = start(SMALL, 20, "eager", dtype=torch.float64)
    p, losses = fused.train_mlp(*data, 0.1, method="eager")
    expected_p, expected_losses = expected(*data, 0.1)
    for ours, theirs in zip([*p, losses], [*expected_p, expected_losses], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS[2:])
@pytest.mark.parametrize("B", [256, 4096, 50_000])
def test_updates_by_many_examples(B, method) -> None:
    """The share of one may be too small for the parameter. Each update is as near to float64's as
    is one subtraction of the gradient, which rounds the parameter once."""
    p, x, y, index = start(Sizes(V=11, T=2, E=3, H=20, B=B), 1, "numba")
    lr = 1e-3
    found, losses = fused.train_mlp(p, x, y, index, lr, method=method)
    exact, exact_losses = expected(p, x, y, index, lr)
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-6, atol=0)
    for name, before, after, goal in zip(p._fields, p, found, exact, strict=True):
        update, rounded_once = goal - before.double(), goal.float().double()
        error = (after.double() - goal).norm()
        assert error <= 2 * (rounded_once - goal).norm() + 1e-4 * update.norm(), name


@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
def test_hidden_units_far_from_0_by_many_examples() -> None:
    """Their sums over 50,000 examples are in float64, forward and backward."""
    p, x, y, index = start(Sizes(V=11, T=2, E=3, H=20, B=50_000), 1, "numba")
    p = p._replace(C=p.C + 10)
    found, _ = fused.train_mlp(p, x, y, index, 1.0, method="numba")
    exact, _ = expected(p, x, y, index, 1.0)
    errors = errors_of_updates(p, found, exact)
    assert errors["W1"] <= 1e-4 and errors["W2"] <= 1e-4


@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
def test_the_exponential_of_the_loop() -> None:
    """To 3e-7; beyond float32's numbers it is the last one, not another's bits; NaN stays NaN."""
    from fused.compiled.mlp_train import _exp

    x = torch.linspace(-87, 88, 5001)
    found = torch.tensor([_exp(value) for value in x.numpy()], dtype=torch.float64)
    torch.testing.assert_close(found, x.double().exp(), rtol=3e-7, atol=0)
    beyond = torch.tensor([-1e30, -100.0, 100.0, 1e30, torch.nan]).numpy()
    ends = [found[0].item()] * 2 + [found[-1].item()] * 2
    *held, nothing = (_exp(value) for value in beyond)
    assert held == ends and math.isnan(nothing)


def test_memory_for_many_characters_and_examples() -> None:
    """A chunk is of fewer steps where the logits of one are large."""
    p, x, y, index = start(Sizes(V=3000, T=2, E=3, H=20, B=1000), 1, "numba")
    loop = eager.Loop(
        p.C, p.W1, p.W2, p.b2, p.bngain[0], p.bnbias[0], 1000, 2, torch.tensor(0.1), 1e-5, False
    )
    assert loop.logits.shape == (1, 3000, 1000)
    start_of = fused.train_mlp(p, x, y, index[:, :5].expand(3, 5), 0.1, method="eager")
    steps = [fused.train_mlp(p, x, y, index[:, :5], 0.1, method="eager")]
    for _ in range(2):
        steps.append(fused.train_mlp(steps[-1][0], x, y, index[:, :5], 0.1, method="eager"))
    assert_equal(start_of[0], steps[-1][0])


@pytest.mark.parametrize(
    "precision, rtol", [("fp16", 2e-3), ("tf32", 2e-3), ("tf32x3", 1e-4), ("ieee", 1e-4)]
)
def test_precisions_of_the_kernel(precision, rtol) -> None:
    """The interpreter multiplies TF32's factors unrounded; float16's are as on a GPU."""
    kernels = pytest.importorskip("fused.kernels.mlp_train")
    data = start(SMALL, 5, "persistent", models=1)
    p, x, y, index = data
    _, losses = expected(MLPParameters(*(t[0] for t in p)), x, y, index[0], 0.1)
    lr = torch.full((1,), 0.1, device=x.device)
    ours = kernels.mlp_train(
        p.C, p.W1, p.W2, p.b2, p.bngain[:, 0], p.bnbias[:, 0], x, y, index, lr, 1e-5, precision
    )
    torch.testing.assert_close(ours[0], losses.float(), rtol=rtol, atol=0)


@pytest.mark.parametrize("module", ["mlp_train", "mlp_step"])
def test_the_kernels_do_not_follow_a_character_out_of_range(module) -> None:
    kernels = pytest.importorskip(f"fused.kernels.{module}")
    p, x, y, index = start(SMALL, 3, "persistent", models=2)
    x[index[0, 0, 0]] = 15  # behind the table's 11 rows, and within the 4 bits of a character
    y[index[0, 1, 0]] = 12
    p.C[1] = float("nan")  # the table behind is another network's
    lr = torch.full((2,), 0.1, device=x.device)
    losses = kernels.mlp_train(
        p.C, p.W1, p.W2, p.b2, p.bngain[:, 0], p.bnbias[:, 0], x, y, index[:1], lr, 1e-5
    )
    assert losses[0].isnan().tolist() == [False, True, False]
    assert all(t[0].isfinite().all() for t in p)


def test_a_step_does_not_follow_a_negative_character() -> None:
    kernels = pytest.importorskip("fused.kernels.mlp_step")
    p, x, y, index = start(SMALL, 3, "persistent", models=2)
    x[index[0, 0, 0]] = -1
    p.C[0] = float("nan")  # the table before is another network's
    lr = torch.full((2,), 0.1, device=x.device)
    losses = kernels.mlp_train(
        p.C, p.W1, p.W2, p.b2, p.bngain[:, 0], p.bnbias[:, 0], x, y, index[:1], lr, 1e-5
    )
    assert losses[1].isfinite().all()
    assert all(t[1].isfinite().all() for t in p)


@pytest.mark.parametrize("T, bits", [(30, 1), (31, 1), (7, 4), (8, 7)])
def test_the_largest_characters_fit_a_word(T, bits) -> None:
    """Of 31 bits, which an int32 has, of 32, which it has not, and of 63."""
    kernels = pytest.importorskip("fused.kernels.mlp_train")
    x, y = torch.full((3, T), 2**bits - 1), torch.full((3,), 2**bits - 1)
    words = kernels._pack(x, y, bits)
    assert torch.equal(words >> (T * bits), y.to(words.dtype))
    for j in range(T):
        assert torch.equal(words >> (j * bits) & (2**bits - 1), x[:, j].to(words.dtype))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU says how many lanes it has")
@pytest.mark.interpreted("the emulator has warps of 32 lanes")
def test_warps_of_64_lanes_keep_the_same_numbers(monkeypatch) -> None:
    """In another order, which nothing may depend on."""
    data = start(Sizes(V=11, T=2, E=3, H=130, B=5), 3, "persistent")
    ours, losses = fused.train_mlp(*data, 0.1, method="persistent")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    amds, losses_of_amd = fused.train_mlp(*data, 0.1, method="persistent")
    assert_equal([*amds, losses_of_amd], [*ours, losses])


def test_chunks_do_not_matter(monkeypatch) -> None:
    """What "graph" captures at a time, here 2 steps: the same bits, the losses where they belong"""
    mlp_step = pytest.importorskip("fused.kernels.mlp_step")
    data = start(FEW_CHARACTERS, 5, "graph")
    whole, losses = fused.train_mlp(*data, 0.1, method="graph")
    monkeypatch.setattr(mlp_step.tuning, "MLP_STEP_CHUNK", 2)
    parts, losses_of_parts = fused.train_mlp(*data, 0.1, method="graph")
    assert_equal([*parts, losses_of_parts], [*whole, losses])


def test_onehot_rows_are_addresses() -> None:
    """How a GPU adds up the table's gradients, on any device."""
    p, x, y, index = start(SMALL, 3, "numba")
    tables = []
    for onehot in (False, True):
        with torch.inference_mode():
            model = (p.C, p.W1, p.W2, p.b2, p.bngain[0], p.bnbias[0])
            loop = eager.Loop(*model, SMALL.B, SMALL.T, torch.tensor(0.1), 1e-5, onehot)
            loop.load(x[index], y[index])
            loop.take_all(3)
        tables.append(loop.C)
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-6)


def test_threads_are_given_back() -> None:
    data = start(SMALL, 1, "numba")
    before = torch.get_num_threads()
    fused.train_mlp(*data, 0.1, method="eager")
    assert torch.get_num_threads() == before


def test_one_thread_for_small_products() -> None:
    """And as many as there were for others, and afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for products, expected in ((2**22 - 1, 1), (2**22, 3)):
            with eager._few_threads(products):
                assert torch.get_num_threads() == expected
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
def test_one_rate_for_all_networks(method) -> None:
    """A number, or a tensor of one."""
    p, x, y, index = start(small(method), 2, method, models=2)
    number = fused.train_mlp(p, x, y, index, 0.25, method=method)
    tensor = fused.train_mlp(p, x, y, index, torch.tensor(0.25, device=x.device), method=method)
    assert_equal([*number[0], number[1]], [*tensor[0], tensor[1]])
    with pytest.raises(ValueError, match=r"lr of shape \(2,\), got \(1,\)"):
        fused.train_mlp(p, x, y, index, torch.tensor([0.25], device=x.device), method=method)


def test_the_closed_form_never_looks_at_values() -> None:
    """On the meta device there are none to look at."""
    p, x, y, index = start(SMALL, 3, "numba")
    meta = MLPParameters(*(t.to("meta") for t in p))
    new, losses = fused.train_mlp(
        meta, x.to("meta"), y.to("meta"), index.to("meta"), 0.1, method="eager"
    )
    assert losses.shape == (3,) and new.W1.shape == p.W1.shape


@pytest.mark.parametrize("method", ["persistent", "graph"])
def test_rates_may_begin_anywhere(method) -> None:
    """A sweep's second half takes other rates, a part of a tensor: nothing is compiled anew."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("nothing is compiled")
    from fused.kernels import mlp_step, mlp_train

    def binaries() -> int:
        kernels = [getattr(m, name) for m in (mlp_step, mlp_train) for name in dir(m)]
        caches = [k.device_caches for k in kernels if hasattr(k, "device_caches")]
        return sum(len(cache[0]) for devices in caches for cache in devices.values())

    p, x, y, index = start(FEW_CHARACTERS, 1, method, models=3)
    lr, final_lr = torch.tensor([[0.03, 0.1, 0.3], [0.003, 0.01, 0.03]], device=x.device)
    assert lr.data_ptr() % 16 == 0 and final_lr.data_ptr() % 16 != 0
    fused.train_mlp(p, x, y, index, lr, method=method)
    compiled = binaries()
    assert compiled > 0
    fused.train_mlp(p, x, y, index, final_lr, method=method)
    assert binaries() == compiled


def test_numba_where_no_folder_takes_its_cache() -> None:
    pytest.importorskip("numba")
    result = python(
        "from numba.core import caching\n"
        "cache = getattr(caching, 'CacheImpl', None) or caching._CacheImpl\n"
        "cache._locator_classes = []  # as where no folder can be written to\n"
        "import fused.compiled.mlp_train\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name, expected_method", [("eager", "numba"), ("triton", "persistent")])
def test_auto_is_the_fastest_that_fits(name, expected_method) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("numba")
    from fused.kernels import tuning

    p, x, _, _ = start(SMALL, 1, expected_method)
    if not tuning.has_matrix_units(x.device):
        pytest.skip("a GPU without the tensor cores for it")
    with fused.backend.use(name):
        assert train_mlp_method(p, x, 32) == expected_method
        assert train_mlp_method(p, x, 32768) in ("numba", "graph")  # no multiprocessor holds it
        double = MLPParameters(*(t.double() for t in p))
        assert train_mlp_method(double, x, 32) == "eager"


BAD = {
    "method": (lambda a: a | {"method": "fast"}, ValueError, "one of auto, persistent, graph"),
    "shape": (
        lambda a: a | {"parameters": a["parameters"]._replace(b2=torch.zeros(3))},
        ValueError,
        r"expected b2 of shape \(11,\), got \(3,\)",
    ),
    "dtype": (
        lambda a: a | {"parameters": a["parameters"]._replace(b2=torch.zeros(11).double())},
        TypeError,
        "one floating dtype",
    ),
    "no network": (
        lambda a: a | {"parameters": [t.expand(0, *t.shape) for t in a["parameters"]]},
        ValueError,
        "one network or more, got 0",
    ),
    "no matrix": (
        lambda a: a | {"parameters": a["parameters"]._replace(C=torch.zeros(3))},
        ValueError,
        r"expected C of shape \(V, E\)",
    ),
    "float64": (
        lambda a: a | {"parameters": [t.double() for t in a["parameters"]], "method": "numba"},
        ValueError,
        "takes float32",
    ),
    "eps": (lambda a: a | {"eps": -1.0}, ValueError, "expected a positive, finite eps, got -1.0"),
    "no eps": (lambda a: a | {"eps": 0.0}, ValueError, "expected a positive, finite eps, got 0.0"),
    "eps of no size": (
        lambda a: a | {"eps": float("nan")},
        ValueError,
        "positive, finite eps, got nan",
    ),
    "examples": (lambda a: a | {"y": a["y"][:5]}, ValueError, r"x of shape \(N, T\)"),
    "context": (lambda a: a | {"x": a["x"][:, :1]}, ValueError, "1 characters of context"),
    "streams": (lambda a: a | {"index": a["index"].expand(2, -1, -1)}, ValueError, "multiple"),
    "no streams": (lambda a: a | {"index": a["index"].expand(0, -1, -1)}, ValueError, "multiple"),
    "truth": (lambda a: a | {"index": a["index"].bool()}, TypeError, "index of whole numbers"),
    "whole parameters": (
        lambda a: a | {"parameters": [t.int() for t in a["parameters"]]},
        TypeError,
        "one floating dtype, got C in torch.int32",
    ),
    "batch": (lambda a: a | {"index": a["index"][:, :1]}, ValueError, "at least 2 examples"),
    "whole": (lambda a: a | {"x": a["x"].float()}, TypeError, "x of whole numbers"),
    "device": (lambda a: a | {"y": a["y"].to("meta")}, ValueError, "expected y on cpu"),
    "a parameter's device": (
        lambda a: a | {"parameters": a["parameters"]._replace(b1=a["parameters"].b1.to("meta"))},
        ValueError,
        "expected b1 on cpu, as C, got meta",
    ),
    "an infinite eps": (lambda a: a | {"eps": math.inf}, ValueError, "expected a positive, finite"),
    "a rate beyond float32": (lambda a: a | {"lr": 1e39}, ValueError, "expected lr to be a number"),
    "an eps beyond float32": (lambda a: a | {"eps": 1e39}, ValueError, "a positive, finite eps"),
    "no rate": (lambda a: a | {"lr": "a"}, TypeError, "expected lr to be a number or a tensor"),
    "a complex number": (lambda a: a | {"lr": 1j}, TypeError, "expected lr to be a number or a t"),
    "a complex rate": (lambda a: a | {"lr": torch.tensor(1j)}, TypeError, "expected a real lr"),
    "rates": (lambda a: a | {"lr": torch.ones(3)}, ValueError, r"lr of shape \(1,\)"),
    "in place": (
        lambda a: (
            a | {"inplace": True, "parameters": a["parameters"]._replace(W1=torch.zeros(20, 6).T)}
        ),
        ValueError,
        "must be contiguous",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case) -> None:
    p, x, y, index = start(SMALL, 2, "numba")
    change, error, message = BAD[case]
    arguments = {"parameters": p, "x": x, "y": y, "index": index, "lr": 0.1}
    with pytest.raises(error, match=message):
        fused.train_mlp(**change(arguments))


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("method", ["persistent", "graph"])
def test_a_method_of_triton_where_there_is_none_for_the_device(method, monkeypatch) -> None:
    monkeypatch.setattr(fused.backend, "_runs_on_cpus", lambda: False)
    p, x, y, index = start(SMALL, 2, "numba")
    with pytest.raises(RuntimeError, match="asked for on a cpu tensor; move it to a CUDA device"):
        fused.train_mlp(p, x, y, index, 0.1, method=method)


@pytest.mark.parametrize("method", METHODS[2:])
@pytest.mark.parametrize("what", ["row", "character", "target"])
def test_out_of_range_on_the_cpu(what, method) -> None:
    """(On a GPU torch's assertion would end the context, and every later test with it.)"""
    p, x, y, index = start(SMALL, 2, "numba")
    index[1, 2] = 300 if what == "row" else 7
    x[7, 1] = 11 if what == "character" else 0
    y[7] = -1 if what == "target" else 0
    with pytest.raises((IndexError, RuntimeError), match="not in|out of"):
        fused.train_mlp(p, x, y, index, 0.1, method=method)


@pytest.mark.parametrize("method", METHODS[2:])
@pytest.mark.parametrize("place", ["row", "character", "target"])
@pytest.mark.parametrize("end", ["before the first", "behind the last"])
def test_one_beyond_the_range_on_the_cpu(end, place, method) -> None:
    """Of the second stream of minibatches; and what lies behind x and y is in range."""
    p, x, y, index = start(SMALL, 2, "numba", models=2)
    x, y = x[:200], y[:200]
    V = p.C.shape[1]
    index = index % 200
    where, value = {"row": (index, 200), "character": (x, V), "target": (y, V)}[place]
    index[1, 1, 3] = 7
    where[{"row": (1, 1, 3), "character": (7, 1), "target": (7,)}[place]] = (
        -1 if end == "before the first" else value
    )
    index[0] = 0
    with pytest.raises((IndexError, RuntimeError), match="not in|out of"):
        fused.train_mlp(p, x, y, index, 0.1, method=method)


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_largest_logit_behind_the_first_64_classes(method) -> None:
    """As many as "graph" takes at a time: what it has summed by then is of another maximum."""
    p, x, y, index = start(Sizes(V=70, T=1, E=3, H=20, B=5), 1, method)
    b2 = p.b2.clone()
    b2[68] += 5.0
    data = p._replace(b2=b2), x, y, index
    assert_close(fused.train_mlp(*data, 0.1, method=method), expected(*data, 0.1), batch=5)


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_that_vanish(method) -> None:
    """A class 200 above the others: their powers are below the least number of float32."""
    p, x, y, index = start(FEW_CHARACTERS, 2, method)
    b2 = p.b2.clone()
    b2[1] += 200.0
    data = p._replace(b2=b2), x, y, index
    assert_close(fused.train_mlp(*data, 0.01, method=method), expected(*data, 0.01), batch=5)


# What Triton takes for sm_90 and gfx942 of sizes (T, E, H, V, B): as much as the plan says.
SHARED = {
    (3, 10, 200, 27, 32): (73728, 32768),
    (3, 10, 200, 27, 2): (49152, 16384),  # 40960 with 3.7
    (5, 10, 100, 27, 32): (81920, 32768),
    (8, 10, 100, 27, 2): (131072, 32768),  # 98304 with 3.7
    (5, 10, 200, 65, 32): (98304, 65536),  # 81920 on sm_90, 98304 on sm_80
    (8, 10, 200, 65, 48): (163840, 131072),
    (3, 10, 20, 27, 32): (20480, 8192),
    (3, 10, 64, 300, 16): (327680, 131072),  # 98304 on sm_90 with 3.7
    (3, 10, 1000, 27, 32): (294912, 131072),
}


@pytest.mark.parametrize("sizes", SHARED)
def test_shared_memory_that_the_plan_expects(sizes) -> None:
    from fused.kernels import tuning

    T, E, H, V, B = sizes
    for lanes, shared in zip((32, 64), SHARED[sizes], strict=True):
        assert tuning.mlp_train(T, E, H, V, B, shared, lanes).shared_bytes == shared
        with pytest.raises(ValueError, match=f"takes {shared} bytes, and it has {shared - 1};"):
            tuning.mlp_train(T, E, H, V, B, shared - 1, lanes)


def test_what_one_multiprocessor_holds() -> None:
    """An A100 has 163 KB."""
    from fused.kernels import tuning

    sizes = itertools.product(range(1, 9), (64, 100, 200), (27, 28, 65), (2, 32, 48))
    for T, H, V, B in sizes:
        assert tuning.mlp_train(T, 10, H, V, B, 166912).shared_bytes <= 163840
    message = (
        "with 3000 hidden units, 3 x 10 features, 27 characters and minibatches of 32, what its "
        "products share takes 1179648 bytes, and it has 232448; use 'graph'"
    )
    with pytest.raises(ValueError, match=message):
        tuning.mlp_train(3, 10, 3000, 27, 32, 232448)
    assert tuning.mlp_train(8, 2, 64, 128, 16, 232448).bits == 7  # 63 together
    with pytest.raises(ValueError, match="15 characters of context .* 64 together"):
        tuning.mlp_train(15, 2, 64, 16, 16, 232448)
    with pytest.raises(ValueError, match="12 characters of context .* 65 together"):
        tuning.mlp_train(12, 2, 64, 27, 16, 232448)


def test_what_the_kernels_cannot_number() -> None:
    from fused.kernels import tuning

    assert tuning.mlp_step(65535, 1, 4096, 32768, 50257, 32).BLOCK_E == 256
    with pytest.raises(ValueError, match="1 networks with a tensor of 2147483648; use"):
        tuning.mlp_step(1, 16, 4096, 32768, 27, 32)
    with pytest.raises(ValueError, match="up to 65535 networks, .* got 65536"):
        tuning.mlp_step(65536, 3, 10, 200, 27, 32)
    mlp_train = pytest.importorskip("fused.kernels.mlp_train")
    p, x, y, _ = start(SMALL, 1, "numba", models=1)
    C, W1, _, W2, b2, gain, bias = (t.to("meta") for t in p)
    index = torch.empty(1, 2**29, 4, device="meta", dtype=torch.int64)
    with pytest.raises(ValueError, match="got 536870912 steps of 4; take"):
        mlp_train.mlp_train(C, W1, W2, b2, gain[0], bias[0], x, y, index, gain, 1e-5)


COMPILE = """
import itertools, json, sys; sys.path.insert(0, {root!r})
import torch
from bench import kernels
from fused.kernels import mlp_step, mlp_train, tuning
torch.set_default_device("meta")  # where there are no values to look at
for (T, E, H, V, B), target in itertools.product({sizes}, kernels.TARGETS):
    torch.version.hip = "6.4" if target == "gfx942" else None
    shapes = (1, V, E), (1, T * E, H), (1, H, V), (1, V), (1, H), (1, H)
    p = [torch.zeros(s) for s in shapes]
    x, y = torch.zeros(9, T, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    index = torch.zeros(1, 1, B, dtype=torch.int64)
    with kernels.catch_launches() as launches:
        {module}.mlp_train(*p, x, y, index, torch.ones(1), 1e-5)
    one = "{module}" == "mlp_train"
    lanes = 64 if target == "gfx942" else 32
    most = tuning.mlp_train(T, E, H, V, B, 2**40, lanes).shared_bytes if one else 2**40
    for launch in launches:
        c = kernels.compile_launch(launch, target)
        print(json.dumps([launch.kernel.__name__, H, target, c.spilled, c.shared <= most]))
"""


@functools.cache
def compiled(module: str, *sizes: tuple[int, ...]) -> list[list]:
    """(kernel, hidden units, target, what is spilled, whether shared memory is at most the plan's
    for "persistent") for sizes (T, E, H, V, B)."""
    pytest.importorskip("triton")
    result = python(COMPILE.format(root=str(ROOT), module=module, sizes=sizes))
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row[2] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    return rows


def test_the_kernel_of_64_units_spills_nothing() -> None:
    """200 units are in docs/performance.md, and in a slow test."""
    rows = compiled("mlp_train", (3, 10, 64, 27, 32))
    assert len(rows) == 4 and all(row[3] == 0 and row[4] for row in rows)


def test_the_kernels_of_a_step_spill_nothing() -> None:
    rows = compiled("mlp_step", (3, 10, 200, 27, 32))
    assert len(rows) == 4 * 4 and all(row[3] == 0 for row in rows)


@pytest.mark.slow
def test_the_kernels_compile_for_large_networks() -> None:
    sizes = (3, 10, 200, 27, 32), (8, 4, 100, 65, 20), (1, 10, 400, 27, 32)
    # A large matrix of zeros and ones, and a minibatch of one row of tiles.
    rows = compiled("mlp_train", *sizes, (3, 10, 64, 65, 48), (3, 10, 100, 27, 2))
    assert all(row[4] for row in rows)
    spilled = {row[2]: row[3] for row in rows if row[1] == 200}
    if TRITON.startswith("3.7."):
        most = {"sm_80": 56, "sm_90": 0, "sm_100": 24, "gfx942": 0}
        assert all(spilled[target] <= most[target] for target in most)
    assert spilled.pop("gfx942") <= 24 and max(spilled.values()) <= 80
    large = (16, 24, 2048, 300, 512), (1, 64, 4096, 27, 64), (1, 1024, 200, 5000, 32)
    spilling = [row for row in compiled("mlp_step", (8, 3, 100, 65, 48), *large) if row[3]]
    assert all(row[:3] == ["_mlp_logits_kernel", 200, "sm_90"] and row[3] <= 8 for row in spilling)


@pytest.mark.cuda
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="needs compiled kernels")
def test_hundreds_of_models_on_a_gpu() -> None:
    p, x, y, index = start(Sizes(), 50, "persistent", models=256)
    together, losses = fused.train_mlp(p, x, y, index[:32], 0.1, method="persistent")
    for m in (0, 131, 255):
        one = MLPParameters(*(t[m] for t in p))
        alone, loss = fused.train_mlp(one, x, y, index[m % 32], 0.1, method="persistent")
        assert_equal([*alone, loss], [*(t[m] for t in together), losses[m]])
