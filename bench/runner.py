"""Runs a suite within a budget of seconds, and returns everything that its JSON holds."""

import gc
import importlib
import importlib.util
import os
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any, cast

import torch
from torch import Tensor

import bench
from bench import machine
from bench.cases import (
    DTYPES,
    Case,
    Contender,
    Operation,
    Phase,
    Unavailable,
    forget_compiled,
)
from bench.measure import Sampler, Times, interleave, on_device, peak_bytes, wall

BUDGETS = {"quick": 170.0, "full": 530.0}  # seconds
# Contenders that take seconds to build: with "quick" at headline shapes only, the second always.
SLOW_TO_BUILD = ("compile", "compile max")
_ALWAYS = ("torch", "fused")  # all are measured against the one, and the other has to run
# Whose outputs the others are compared with; each other first of all.
_REFERENCES = ("torch", "chunked")
# Sum of the differences from a reference's output over the sum of its own, absolute. In half
# precision torch and the others round at different places, the chunked form after each operation.
# (Not the Euclidean norm: there, the few elements that rounding takes to the other side of a relu
# weigh a thousand times what they should.)
_TOLERANCE = {"f32": 1e-4, "bf16": 3e-2}
_TENSORS_AT_ONCE = 12  # of a case's size: what the greediest contender holds, and the inputs
_HEADLINE_WEIGHT = 4  # a headline's share of the budget, in ordinary shares: it has more to build
# Bytes of the part of a case that says how long the whole will take: enough to be no mere overhead.
_PROBE_BYTES = {"cuda": 1 << 28}
_PROBE_BYTES_ELSEWHERE = 1 << 22


def operations(names: list[str] | None = None) -> dict[str, Operation]:
    """The modules `bench_*.py`, by the name of their operation; of those `names`, or all."""
    found = {}
    for info in pkgutil.iter_modules(bench.__path__):
        if info.name.startswith("bench_"):
            module = cast(Operation, importlib.import_module(f"bench.{info.name}"))
            found[module.OPERATION] = module
    unknown = set(names or ()) - set(found)
    if unknown:
        raise ValueError(
            f"expected --op to be one of {', '.join(found)}, got {', '.join(sorted(unknown))}"
        )
    return {name: module for name, module in found.items() if not names or name in names}


def none_named(cases: str, only: list[str] | None) -> ValueError:
    return ValueError(f"no {cases} has {' or '.join(map(repr, only or []))} in its name")


def run(
    suite: str,
    ops: list[str] | None,
    only: list[str] | None,
    device: torch.device,
    budget: float,
) -> dict[str, Any]:
    """Measures every case of the suite, or those whose name contains one of `only`.

    The cases share what is left of `budget` seconds: first each operation's headlines, so that what
    the budget cuts is the least. It is exceeded where the last of them takes longer to compile, or
    for the 5 rounds that every phase has. A case that fails is listed under "failures", and the
    others run. Ctrl-C ends it: what is not measured then is listed under "skipped". Before there is
    a measurement, it raises KeyboardInterrupt.
    """
    began = time.perf_counter()
    result: dict[str, Any] = {
        "suite": suite,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "copy_bytes_per_second": machine.copy_bandwidth(device),
        "rows": [],
        "skipped": [],
        "failures": [],
        "notes": [],
        "interrupted": False,
    }
    found = [
        (op, [case for case in op.cases(suite) if case.named(only)])
        for op in operations(ops).values()
    ]
    todo = in_turn(found)
    if not todo:
        raise none_named("case of the suite", only)
    if device.type == "cuda":
        _build_kernels(todo, result)
    _measure(todo, device, suite, began + budget, result)
    in_order = [(op.OPERATION, str(case)) for op, of in found for case in of]
    places = {name: i for i, name in enumerate(in_order)}
    result["rows"].sort(key=lambda row: places[row["operation"], row["asked"]])
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def _measure(
    todo: list[tuple[Operation, Case]],
    device: torch.device,
    suite: str,
    end: float,
    result: dict[str, Any],
) -> None:
    """The cases one after the other, each with its share of what is left until `end`."""
    build_seconds: dict[tuple[str, str], float] = {}
    begun = 0
    try:
        with progress(len(todo)) as advance:
            for begun, (op, case) in enumerate(todo):
                left = end - time.perf_counter()
                share = left * _weight(case) / sum(_weight(later) for _, later in todo[begun:])
                advance(f"{op.OPERATION} {case}")
                if share < 0.5:
                    result["skipped"].append(_skip(case, "all", "the budget was spent"))
                    continue
                try:
                    forget_compiled()
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                    _Measurement(op, case, device, suite, share, build_seconds, result).run()
                except torch.OutOfMemoryError:
                    result["skipped"].append(_skip(case, "all", "out of memory"))
                except Exception as error:
                    _fail(result, case, "all", error)
    except KeyboardInterrupt:
        if not result["rows"]:
            raise
        result["interrupted"] = True
        result["skipped"] += [_skip(case, "all", "interrupted") for _, case in todo[begun:]]


