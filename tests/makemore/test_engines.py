"""All engines take the same steps from the same start."""

import importlib.util
import statistics
import time

import pytest
import torch

from fused.makemore import data
from fused.makemore.engines import ENGINES
from fused.makemore.model import Settings, calibrate, initial_parameters
from fused.mlp_train import MLPParameters

SETTINGS = Settings()
HAS_NUMBA = importlib.util.find_spec("numba") is not None


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return data.load(None, SETTINGS.context, device)


def trained(engine: str, dataset: data.Dataset, steps: int, settings: Settings = SETTINGS):
    """(parameters, losses) after `steps` steps, on the dataset's device wherever they ran."""
    device = dataset.train.x.device
    where = torch.device("cpu") if engine == "numba" else device
    parameters, generator = initial_parameters(settings, len(dataset.vocabulary), where)
    index = torch.randint(0, len(dataset.train), (steps, settings.batch), generator=generator)
    train = dataset.train.to(where)
    losses = ENGINES[engine](parameters).run(train.x, train.y, index.to(where), 0.1)
    return MLPParameters(*(p.to(device) for p in parameters)), losses.to(device)


def engines(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "engine",
        [
            pytest.param(
                name,
                marks=[pytest.mark.skipif(name == "numba" and not HAS_NUMBA, reason="no numba")],
            )
            for name in names
        ],
    )


@engines("persistent", "numba", "manual", "fused", "chunked")
def test_parameters_after_10_steps(engine, dataset) -> None:
    expected, _ = trained("autograd", dataset, 10)
    parameters, _ = trained(engine, dataset, 10)
    for name, ours, theirs in zip(expected._fields, parameters, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=f"{name} differs")


@pytest.fixture(scope="module")
def losses_of_autograd(dataset) -> torch.Tensor:
    return trained("autograd", dataset, 1000)[1]


@engines("numba", "manual", "fused", "chunked")
def test_losses_over_1000_steps(engine, dataset, losses_of_autograd) -> None:
    _, losses = trained(engine, dataset, 1000)
    assert losses.shape == (1000,)
    torch.testing.assert_close(losses, losses_of_autograd, rtol=0, atol=1e-3)


@engines("fused", "chunked")
@pytest.mark.parametrize(
    "settings",
    [Settings(context=1, hidden=5, batch=2), Settings(context=8, embedding=3, hidden=7, batch=48)],
    ids=["smallest", "odd"],
)
def test_other_sizes(engine, settings) -> None:
    dataset = data.load(None, settings.context, torch.device("cpu"))
    expected, _ = trained("autograd", dataset, 5, settings)
    parameters, _ = trained(engine, dataset, 5, settings)
    for ours, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@engines("fused", "chunked", "autograd")
def test_blocks_do_not_matter(engine, dataset) -> None:
    """Ten steps at once or in three parts: the same parameters to the last bit; but for what adds
    up the table's gradients by atomics on a GPU."""
    whole, _ = trained(engine, dataset, 10)
    parameters, generator = initial_parameters(SETTINGS, 27, dataset.train.x.device)
    runner = ENGINES[engine](parameters)
    for steps in (1, 6, 3):
        index = torch.randint(0, len(dataset.train), (steps, SETTINGS.batch), generator=generator)
        index = index.to(dataset.train.x.device)
        runner.run(dataset.train.x, dataset.train.y, index, 0.1)
    exact = engine != "chunked" or dataset.train.x.device.type == "cpu"
    for ours, theirs in zip(parameters, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if exact else 1e-5)


def test_training_learns(dataset) -> None:
    """1,000 steps bring the validation loss from that of chance to below 2.6."""
    start, _ = trained("manual", dataset, 0)
    assert calibrate(start, dataset.train).loss(dataset.val) > 3.2
    parameters, _ = trained("manual", dataset, 1000)
    assert calibrate(parameters, dataset.train).loss(dataset.val) < 2.6


def test_calibration_is_the_whole_sets_statistics(dataset) -> None:
    parameters, _ = trained("manual", dataset, 3)
    model = calibrate(parameters, dataset.train)
    hprebn = parameters.C[dataset.train.x].flatten(1) @ parameters.W1 + parameters.b1
    torch.testing.assert_close(model.mean, hprebn.mean(0, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.var, hprebn.var(0, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU measurement")
def test_closed_forms_are_several_times_as_fast_as_autograd(dataset) -> None:
    """Interleaved in one process on one thread, medians; 4.8 and 11 where little else runs."""
    engines = ["autograd", "manual", "numba"] if HAS_NUMBA else ["autograd", "manual"]
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(9):
        for engine in engines:
            started = time.perf_counter()
            trained(engine, dataset, 500)
            times[engine].append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    median = {engine: statistics.median(t) for engine, t in times.items()}
    assert median["manual"] <= median["autograd"] / 3.5
    assert not HAS_NUMBA or median["numba"] <= median["autograd"] / 7
