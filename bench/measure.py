"""Times and peak memory of several contenders at one thing, interleaved.

On CUDA a sample is device time between two events, with the L2 cache warm or emptied before, or
wall time of calls in a row; on the CPU it is wall time.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import Phase

_LEAST_SAMPLE = 2e-4  # seconds; faster calls are timed several at a time
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 100


@dataclass(frozen=True)
class Times:
    """Seconds a unit: the median and the 10th and 90th percentile of `samples` rounds."""

    median: float
    low: float
    high: float
    samples: int

    @staticmethod
    def of(samples: list[float]) -> "Times":
        if len(samples) == 1:
            return Times(samples[0], samples[0], samples[0], 1)
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return Times(statistics.median(samples), tenths[0], tenths[-1], len(samples))


Sampler = Callable[[], float]


def interleave(samplers: dict[str, Sampler], seconds: float) -> dict[str, list[float]]:
    """Samples of everything, a round at a time and each round in another order, as many rounds as
    end within `seconds`.

    At least 5 rounds, so that a median means something, and at most 100.
    """
    names = list(samplers)
    found: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    longest = 0.0
    for done in range(_MOST_ROUNDS):
        before = time.perf_counter()
        if done >= _LEAST_ROUNDS and before + longest - began > seconds:
            break
        for i in _order(len(names), done):
            found[names[i]].append(samplers[names[i]]())
        longest = max(longest, time.perf_counter() - before)
    return found


def _order(n: int, done: int) -> list[int]:
    """The order of n contenders after some rounds: in 2n rounds each comes after each other twice,
    and after fewer or more, how often any two such pairs have come differs by 2 at most.

    Every sample finds in the caches what the one before it left there. Rows of a Latin square as
    Williams (1949) builds them: 0, 1, -1, 2, -2, ... modulo n, shifted; every other square is
    reversed.
    """
    row = [((k + 1) // 2 * (1 if k % 2 else -1) + done) % n for k in range(n)]
    return row if done // n % 2 == 0 else row[::-1]


def wall(phase: Phase, device: torch.device, most: int = 100) -> Sampler:
    """Wall time of a unit, of as many calls in a row as make it measurable; `most` is how many
    results of `prepare` memory holds at once."""

    def timed(calls: int) -> float:
        prepared = [phase.prepare() for _ in range(calls)]
        synchronise(device)
        began = time.perf_counter()
        for argument in prepared:
            phase.run(argument)
        synchronise(device)
        return (time.perf_counter() - began) / (calls * phase.units)

    timed(1)  # what is built on the first call is not timed
    calls = max(1, min(100, most, math.ceil(_LEAST_SAMPLE / (timed(1) * phase.units))))
    return lambda: timed(calls)


def on_device(phase: Phase, device: torch.device, cold: bool) -> Sampler:
    """Time of a unit between two events on a CUDA device, without what the host needs.

    The device sleeps before the first event for as long as the host takes to call, so that it never
    waits for the host. Where `cold`, something larger than the L2 cache is written before; else the
    phase runs once more before, as what L2 has is of another contender. A phase on streams of its
    own would not wait for the one that sleeps: its time is with the host's part.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(4 * cache, dtype=torch.uint8, device=device) if cold else None
    cycles = int(2e9 * min(2e-2, 2 * _host_seconds(phase, device) + 2e-5))

    def sample() -> float:
        if flush is None:
            phase.run(phase.prepare())
        argument = phase.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush is not None:
            flush.zero_()
        if phase.waits:
            torch.cuda.synchronize(device)
        else:
            torch.cuda._sleep(cycles)
        start.record()
        phase.run(argument)
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / (1e3 * phase.units)

    return sample


def _host_seconds(phase: Phase, device: torch.device) -> float:
    """How long the host takes for a call, whatever the device does meanwhile."""

    def timed() -> float:
        argument = phase.prepare()
        synchronise(device)
        began = time.perf_counter()
        phase.run(argument)
        taken = time.perf_counter() - began
        synchronise(device)
        return taken

    return min(timed() for _ in range(3))


def peak_bytes(phase: Phase, device: torch.device) -> int:
    """The most memory that `prepare` and `run` together hold at once, inputs not counted."""
    if device.type != "cuda":
        return _peak_bytes_cpu(phase)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept: Any = phase.run(phase.prepare())
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


def _peak_bytes_cpu(phase: Phase) -> int:
    """From the profiler's record of torch's allocations: what others allocate is not seen."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        kept: Any = phase.run(phase.prepare())
        del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
