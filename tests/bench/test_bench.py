"""The benchmark's own figures: what it measures, what it refuses, what it writes."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as bench_main
from bench import assembly, gpt, measure, report, runner, tables
from bench.cases import Case, Contender, Phase, compiled, differentiable, forget_compiled
from bench.measure import Times, interleave, on_device, peak_bytes, wall
from tests.test_package import ROOT

CPU = torch.device("cpu")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "bench", *arguments)


def test_times_are_the_median_and_the_outer_tenths() -> None:
    assert Times.of([float(i * i) for i in range(101)]) == Times(2500.0, 100.0, 8100.0, 101)
    assert Times.of([3.0]) == Times(3.0, 3.0, 3.0, 1)


def test_rounds_are_interleaved_in_orders_that_differ() -> None:
    order: list[str] = []

    def sampler(name: str) -> Callable[[], float]:
        def sample() -> float:
            order.append(name)
            return 1.0

        return sample

    found = interleave({name: sampler(name) for name in "abc"}, seconds=0.0)
    assert found == {name: [1.0] * 5 for name in "abc"}
    assert "".join(order) == "abc" + "bca" + "cab" + "cba" + "acb"


@pytest.mark.parametrize("n", [2, 3, 7, 8, 11])
def test_how_often_contenders_follow_each_other_differs_by_two(n) -> None:
    """After any number of rounds, as what the time ends."""
    pairs = Counter({(a, b): 0 for a in range(n) for b in range(n) if a != b})
    for done in range(100):
        pairs.update(itertools.pairwise(measure._order(n, done)))
        assert max(pairs.values()) - min(pairs.values()) <= 2


@pytest.mark.parametrize("n", [2, 5, 6])
def test_each_contender_follows_each_other_equally_often(n) -> None:
    rounds = [measure._order(n, done) for done in range(2 * n)]
    assert all(sorted(row) == list(range(n)) for row in rounds)
    pairs = Counter(pair for row in rounds for pair in itertools.pairwise(row))
    assert pairs == {(a, b): 2 for a in range(n) for b in range(n) if a != b}
    assert Counter(row[0] for row in rounds) == dict.fromkeys(range(n), 2)


def test_wall_time_is_per_unit_and_leaves_preparation_out() -> None:
    calls: list[str] = []

    def prepare() -> str:
        calls.append("prepare")
        return "run"

    phase = Phase(calls.append, prepare, units=4)
    assert 0 < wall(phase, CPU)() < 1e-3
    assert calls.count("prepare") == calls.count("run") > 100


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11
def test_peak_memory_is_of_what_is_held_at_once() -> None:
    def twice_then_once(_: object) -> Tensor:
        a = torch.zeros(250_000)  # 1 MB
        b = a + 1
        del a
        return b * 2

    assert 2_000_000 <= peak_bytes(Phase(twice_then_once), CPU) < 2_010_000


class Square:
    """An operation with a contender whose gradient is wrong."""

    OPERATION = "square"
    BYTES = {"fwd_bwd": "1 read and 1 write"}

    def cases(self, suite: str) -> list[Case]:
        return [Case("square", (64, 8), torch.float32)]

    def least_bytes(self, case: Case) -> dict[str, int]:
        return {"fwd_bwd": 2 * case.bytes}

    def contenders(self, case: Case, device: torch.device):
        x = torch.randn(case.shape, requires_grad=True)
        dy = torch.randn(case.shape)

        def wrong() -> Contender:
            phases = {"fwd_bwd": Phase(lambda _: 2 * x * dy)}
            return Contender(lambda: {"output": x**2, "dinput": x * dy}, phases)

        def chunked() -> Contender:
            phases = {"fwd_bwd": Phase(lambda _: 2 * x * dy)}
            return Contender(lambda: {"output": x**2 + 1, "dinput": 2 * x * dy}, phases)

        return {
            "torch": lambda: differentiable(lambda: x**2, {"input": x}, dy),
            "chunked": chunked,
            "fused": lambda: differentiable(lambda: x * x, {"input": x}, dy),
            "wrong": wrong,
        }


def test_what_computes_something_else_is_not_timed(monkeypatch) -> None:
    monkeypatch.setattr(runner, "operations", lambda names=None: {"square": Square()})
    result = runner.run("quick", None, None, CPU, 20.0)
    assert {r["contender"] for r in result["rows"]} == {"torch", "chunked", "fused"}
    (note,) = result["notes"]  # that the references differ
    assert note.startswith("square 64x8-f32: chunked's output is ")
    (skip,) = result["skipped"]
    assert skip["contender"] == "wrong" and skip["reason"].startswith("wrong: dinput")
    row = result["rows"][0]
    assert row["contender"] == "torch" and row["ratio_to_torch"]["wall"] == 1.0
    assert row["times"]["wall"]["samples"] >= 5


def test_kernels_that_cannot_be_compiled_beforehand_are_a_note(monkeypatch) -> None:
    kernels = pytest.importorskip("bench.kernels")

    def build(todo: Any, processes: int) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(kernels, "build", build)
    result: dict[str, Any] = {"notes": []}
    runner._build_kernels([], result)
    assert result["notes"] == ["kernels were not compiled beforehand: RuntimeError: no room"]


def test_a_failure_of_ours_is_listed_and_the_other_cases_run(monkeypatch, capsys) -> None:
    class Failing(Square):
        def cases(self, suite: str) -> list[Case]:
            return [Case("square", (n, 8), torch.float32) for n in (64, 2, 32)]

        def contenders(self, case: Case, device: torch.device):
            found = super().contenders(case, device)

            def fail() -> Contender:
                raise RuntimeError("out of registers")

            if case.shape[0] == 2:
                raise torch.OutOfMemoryError
            return found | ({"fused": fail} if case.shape[0] == 64 else {})

    monkeypatch.setattr(runner, "operations", lambda names=None: {"square": Failing()})
    result = runner.run("quick", None, None, CPU, 20.0)
    (failure,) = result["failures"]
    assert failure["case"] == "64x8-f32" and failure["reason"] == "RuntimeError: out of registers"
    reasons = {(s["case"], s["contender"]): s["reason"] for s in result["skipped"]}
    assert reasons["64x8-f32", "fused"] == failure["reason"]
    assert reasons["2x8-f32", "all"] == "out of memory"
    measured = {(r["case"], r["contender"]) for r in result["rows"]}
    assert {("64x8-f32", "torch"), ("32x8-f32", "fused")} <= measured
    assert "out of registers" in capsys.readouterr().err


def test_a_budget_that_ends_early_has_had_every_operation() -> None:
    for suite in ("quick", "full"):
        found = [(op, op.cases(suite)) for op in runner.operations().values()]
        turns = runner.in_turn(found)
        assert len(turns) == sum(len(of) for _, of in found)
        headlines = sum(case.headline for _, case in turns)
        assert all(case.headline for _, case in turns[:headlines])
        assert len({op.OPERATION for op, _ in turns[: len(found)]}) == len(found)


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_sample_of_device_time(waits, cold, monkeypatch) -> None:
    """What is asked of the device and in which order, of one that is not there: it never waits for
    the host, unless the phase has streams of its own, which would run while ours sleeps. L2 has
    either nothing, or what the phase itself leaves there."""
    asked: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("event")

        def elapsed_time(self, end: object) -> float:
            return 3.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: asked.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("wait"))
    monkeypatch.setattr(Tensor, "zero_", lambda tensor: asked.append(f"clear {len(tensor)}"))
    properties = SimpleNamespace(L2_cache_size=1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def prepare() -> str:
        asked.append("prepare")
        return "run"

    phase = Phase(asked.append, prepare, units=2, waits=waits)
    sampler = on_device(phase, CPU, cold=cold)
    asked.clear()
    assert sampler() == 1.5e-3
    before = ["wait" if waits else "sleep"]
    before = ["prepare", "clear 4096", *before] if cold else ["prepare", "run", "prepare", *before]
    assert asked == [*before, "event", "run", "event", "wait"]


def test_nothing_is_compiled_twice_in_a_case(monkeypatch) -> None:
    """Nor while it is measured; but for the next case all is forgotten, as Dynamo has limits."""
    compilations: list[str | None] = []
    compile = torch.compile

    def counted(function: Any, mode: str | None, dynamic: bool) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            compilations.append(mode)
            return graph.forward

        return compile(function, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", counted)
    x = torch.ones(3)

    def build(wrap: Any) -> Contender:
        square = wrap(lambda x: x * x)
        return Contender(lambda: {"output": square(x)}, {})

    forget_compiled()
    contenders = []
    for mode in (None, "max"):
        contenders.append(compiled(build, mode)())
        for contender in contenders:
            contender.outputs()
    assert compilations == [None, "max"]
    forget_compiled()
    contenders[0].outputs()
    assert compilations == [None, "max", None]


def test_the_page_of_a_gpu(tmp_path, monkeypatch) -> None:
    """A made-up JSON as an H100's would be: bandwidths are of the time with a cold cache."""
    cases = {
        "cross_entropy": ["fwd", "fwd_bwd"],
        "linear_cross_entropy": ["fwd_bwd"],
        "makemore": ["step"],
    }
    rows = []
    for operation, phases in cases.items():
        for phase, (name, factor) in itertools.product(phases, [("torch", 4), ("fused", 1)]):
            loop, bounded = operation == "makemore", operation == "cross_entropy"
            metrics = {"wall": 9e-5} | ({} if loop else {"device_warm": 1e-5, "device_cold": 2e-5})
            times = {k: asdict(Times.of([factor * t] * 5)) for k, t in metrics.items()}
            rows.append({
                "operation": operation, "case": "64x1000-f32", "asked": "8192x1000-f32",
                "shape": [64, 1000], "dtype": "f32", "variant": "", "tensor_bytes": 256_000,
                "phase": phase, "contender": name, "times": times, "peak_bytes": 512_000,
                "least_bytes": 30_000_000 if bounded else None,
                "ratio_to_torch": {k: factor / 4 for k in metrics},
            })  # fmt: skip
    result = {
        "suite": "quick", "date": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "command": "bench",
        "machine": {"type": "cuda", "name": "NVIDIA H100", "versions": {"torch": "2.13.0"}},
        "copy_bytes_per_second": 3e12, "rows": rows, "skipped": [], "failures": [], "notes": [],
    }  # fmt: skip
    (tmp_path / "nvidia-h100-2026-01-01.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(report, "README", tmp_path / "readme.md")
    monkeypatch.setattr(report, "_SHOWN", ("nvidia-h100-2026-01-01.json",))
    (tmp_path / "readme.md").write_text(f"above\n{report._BEGIN}old{report._END}below\n")
    report.write()
    page = (tmp_path / "page.md").read_text()
    assert page == report.text()
    found = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines()]
    for phase in cases["cross_entropy"]:
        assert ["64x1000-f32", phase, "80 us", "0.25", "1500.0", "50%"] in found
    assert ["64x1000-f32", "fwd_bwd", "80 us", "0.25"] in found  # no bound by bytes
    assert page.count("Wall time of calls in a row:") == 3 and "90 us" in page
    assert page.count("Device time with a warm L2 cache:") == 2
    assert page.count("| 64x1000-f32 |     fwd | 40 us | 10 us |") == 1
    above, *_, row, _, _, below = (tmp_path / "readme.md").read_text().splitlines()
    assert (above, below) == ("above", "below")
    cells = ["cross_entropy", "64x1000-f32", "80 us", "0.25", "", "2.00", "2.00", ""]
    assert [c.strip() for c in row.split("|")[1:-1]] == cells
    assert "64x1000-f32 fused" in page and "11,111" in page  # steps a second
    kinds = [f"{op}-{kind}" for op in list(cases)[:2] for kind in ("speed", "memory")]
    for picture in [*kinds, "makemore-speed"]:
        assert f"results/nvidia-h100-2026-01-01-{picture}.png" in page


