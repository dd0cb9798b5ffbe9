"""What a time, a bandwidth and a peak are of, on clocks and devices that a test sets."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

import fused
from bench import (
    bench_cross_entropy,
    bench_makemore,
    cases,
    conftest,
    machine,
    measure,
    runner,
)
from bench.cases import Case, Phase, generator
from bench.measure import interleave, peak_bytes, wall

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The time that benchmarks look at: a test lets it pass."""
    time = SimpleNamespace(now=0.0)
    time.perf_counter = lambda: time.now
    monkeypatch.setattr(measure, "time", time)
    return time


@pytest.mark.parametrize("seconds, rounds", [(0.0, 5), (19.5, 9), (20.0, 10), (1e9, 100)])
def test_rounds_go_on_for_their_seconds(seconds, rounds, clock) -> None:
    def sample() -> float:
        clock.now += 1.0
        return clock.now

    found = interleave({"a": sample, "b": sample}, seconds)
    assert [len(samples) for samples in found.values()] == [rounds, rounds]


@pytest.mark.parametrize("most, calls", [(100, 27), (3, 3)])
def test_wall_time_is_of_calls_that_are_built_and_done(most, calls, clock, monkeypatch) -> None:
    """The first call, which builds, counts for nothing; the device is done before and after."""
    asked: list[str] = []

    def run(_: object) -> None:
        asked.append("run")
        clock.now += 2.0**-17 if clock.now else 1.0

    monkeypatch.setattr(measure, "synchronise", lambda device: asked.append("wait"))
    sampler = wall(Phase(run, lambda: asked.append("prepare")), CPU, most)
    asked.clear()
    assert sampler() == 2.0**-17
    assert asked == ["prepare"] * calls + ["wait"] + ["run"] * calls + ["wait"]


def test_peak_memory_of_a_gpu_is_above_what_was_held(monkeypatch) -> None:
    asked: list[str] = []
    bytes_of = {"memory_allocated": 100, "max_memory_allocated": 350}
    for name in ("synchronize", "reset_peak_memory_stats", *bytes_of):

        def answer(device: object, name: str = name) -> int:
            asked.append(name)
            return bytes_of.get(name, 0)

        monkeypatch.setattr(torch.cuda, name, answer)
    phase = Phase(asked.append, lambda: "run")
    assert peak_bytes(phase, torch.device("cuda")) == 250
    inside = asked[asked.index("reset_peak_memory_stats") : asked.index("max_memory_allocated")]
    assert inside == ["reset_peak_memory_stats", "run", "synchronize"]


