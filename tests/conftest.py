"""Fixtures: the device, the implementation under test, and memory that is never clean by luck."""

import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers have the cores
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import fused

# The interpreter computes with NumPy, which warns where a GPU gives inf or NaN in silence.
INTERPRETER_WARNINGS = [
    "ignore:invalid value encountered:RuntimeWarning",
    "ignore:divide by zero encountered:RuntimeWarning",
    "ignore:overflow encountered:RuntimeWarning",
    "ignore:Conversion of an array with ndim:DeprecationWarning",  # before Triton 3.7
]
_DRIVER = pytest.StashKey[Any]()  # the emulator, if kernels are compiled


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels", "kernels on a machine without a GPU")
    group.addoption(
        "--compiled",
        action="store_true",
        help="compile the kernels and run their PTX in tests/emulator, in place of interpreting",
    )
    group.addoption("--compiled-for", type=int, choices=(80, 90), default=90, help="sm_80 or sm_90")
    group.addoption(
        "--compiled-copies",
        choices=("late", "early"),
        default="late",
        help="when asynchronous copies arrive: as they are waited for, or at once",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports triton."""
    compiled = config.getoption("--compiled")
    if torch.cuda.is_available():
        if compiled:
            raise pytest.UsageError("--compiled is for machines without a GPU: this one has one")
    elif compiled:
        os.environ.pop("TRITON_INTERPRET", None)
        from tests.emulator.driver import Driver

        early = config.getoption("--compiled-copies") == "early"
        driver = Driver(config.getoption("--compiled-for"), early)
        driver.activate()
        config.stash[_DRIVER] = driver
    else:
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Skips a test of what is not here: instructions that the emulator does not know (large
    products for sm_90 are wgmma; for sm_80 they are mma, which it knows), or the tensor cores that
    one engine is made for."""
    try:
        return (yield)
    except NotImplementedError as error:
        if item.config.getoption("--compiled") and "wgmma" in str(error):
            pytest.skip(f"not emulated: {error}")
        raise
    except ValueError as error:
        if torch.cuda.is_available() and "which this GPU does not have" in str(error):
            pytest.skip(str(error))
        raise


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    driver = config.stash.get(_DRIVER, None)
    for name, launches in sorted(driver.launches.items()) if driver else ():
        terminalreporter.write_line(
            f"compiled for sm_{driver.capability}: {name}, {launches} times"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        interpreted = item.get_closest_marker("interpreted")
        if interpreted and config.getoption("--compiled"):
            item.add_marker(pytest.mark.skip(reason=f"not compiled: {interpreted.args[0]}"))
        for warning in INTERPRETER_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(warning))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["eager", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every operation's test runs on the closed forms and on the Triton kernels."""
    with fused.backend.use(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, empty_like and empty_permuted give NaN: an element never written shows."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.detach() if tensor.requires_grad else tensor
        memory.fill_(float("nan") if tensor.is_floating_point() else 77)
        return tensor

    for name in ("empty", "empty_like", "empty_permuted"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=make, **k: poison(f(*a, **k)))


@pytest.fixture(scope="session")
def names_file() -> Path:
    """The notebooks' names.txt: $FUSED_NAMES, or the copy beside the checkout."""
    path = Path(
        os.environ.get("FUSED_NAMES") or Path(__file__).parents[2] / "shared" / "data" / "names.txt"
    )
    if not path.is_file():
        pytest.skip("names.txt is not here; set FUSED_NAMES to its path")
    return path


@pytest.fixture
def half_a_group() -> Iterator[None]:
    """This process is the first of two; the other one is nowhere, and has what this one has."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As on a terminal: what a shell runs in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