def test_cases_shrink_to_the_budget() -> None:
    op = runner.operations(["cross_entropy"])["cross_entropy"]
    case = Case("cross_entropy", (8192, 32000), torch.float32)
    fitted = runner.fitted(op, case, CPU, seconds=0.5)
    assert 1 <= fitted.shape[0] < 8192 and fitted.shape[1] == 32000


def test_compare_says_what_changed(tmp_path) -> None:
    def result(median: float) -> dict:
        times = {"wall": {"median": median, "low": 0.9 * median, "high": 1.1 * median}}
        row = {"operation": "op", "case": "8x8", "phase": "fwd", "contender": "fused"}
        machine = {"name": "here", "type": "cpu", "threads": 1, "versions": {}}
        return {
            "rows": [{**row, "times": times}],
            "machine": machine,
            "date": "2026-01-01",
            "suite": "quick",
            "copy_bytes_per_second": 1e9,
        }

    a, b, c = (result(median) for median in (1e-3, 2e-3, 1.1e-3))
    for name, content in (("a", a), ("b", b)):
        (tmp_path / name).write_text(json.dumps(content))
    slower = bench("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert slower.returncode == 0, slower.stderr
    assert "2.00 | changed" in slower.stdout
    assert "0.50 | changed" in tables.compare(b, a)
    assert "1.10 |" in tables.compare(a, c) and "changed" not in tables.compare(a, c)
    assert "Only in" not in tables.compare(a, c)
    a["rows"].append({**a["rows"][0], "phase": "bwd"})
    assert tables.compare(a, b).endswith("Only in A: 1, only in B: 0")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--op", "nope"], "bench: expected --op to be one of"),
        (["--case", "nope"], "bench: no case of the suite has 'nope' in its name"),
        (
            ["--case", "nope", "--case", "no"],
            "bench: no case of the suite has 'nope' or 'no' in its name",
        ),
        (["compare", "no.json", "no.json"], "bench: [Errno 2]"),
        (["kernels", "--target", "sm_1"], "bench: expected --target of sm_80"),
        (["kernels", "--case", "nope"], "bench: no kernel case has 'nope' in its name"),
        (["--out", "tests"], "bench: --out tests: expected a file"),
        (["kernels", "--out", "tests"], "bench: --out tests: expected a file"),
    ],
)
def test_bad_input_is_one_line(arguments, message) -> None:
    result = bench(*arguments)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "option, value",
    [
        ("device", "gpu"),
        ("device", "meta"),
        ("threads", "-1"),
        ("threads", "0"),
        ("budget", "nan"),
        ("budget", "abc"),
    ],
)
def test_options_out_of_range_are_refused(option, value, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["bench", f"--{option}", value])
    with pytest.raises(SystemExit, match="2"):
        bench_main.main()
    assert f"argument --{option}: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("--steps", "0", "a positive whole number"),
        ("--steps", "many", "a positive whole number"),
        ("--out", "missing/gpt.json", "a file in a folder that exists"),
        ("--out", "folder", "a file in a folder that exists"),
    ],
)
def test_the_gpt_refuses_what_it_could_not_do(
    option, value, expected, tmp_path, monkeypatch, capsys
) -> None:
    """Before it trains."""
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr("sys.argv", ["gpt", option, value])
    with pytest.raises(SystemExit, match="2"):
        gpt.main()
    message = f"error: argument {option}: expected {expected}, got {value!r}\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize("option", ["--op", "--case", "--out", "--budget"])
