"""What the runner takes for wrong, what it lists as skipped, and what a row says."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import measure, runner
from bench.cases import Case, Contender, Phase
from tests.bench.test_bench import CPU, Square

WRONG: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "another dtype": lambda ones, zeros: (ones.double(), zeros),
    "a NaN": lambda ones, zeros: (ones.index_fill(0, torch.tensor(0), torch.nan), zeros),
    "off by 0.1%": lambda ones, zeros: (ones * 1.001, zeros),
    "where there is nothing": lambda ones, zeros: (ones, zeros + 1e-3),
}


def test_what_counts_as_something_else(monkeypatch) -> None:
    class Wrong(Square):
        def contenders(self, case: Case, device: torch.device):
            right = torch.ones(case.shape), torch.zeros(case.shape)
            names, phases = ("output", "dinput"), {"fwd_bwd": Phase(lambda _: None)}

            def gives(outputs: tuple[Tensor, Tensor]) -> Callable[[], Contender]:
                return lambda: Contender(lambda: dict(zip(names, outputs, strict=True)), phases)

            found = {name: gives(change(*right)) for name, change in WRONG.items()}
            rounded = right[0] * (1 + 1e-5), right[1]
            return {"torch": gives(right), "fused": gives(right), "rounded": gives(rounded)} | found

    monkeypatch.setattr(runner.machine, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(runner, "operations", lambda names=None: {"square": Wrong()})
    result = runner.run("quick", None, None, CPU, 1.0)
    assert {r["contender"] for r in result["rows"]} == {"torch", "fused", "rounded"}
    assert {s["contender"] for s in result["skipped"]} == set(WRONG)
    assert all(s["reason"].startswith("wrong: ") for s in result["skipped"])


@pytest.fixture
def quick(monkeypatch) -> Callable[[Any], dict[str, Any]]:
    """A run of one operation, with what takes time left out."""

    def run(op: Any) -> dict[str, Any]:
        monkeypatch.setattr(runner, "operations", lambda names=None: {"square": op})
        return runner.run("quick", None, ["x8-f"], CPU, 1e3)

    samples = {"torch": [4.0, 2.0, 10.0], "fused": [1.0, 1.0, 4.0]}
    monkeypatch.setattr(runner.machine, "copy_bandwidth", lambda device: 1.0)

    def weighed(phase: Phase, device: torch.device) -> int:
        phase.run(phase.prepare())
        return 100

    monkeypatch.setattr(runner, "peak_bytes", weighed)
    monkeypatch.setattr(
        runner, "interleave", lambda s, seconds: {n: samples.get(n, [1.0] * 3) for n in s}
    )
    return run


def test_a_row_says_what_was_measured(quick, monkeypatch) -> None:
    """The median of a round's ratios; bytes of the rows that memory allowed; in the cases' order,
    though headlines are measured first."""

    class Two(Square):
        def cases(self, suite: str) -> list[Case]:
            headline = Case("square", (2048, 8), torch.float32, headline=True)
            other = Case("square", (9, 9), torch.float32)  # nobody asked for
            return [*super().cases(suite), headline, other]

    monkeypatch.setattr(runner.machine, "memory_bytes", lambda device: 150_000)
    of_all = quick(Two())["rows"]
    rows = [r for r in of_all if (r["contender"], r["phase"]) == ("fused", "fwd_bwd")]
    assert [row["asked"] for row in rows] == ["64x8-f32", "2048x8-f32"]
    row = rows[1]
    assert (row["case"], row["shape"]) == ("128x8-f32", (128, 8))
    assert (row["tensor_bytes"], row["least_bytes"], row["peak_bytes"]) == (4096, 8192, 100)
    assert row["times"]["wall"]["median"] == 1.0 and row["ratio_to_torch"]["wall"] == 0.4


def test_what_takes_long_to_build(quick) -> None:
    class Compiled(Square):
        def cases(self, suite: str) -> list[Case]:
            return [Case("square", (n, 8), torch.float32, headline=n == 2) for n in (2, 4)]

        def contenders(self, case: Case, device: torch.device):
            found = super().contenders(case, device)
            own = {"compile": found["fused"], "compile max": found["fused"]}
            return {"torch": found["torch"]} | own

    result = quick(Compiled())
    found = {(r["case"], r["contender"]) for r in result["rows"]}
    assert found == {("2x8-f32", "torch"), ("2x8-f32", "compile"), ("4x8-f32", "torch")}
    some, full = "only at some shapes: it takes long to compile", "only in the full suite"
    reasons = {(s["case"], s["contender"]): s["reason"] for s in result["skipped"]}
    assert reasons == {
        ("2x8-f32", "compile max"): full,
        ("4x8-f32", "compile max"): some,
        ("4x8-f32", "compile"): some,
    }


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("no warps")])
def test_what_does_not_run_is_listed(error, quick, capsys) -> None:
    """What has no memory, built or weighed; but of an error of our own the case fails."""

    class Unable(Square):
        def contenders(self, case: Case, device: torch.device):
            def fail(_: object = None) -> Any:
                raise error

            found = super().contenders(case, device)
            weighed = Contender(found["fused"]().outputs, {"fwd_bwd": Phase(fail)})
            others = {"built": fail, "weighed": lambda: weighed}
            return {"torch": found["torch"], **others, "fused": lambda: weighed}

    result = quick(Unable())
    reasons = {s["contender"]: s["reason"] for s in result["skipped"]}
    if isinstance(error, torch.OutOfMemoryError):
        full = "out of memory in fwd_bwd"
        assert reasons == {"built": "out of memory", "weighed": full, "fused": full}
        assert {r["contender"] for r in result["rows"]} == {"torch"} and not result["failures"]
    else:
        said = "RuntimeError: no warps"
        assert reasons == {"built": said, "weighed": f"{said} in fwd_bwd", "all": said}
        assert [f["reason"] for f in result["failures"]] == [said]


@pytest.mark.parametrize("budget, seconds", [(101.0, 100.0), (1.0, 18.0)])
def test_a_run_ends_with_its_budget(budget, seconds, monkeypatch) -> None:
    """Where every call takes a second: torch and fused are checked (2 s), weighed (2 s), called to
    know how many calls to time (4 s), and have rounds of 2 s, 5 at least. The others are checked
    (8 s) in the budget or not at all."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now

    def run(_: object = None) -> dict[str, Tensor]:
        clock.now += 1.0
        return {}

    class Slow(Square):
        def contenders(self, case: Case, device: torch.device):
            def of(outputs: Callable[[], dict[str, Tensor]]) -> Callable[[], Contender]:
                return lambda: Contender(outputs, {"fwd_bwd": Phase(run)})

            def fail() -> dict[str, Tensor]:
                clock.now += 1.0
                raise RuntimeError("no warps")

            return {"torch": of(run), "fused": of(run), **{n: of(fail) for n in "abcdefgh"}}

    monkeypatch.setattr(runner.machine, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(runner, "operations", lambda names=None: {"square": Slow()})
    monkeypatch.setattr(runner, "peak_bytes", lambda phase, device: len(run()))
    for module in (runner, measure):
        monkeypatch.setattr(module, "time", clock)
    result = runner.run("quick", None, None, CPU, budget)
    assert result["seconds"] == seconds
    left = "not enough of the budget left"
    reasons = {s["reason"] for s in result["skipped"]}
    assert reasons == {left if budget == 1.0 else "RuntimeError: no warps"}


def test_what_the_budget_or_torch_leaves_out_is_listed(monkeypatch, capsys) -> None:
    class Failing(Square):
        def contenders(self, case: Case, device: torch.device):
            def fail() -> Contender:
                raise RuntimeError("no such operator")

            return super().contenders(case, device) | {"torch": fail}

    monkeypatch.setattr(runner.machine, "copy_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(runner, "operations", lambda names=None: {"square": Square()})
    result = runner.run("quick", None, None, CPU, 0.0)
    assert not result["rows"] and not result["failures"]
    assert [s["reason"] for s in result["skipped"]] == ["the budget was spent"]
    monkeypatch.setattr(runner, "operations", lambda names=None: {"square": Failing()})
    result = runner.run("quick", None, None, CPU, 20.0)  # there is nothing to measure against
    assert not result["rows"]
    assert [s["reason"] for s in result["failures"]] == ["RuntimeError: no such operator"]