def _build_kernels(todo: list[tuple[Operation, Case]], result: dict[str, Any]) -> None:
    """Ours, on all cores, so that less of a case's share goes into compiling."""
    try:
        from bench import kernels

        kernels.build(todo, os.cpu_count() or 1)
    except Exception as error:  # then they are compiled as they are needed
        result["notes"].append(f"kernels were not compiled beforehand: {_reason(error)}")


def in_turn(cases: list[tuple[Operation, list[Case]]]) -> list[tuple[Operation, Case]]:
    """Headlines before all others, and of each kind the operations in turn."""

    def turn(of: list[Case], case: Case) -> tuple[bool, int]:
        alike = [other for other in of if other.headline == case.headline]
        return not case.headline, alike.index(case)

    placed = [(turn(of, case), op, case) for op, of in cases for case in of]
    return [(op, case) for _, op, case in sorted(placed, key=lambda entry: entry[0])]


def _weight(case: Case) -> int:
    return _HEADLINE_WEIGHT if case.headline else 1


class _Measurement:
    """One case: contenders built, checked, timed and weighed, within a share of the budget."""

    def __init__(
        self,
        op: Operation,
        case: Case,
        device: torch.device,
        suite: str,
        share: float,
        build_seconds: dict[tuple[str, str], float],
        result: dict[str, Any],
    ) -> None:
        self.op, self.asked, self.device, self.suite = op, case, device, suite
        self.deadline = time.perf_counter() + share
        self.build_seconds, self.result = build_seconds, result
        self.case = fitted(op, case, device, share)

    def run(self) -> None:
        contenders = self._built()
        if "torch" not in contenders:
            return
        phases = list(contenders["torch"].phases)
        for i, phase in enumerate(phases):
            now = time.perf_counter()
            end = now + (self.deadline - now) / (len(phases) - i)
            self._time(phase, {n: c for n, c in contenders.items() if phase in c.phases}, end)

    def _built(self) -> dict[str, Contender]:
        """The contenders that can run and whose outputs agree with torch's."""
        found: dict[str, Contender] = {}
        references: dict[str, dict[str, Tensor]] = {}
        for name, build in self.op.contenders(self.case, self.device).items():
            try:
                self._check_build(name)
                began = time.perf_counter()
                contender = build()
                outputs = contender.outputs()
                self._check_outputs(name, outputs, references)
                if name in SLOW_TO_BUILD:  # a phase may take a compilation of its own
                    for phase in contender.phases.values():
                        phase.run(phase.prepare())
                    took = time.perf_counter() - began
                    self.build_seconds[self.op.OPERATION, name] = took
                if name in _REFERENCES:
                    references[name] = outputs
            except Unavailable as missing:
                self.result["skipped"].append(_skip(self.case, name, str(missing)))
            except torch.OutOfMemoryError:
                self.result["skipped"].append(_skip(self.case, name, "out of memory"))
            except Exception as error:
                if name in _ALWAYS:
                    _fail(self.result, self.case, name, error)
                else:
                    self.result["skipped"].append(_skip(self.case, name, _reason(error)))
            else:
                found[name] = contender
        return found

    def _check_build(self, name: str) -> None:
        left = self.deadline - time.perf_counter()
        if name not in SLOW_TO_BUILD:
            if left < 0 and name not in _ALWAYS:
                raise Unavailable("not enough of the budget left")
            return
        if not self.case.headline and (self.suite == "quick" or name == "compile max"):
            raise Unavailable("only at some shapes: it takes long to compile")
        if self.suite == "quick" and name == "compile max":
            raise Unavailable("only in the full suite")
        took = self.build_seconds.get((self.op.OPERATION, name), 0.0)
        if took > left:
            raise Unavailable("not enough of the budget left to compile")

    def _check_outputs(
        self, name: str, outputs: dict[str, Tensor], references: dict[str, dict[str, Tensor]]
    ) -> None:
        """Each output agrees with a reference's: torch's own are not always right. Where the two
        references differ, the others decide, and a note says so."""
        tolerance = _TOLERANCE[DTYPES[self.case.dtype]]
        for key, tensor in outputs.items():
            errors = {other: _error(tensor, goal[key]) for other, goal in references.items()}
            if not errors or min(errors.values()) <= tolerance:
                continue
            far = ", ".join(f"{error:.1e} from {other}" for other, error in errors.items())
            if name not in _REFERENCES:
                raise Unavailable(f"wrong: {key} is off by {far}")
            self.result["notes"].append(f"{self.op.OPERATION} {self.case}: {name}'s {key} is {far}")

    def _time(self, phase: str, contenders: dict[str, Contender], end: float) -> None:
        metrics: dict[str, Callable[[Phase, int], Sampler]] = {
            "wall": lambda p, most: wall(p, self.device, most)
        }
        # A loop of many units keeps the host busy, and no sleep of the device hides that.
        if self.device.type == "cuda" and contenders["torch"].phases[phase].units == 1:
            metrics["device_warm"] = lambda p, _: on_device(p, self.device, cold=False)
            metrics["device_cold"] = lambda p, _: on_device(p, self.device, cold=True)
        peaks: dict[str, int] = {}
        for name, contender in list(contenders.items()):
            try:
                peaks[name] = peak_bytes(contender.phases[phase], self.device)
            except Exception as error:
                full = isinstance(error, torch.OutOfMemoryError)
                # All are measured against torch, and ours has to run.
                if name == "torch" or (name == "fused" and not full):
                    raise
                del contenders[name]
                reason = f"{'out of memory' if full else _reason(error)} in {phase}"
                self.result["skipped"].append(_skip(self.case, name, reason))
        rows: dict[str, dict[str, Any]] = {
            name: {
                "operation": self.op.OPERATION,
                "case": str(self.case),
                "asked": str(self.asked),
                "shape": self.case.shape,
                "dtype": DTYPES[self.case.dtype],
                "variant": self.case.variant,
                "tensor_bytes": self.case.bytes,
                "phase": phase,
                "contender": name,
                "least_bytes": self.op.least_bytes(self.case).get(phase),
                "peak_bytes": peaks[name],
                "times": {},
                "ratio_to_torch": {},
            }
            for name in contenders
        }
        room = machine.memory_bytes(self.device) // 4
        for done, (metric, sampler) in enumerate(metrics.items()):
            samplers = {
                n: sampler(c.phases[phase], max(1, room // max(1, peaks[n])))
                for n, c in contenders.items()
            }
            # What is left now: memory was weighed, and the samplers have called once or twice.
            left = end - time.perf_counter()
            samples = interleave(samplers, left / (len(metrics) - done))
            for name, values in samples.items():
                ratios = [a / b for a, b in zip(values, samples["torch"], strict=True)]
                rows[name]["times"][metric] = asdict(Times.of(values))
                rows[name]["ratio_to_torch"][metric] = Times.of(ratios).median
        self.result["rows"] += rows.values()


def fitted(op: Operation, case: Case, device: torch.device, seconds: float) -> Case:
    """The case with as many of its rows as memory and the share of the budget allow."""
    rows, row_bytes = case.shape[0], case.bytes // case.shape[0]
    memory = 0.65 * machine.memory_bytes(device)
    while rows > 1 and _TENSORS_AT_ONCE * rows * row_bytes > memory:
        rows //= 2
    probe_bytes = _PROBE_BYTES.get(device.type, _PROBE_BYTES_ELSEWHERE)
    probe = case.with_rows(min(rows, max(2, probe_bytes // row_bytes)))
    if probe.shape[0] < rows:
        torch_ = op.contenders(probe, device)["torch"]()
        calls = sum(wall(phase, device)() for phase in torch_.phases.values())
        # Some 7 contenders' worth of torch's time, and 5 rounds with what comes before.
        while rows > probe.shape[0] and 60 * calls * rows / probe.shape[0] > seconds:
            rows //= 2
    return case.with_rows(rows)


def _error(tensor: Tensor, goal: Tensor) -> float:
    if tensor.dtype != goal.dtype:
        return float("inf")
    size = _norm(goal)
    return _norm(tensor - goal) / size if size else _norm(tensor)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), ord=1, dtype=torch.float32))


def _skip(case: Case, contender: str, reason: str) -> dict[str, str]:
    return {
        "operation": case.operation,
        "case": str(case),
        "contender": contender,
        "reason": reason,
    }


def _fail(result: dict[str, Any], case: Case, contender: str, error: Exception) -> None:
    """What must not happen: said as what was skipped, and in the end by the exit status."""
    result["failures"].append(_skip(case, contender, _reason(error)))
    result["skipped"].append(result["failures"][-1])
    traceback.print_exception(error)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal where tqdm is installed, a line a case elsewhere."""
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        done = 0

        def line(name: str) -> None:
            nonlocal done
            done += 1
            print(f"[{done}/{total}] {name}", file=sys.stderr, flush=True)

        yield line
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=" cases", dynamic_ncols=True) as bar:
        started = False

        def advance(name: str) -> None:
            nonlocal started
            bar.update(int(started))
            bar.set_postfix_str(name)
            started = True

        yield advance
        bar.update(int(started))
