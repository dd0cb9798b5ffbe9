"""Runs a suite within a budget of seconds, and returns everything that its JSON holds."""

import gc
import importlib
import importlib.util
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any, cast

import torch
from torch import Tensor

import bench
from bench import machine
from bench.cases import DTYPES, Case, Contender, Operation, Unavailable
from bench.measure import Sampler, Times, interleave, on_device, peak_bytes, wall

BUDGETS = {"quick": 170.0, "full": 530.0}  # seconds
# Contenders that take seconds to build: with "quick" at headline shapes only, the second always.
SLOW_TO_BUILD = ("compile", "compile max")
# Whose outputs the others are compared with; each other first of all.
_REFERENCES = ("torch", "chunked")
# Sum of the differences from a reference's output over the sum of its own, absolute. In half
# precision torch and the others round at different places, the chunked form after each operation.
# (Not the Euclidean norm: there, the few elements that rounding takes to the other side of a relu
# weigh a thousand times what they should.)
_TOLERANCE = {"f32": 1e-4, "bf16": 3e-2}
_TENSORS_AT_ONCE = 12  # of a case's size: what the greediest contender holds, and the inputs


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


def run(
    suite: str, ops: list[str] | None, only: str | None, device: torch.device, budget: float
) -> dict[str, Any]:
    """Measures every case of the suite, or those whose name contains `only`.

    The cases share what is left of `budget` seconds.
    """
    began = time.perf_counter()
    result: dict[str, Any] = {
        "suite": suite,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "copy_bytes_per_second": machine.copy_bandwidth(device),
        "rows": [],
        "skipped": [],
        "notes": [],
    }
    todo = [
        (op, case)
        for op in operations(ops).values()
        for case in op.cases(suite)
        if (only or "") in str(case)
    ]
    if not todo:
        raise ValueError(f"no case of the suite has {only!r} in its name")
    build_seconds: dict[str, float] = {}
    with progress(len(todo)) as advance:
        for i, (op, case) in enumerate(todo):
            share = (budget - (time.perf_counter() - began)) / (len(todo) - i)
            advance(f"{op.OPERATION} {case}")
            if share < 0.5:
                result["skipped"].append(_skip(case, "all", "the budget was spent"))
                continue
            _Measurement(op, case, device, suite, share, build_seconds, result).run()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


class _Measurement:
    """One case: contenders built, checked, timed and weighed, within a share of the budget."""

    def __init__(
        self,
        op: Operation,
        case: Case,
        device: torch.device,
        suite: str,
        share: float,
        build_seconds: dict[str, float],
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
            left = (self.deadline - time.perf_counter()) / (len(phases) - i)
            self._time(phase, {n: c for n, c in contenders.items() if phase in c.phases}, left)

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
                self.build_seconds[name] = time.perf_counter() - began
                self._check_outputs(name, outputs, references)
                if name in _REFERENCES:
                    references[name] = outputs
            except Unavailable as missing:
                self.result["skipped"].append(_skip(self.case, name, str(missing)))
            except torch.OutOfMemoryError:
                self.result["skipped"].append(_skip(self.case, name, "out of memory"))
            except Exception as error:
                if name in ("torch", "fused"):
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self.result["skipped"].append(_skip(self.case, name, reason))
            else:
                found[name] = contender
        return found

    def _check_build(self, name: str) -> None:
        if name not in SLOW_TO_BUILD:
            return
        if not self.case.headline and (self.suite == "quick" or name == "compile max"):
            raise Unavailable("only at some shapes: it takes long to compile")
        if self.suite == "quick" and name == "compile max":
            raise Unavailable("only in the full suite")
        if self.build_seconds.get(name, 0.0) > self.deadline - time.perf_counter():
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

    def _time(self, phase: str, contenders: dict[str, Contender], seconds: float) -> None:
        metrics: dict[str, Callable[[Any], Sampler]] = {"wall": lambda p: wall(p, self.device)}
        if self.device.type == "cuda":
            metrics["device_warm"] = lambda p: on_device(p, self.device, cold=False)
            metrics["device_cold"] = lambda p: on_device(p, self.device, cold=True)
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
                "peak_bytes": peak_bytes(contender.phases[phase], self.device),
                "times": {},
                "ratio_to_torch": {},
            }
            for name, contender in contenders.items()
        }
        for metric, sampler in metrics.items():
            samplers = {n: sampler(c.phases[phase]) for n, c in contenders.items()}
            samples = interleave(samplers, seconds / len(metrics))
            for name, values in samples.items():
                ratios = [a / b for a, b in zip(values, samples["torch"], strict=True)]
                rows[name]["times"][metric] = asdict(Times.of(values))
                rows[name]["ratio_to_torch"][metric] = Times.of(ratios).median
        self.result["rows"] += rows.values()


def fitted(op: Operation, case: Case, device: torch.device, seconds: float) -> Case:
    """The case with as many of its rows as memory and the share of the budget allow."""
    rows, row_bytes = case.shape[0], case.bytes // case.shape[0]
    memory = 0.6 * machine.memory_bytes(device)
    while rows > 1 and _TENSORS_AT_ONCE * rows * row_bytes > memory:
        rows //= 2
    probe = case.with_rows(min(rows, max(2, (1 << 22) // row_bytes)))
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