@pytest.mark.parametrize("command", [["kernels"], ["compare", "a", "b"], ["report"]])
def test_options_before_a_command_are_refused(option, command, monkeypatch, capsys) -> None:
    """They are not the command's: it would go on without them."""
    monkeypatch.setattr("sys.argv", ["bench", option, "1", *command])
    with pytest.raises(SystemExit, match="2"):
        bench_main.main()
    assert (
        f"error: expected options after the command, got {option} before it"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "content, found",
    [
        (b"", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        (b"\xff", "UnicodeDecodeError"),
        (b"[]", "TypeError"),
        (b"{}", "KeyError: 'machine'"),
        (b'{"rows": [{}]}', "KeyError: 'machine'"),
        (b'{"rows": [{}], "suite": "quick", "machine": []}', "TypeError"),
    ],
)
def test_a_file_that_is_no_run_is_named(content, found, tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    named = f"bench: {path}: expected the JSON of a run of this benchmark ("
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    for arguments in (["compare", str(path), str(path)], ["report"]):
        if arguments == ["report"] and content in (b"[]", b"{}"):
            continue  # the page leaves out what others keep there
        monkeypatch.setattr("sys.argv", ["bench", *arguments])
        with pytest.raises(SystemExit) as end:
            bench_main.main()
        message = str(end.value.code)
        assert message.startswith(named) and "\n" not in message
        assert arguments == ["report"] or message.startswith(named + found)
    assert not (tmp_path / "page.md").exists()


def test_the_help_names_the_operations(monkeypatch, capsys) -> None:
    for command in ([], ["kernels"]):
        monkeypatch.setattr("sys.argv", ["bench", *command, "--help"])
        with pytest.raises(SystemExit):
            bench_main.main()
        words = " ".join(capsys.readouterr().out.split())
        assert "one of batch_norm, cross_entropy, linear_cross_entropy, makemore; rep" in words


def test_the_page_shows_pictures_of_its_own_run(tmp_path, monkeypatch) -> None:
    """Not those of another whose name goes on where the first's ends."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for stem in ("cpu", "cpu-cross_entropy"):
        for kind in ("speed", "memory"):
            (tmp_path / f"{stem}-cross_entropy-{kind}.png").touch()
    result = json.loads((report.ROOT / "bench/results/cpu-amd-epyc-1-thread.json").read_text())
    for stem in ("cpu", "cpu-cross_entropy"):
        section = report._section(tmp_path / f"{stem}.json", result)
        assert re.findall(r"results/(.*)\.png", section) == [
            f"{stem}-cross_entropy-memory",
            f"{stem}-cross_entropy-speed",
        ]


def test_the_page_says_what_asked_for_large_pages() -> None:
    path = report.ROOT / "bench/results/cpu-amd-epyc-1-thread-large-pages.json"
    result = json.loads(path.read_text())
    variable = "`THP_MEM_ALLOC_ENABLE=1 python -m bench "
    assert variable in report._section(path, result)
    result["machine"]["large_pages"] = False
    assert variable not in report._section(path, result)


class Interrupting(Square):
    """A signal while the second of three cases is built."""

    interrupts_at = 2
    by = signal.SIGINT

    def cases(self, suite: str) -> list[Case]:
        return [Case("square", (n, 8), torch.float32) for n in (64, 2, 32)]

    def contenders(self, case: Case, device: torch.device):
        if case.shape[0] == self.interrupts_at:
            signal.raise_signal(self.by)
        return super().contenders(case, device)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "timeout"])
def test_an_interrupted_run_leaves_what_was_measured(
    by, tmp_path, monkeypatch, capsys, interruptible
) -> None:
    operation = Interrupting()
    operation.by = by
    monkeypatch.setattr(runner.machine, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(runner, "operations", lambda names=None: {"square": operation})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cpu", "--budget", "20"])
    with pytest.raises(SystemExit) as end:
        bench_main.main()
    out, err = capsys.readouterr()
    assert end.value.code == 130 and err.endswith("bench: interrupted\n")
    assert "Traceback" not in err and "- square, all: interrupted (2x8-f32, 32x8-f32)" in out
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-interrupted.json")  # a complete run of that day stays
    result = json.loads(path.read_text())
    assert result["interrupted"] and {row["case"] for row in result["rows"]} == {"64x8-f32"}
    assert "64x8-f32" in report._section(path, result)


def test_interrupted_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, interruptible
) -> None:
    operation = Interrupting()
    operation.interrupts_at = 64
    monkeypatch.setattr(runner.machine, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(runner, "operations", lambda names=None: {"square": operation})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cpu", "--budget", "20"])
    with pytest.raises(SystemExit) as end:
        bench_main.main()
    out, err = capsys.readouterr()
    assert end.value.code == 130 and err.endswith("bench: interrupted\n") and not out
    assert not list(tmp_path.iterdir())


def test_an_interrupted_kernel_report() -> None:
    """As on a terminal: Ctrl-C goes to every process of the command."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "kernels", "--processes", "2"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("[1/")
    time.sleep(0.5)  # Python sees no signal that comes just before it waits for a lock
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert (process.returncode, out, lines) == (130, "", ["bench: interrupted"])


def test_the_page_is_what_the_results_say() -> None:
    """docs/benchmarks.md and the README are up to date: python -m bench report."""
    assert report.PAGE.read_text() == report.text()
    assert report.README.read_text() == report.readme()
    runs = json.loads((report.RESULTS / "gpt.json").read_text())["gpt"]
    peaks = [f"{runs[name]['peak_bytes'] / 2**20:.1f}" for name in ("unfused", "fused")]
    assert " and ".join(peaks) + " MiB a step" in report.README.read_text()


def test_the_predicted_step_is_that_of_the_kernel_report() -> None:
    """docs/performance.md: two warps a scheduler, 0.4 instructions a cycle at 1.755 GHz."""
    page = (report.PAGE.parent / "performance.md").read_text()
    kernels = json.loads((report.RESULTS / "kernels-triton-3.7.1.json").read_text())["kernels"]
    (targets,) = (row["targets"] for row in kernels if row["kernel"] == "mlp_train")
    for target, made in targets.items():
        unit = " registers" if target == "gfx942" else ""
        (loop,) = made["loops"]
        row = rf"\| {target} \| {made['spilled']}{unit} \| [0-9 /]+ \| {loop['instructions']:,} \|"
        assert re.search(row, page), target
        if target == "sm_90":
            assert f"2 x {loop['instructions']:,} instructions" in page
            shared = f"{loop['barriers']} | {made['spilled']} | {made['shared'] // 1024} KB |"
            assert re.search(rf"`fp16x3` \(default\) .* {re.escape(shared)}", page)
            step = 2 * loop["instructions"] / 0.4 / 1755  # microseconds
            assert f"| `fp16x3` | {step:.1f} | {step / 5:.1f} s |" in page


def test_a_table_reads_without_being_rendered() -> None:
    assert tables.markdown(["a", "bb"], [["x", "1"], ["long", "22"]]).splitlines() == [
        "| a    |  bb |",
        "| ---- | --: |",
        "| x    |   1 |",
        "| long |  22 |",
    ]


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
        /*0010*/               @P1 LDG.E.128 R8, desc[UR16][R24.64] ;
        /*0020*/              @!P0 BRA 0x60 ;
        /*0030*/                   LDG.E.U16 R8, desc[UR16][R24.64] ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/              @!P4 BRA 0x30 ;
        /*0060*/                   STG.E desc[UR16][R2.64], R15 ;
        /*0070*/              @!P4 BRA 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""
GCN = """
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[4:7], v[4:5], off
	s_cbranch_execz .LBB0_3
	buffer_store_short v1, v2, s[0:3], 0 offen
.LBB0_3:
	s_cbranch_scc0 .LBB0_1
.LBB0_2:
	global_store_dword v0, v1, s[0:1]
	s_endpgm
"""


@pytest.mark.parametrize(
    "instructions, whole, loop",
    [
        (
            assembly.parse_sass(SASS),
            assembly.Code(10, 1, {16: 1, 2: 1}, {4: 1}),
            assembly.Code(3, 1, {2: 1}, {}),
        ),
        (
            assembly.parse_amdgcn(GCN),
            assembly.Code(7, 0, {16: 1}, {4: 1, 2: 1}),
            assembly.Code(4, 0, {16: 1}, {2: 1}),
        ),
    ],
    ids=["sass", "amdgcn"],
)
def test_loops_and_accesses_are_read_from_assembly(instructions, whole, loop) -> None:
    assert assembly.summary(instructions) == whole
    assert [assembly.summary(found) for found in assembly.inner_loops(instructions)] == [loop]


def test_a_second_read_shows_in_the_kernel_report() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("second_read.py")
    found = {}
    for interpret in ("0", "1"):
        environment = {**os.environ, "TRITON_INTERPRET": interpret}
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        found[interpret] = json.loads(done.stdout)
    once, twice = found["0"]
    assert (len(once["loops"]), len(twice["loops"])) == (2, 3)
    assert once["spilled"] == twice["spilled"] == 0
    assert [*once["loops"][0]["loads"]] == [*once["loops"][-1]["stores"]] == ["16"]
    size = 4 * 4096
    assert found["1"] == [["_copy_kernel", size, size], ["_copy_kernel", 2 * size, size]]


def bench_alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Where only torch and Triton are installed."""
    others = ("jax", "liger_kernel", "matplotlib", "numba", "numpy", "pytest", "tqdm")
    code = "import runpy, sys; sys.modules |= dict.fromkeys(sys.argv[1].split(',')); "
    code += "sys.argv[:] = ['bench', *sys.argv[2:]]; runpy.run_module('bench', run_name='__main__')"
    return python("-c", code, ",".join(others), *arguments)


def test_runs_where_only_torch_and_triton_are_installed(tmp_path) -> None:
    """Tables and a JSON, but no plots."""
    options = ["--op", "cross_entropy", "--case", "32x27-f32", "--budget", "8"]
    out = tmp_path / "result.json"
    done = bench_alone(*options, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "| 32x27-f32 " in done.stdout and "no plots: matplotlib is not" in done.stdout
    result = json.loads(out.read_text())
    assert result["rows"] and not result["failures"]
    assert "liger_kernel is not installed" in str(result["skipped"])
    assert [*tmp_path.iterdir()] == [out]


def test_the_kernel_report_where_only_torch_and_triton_are_installed(tmp_path) -> None:
    """All but the bytes: Triton's interpreter needs NumPy."""
    pytest.importorskip("triton")
    options = ["--op", "cross_entropy", "--case", "32x27-f32", "--target", "sm_90"]
    out = tmp_path / "result.json"
    done = bench_alone("kernels", *options, "--processes", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "reads and writes are not counted: NumPy is not installed" in done.stderr
    rows = json.loads(out.read_text())["kernels"]
    assert [row["kernel"] for row in rows] == ["cross_entropy_fwd", "cross_entropy_scale"]
    assert all(row["reads"] is None and row["targets"]["sm_90"]["registers"] for row in rows)
