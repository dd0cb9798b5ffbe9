"""pytest-benchmark: `python -m pytest bench/bench_*.py`, a benchmark a contender, case and phase.

The cases of the quick suite, or with `--suite full` of the full one, as large as memory and a
second or so a case allow; the runner (`python -m bench`) interleaves the contenders and is what
figures are quoted from.
"""

from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.cases import Case, Contender, Phase, Unavailable
from bench.measure import synchronise
from bench.runner import SLOW_TO_BUILD, fitted


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=("quick", "full"), default="quick", help="of the cases")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = metafunc.module
    if "phase" not in metafunc.fixturenames:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked, ids = [], []
    for case in op.cases(metafunc.config.getoption("--suite")):
        names = names_of(op, case) - set(SLOW_TO_BUILD)
        for phase in op.BYTES:
            for name in sorted(names):
                asked.append((op, case, device, name, phase))
                ids.append(f"{op.OPERATION}-{phase}[{name}-{case}]")
    metafunc.parametrize("phase", asked, ids=ids, indirect=True)


def names_of(op: ModuleType, case: Case) -> set[str]:
    """The contenders of a case, whose inputs are left to when it runs: a fake tensor takes no
    memory, and meta tensors would not be drawn from a generator."""
    with FakeTensorMode():
        return set(op.contenders(case, torch.device("cpu")))


@pytest.fixture
def phase(request: pytest.FixtureRequest) -> Phase:
    op, case, device, name, phase = request.param
    found = _contender(op, case, device, name).phases
    if phase not in found:
        pytest.skip(f"{name} has no such phase of its own")
    return built(found[phase], device)


def built(phase: Phase, device: torch.device) -> Phase:
    """The phase, up to when the device is done; what its first call builds is not to be timed."""

    def run(prepared: Any) -> None:
        phase.run(prepared)
        synchronise(device)

    run(phase.prepare())
    return Phase(run, phase.prepare)


@cache
def _fitted(op: ModuleType, case: Case, device: torch.device) -> Case:
    return fitted(op, case, device, seconds=10.0)


def _contender(op: ModuleType, case: Case, device: torch.device, name: str) -> Contender:
    try:
        return op.contenders(_fitted(op, case, device), device)[name]()
    except Unavailable as reason:
        pytest.skip(str(reason))