def test_a_copy_reads_and_writes(clock, monkeypatch) -> None:
    """Both count, of the fastest of several."""
    seconds = iter([2.0, 0.5, *[1.0] * 8])

    def copy(goal: Tensor, source: Tensor) -> None:
        clock.now += next(seconds)

    monkeypatch.setattr(machine, "time", clock)
    monkeypatch.setattr(Tensor, "copy_", copy)
    assert machine.copy_bandwidth(CPU) == 2 * 2**28 / 0.5


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_result_names_the_version_and_the_commit(tmp_path, monkeypatch) -> None:
    """The commit where git answers, and for this folder: not for one around it."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a", *arguments]
        return subprocess.check_output(command, cwd=tmp_path, text=True)

    def found() -> dict[str, str]:
        versions = machine.describe(CPU)["versions"]
        return {name: versions[name] for name in ("fused", "commit") if name in versions}

    plain = {"fused": fused.__version__}
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_text("1")
    result = tmp_path / "bench" / "results" / "r.json"
    result.parent.mkdir(parents=True)
    result.write_text("1")
    git("init")
    git("add", "a", "bench")
    git("commit", "-m", "a")
    monkeypatch.setattr(machine, "_ROOT", tmp_path / "inner")
    assert found() == plain
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    commit = git("rev-parse", "HEAD")[:12]
    assert found() == plain | {"commit": commit}
    result.write_text("2")
    assert found() == plain | {"commit": commit}
    (tmp_path / "a").write_text("2")
    assert found() == plain | {"commit": f"{commit}-dirty"}
    monkeypatch.setenv("PATH", "")
    assert found() == plain


def test_memory_that_pytorch_holds_may_be_taken(monkeypatch) -> None:
    for name, value in (
        ("memory_reserved", 30),
        ("memory_allocated", 10),
        ("mem_get_info", (5, 99)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert machine.memory_bytes(torch.device("cuda")) == 5 + 30 - 10


def test_phases_and_upstream_gradients() -> None:
    """`fwd` leaves no graph; of the case `scaled` the upstream gradient is random, and not 1."""
    (op,) = runner.operations(["cross_entropy"]).values()
    found = []
    for variant in ("", "scaled"):
        case = Case("cross_entropy", (4, 27), torch.float32, variant)
        contender = op.contenders(case, CPU)["torch"]()
        assert not contender.phases["fwd"].run(None).requires_grad
        (dinput,) = contender.phases["fwd_bwd"].run(None)
        torch.testing.assert_close(dinput, contender.outputs()["dinput"])
        found.append(dinput)
    drawn = generator(CPU)
    torch.randn(4, 27, generator=drawn), torch.randint(0, 27, (4,), generator=drawn)
    upstream = 0.25 + torch.rand((), generator=drawn) / 2
    assert upstream < 0.75
    torch.testing.assert_close(found[1], upstream * found[0])


def test_a_step_of_many_models_is_timed_without_their_start(monkeypatch) -> None:
    """As one model's is, and JAX's."""
    started: list[int] = []
    problem = bench_makemore._problem

    def counted(case: Case, device: torch.device, steps: int) -> Any:
        started.append(steps)
        return problem(case, device, steps)

    monkeypatch.setattr(bench_makemore, "_problem", counted)
    case = Case("makemore", (32, 3, 27), torch.float32, "2models")
    for name in ("torch", "manual"):
        phase = bench_makemore.contenders(case, CPU)[name]().phases["step"]
        prepared = phase.prepare()
        started.clear()
        phase.run(prepared)
        assert not started, name


@pytest.mark.parametrize("ended", [False, True])
def test_a_capture_that_fails_is_ended(ended, monkeypatch) -> None:
    """Where CUDA refuses to end it, PyTorch's allocator would believe it to go on: it would give
    back no memory, and the next case's `empty_cache` raise."""
    done: list[object] = []

    @contextmanager
    def capture(graph: object, pool: object) -> Iterator[None]:
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    def end(device: int, pool: object) -> None:
        if ended:
            raise RuntimeError("not currently recording to mempool_id")
        done.append(("end", pool))

    side, current = MagicMock(), MagicMock()
    for name, value in {
        "Stream": lambda: side,
        "current_stream": lambda: current,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": object,
        "graph": capture,
        "graph_pool_handle": lambda: (0, 7),
        "current_device": lambda: 0,
        "set_stream": done.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    release = lambda device, pool: done.append(("release", pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
    with pytest.raises(RuntimeError, match="previous error"):
        cases._replay(Phase(lambda _: None))
    assert done == [current, *([] if ended else [("end", (0, 7)), ("release", (0, 7))])]


def test_a_forward_of_liger_forms_no_gradient(monkeypatch) -> None:
    """As nobody else's does in the phase `fwd`."""
    asked: list[bool] = []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        asked.append(logits.requires_grad)
        return logits.sum()

    for name in (
        "liger_kernel",
        "liger_kernel.transformers",
        "liger_kernel.transformers.functional",
    ):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(module, "liger_cross_entropy", loss, raising=False)
    x: Any = SimpleNamespace(
        device=torch.device("cuda"), dim=lambda: 2, detach=lambda: torch.zeros(4, 27)
    )
    phases = bench_cross_entropy._liger(x, torch.zeros(4), torch.ones(())).phases
    phases["fwd"].run(None)
    phases["fwd_bwd"].run(None)
    assert asked == [False, True]


@pytest.mark.parametrize("name", runner.operations())
def test_collecting_makes_no_inputs(name) -> None:
    """Of terabytes, which would fail: the cases of the full suite have some GB of weights."""
    (op,) = runner.operations([name]).values()
    for case in op.cases("full"):
        assert {"torch", "compile"} <= conftest.names_of(op, case.with_rows(1 << 34))


def test_a_pytest_benchmark_leaves_the_first_call_out() -> None:
    """Which builds, as in the runner."""
    calls: list[object] = []
    timed = conftest.built(Phase(calls.append, lambda: len(calls)), CPU)
    assert calls == [0]
    timed.run(timed.prepare())
    assert calls == [0, 1]
