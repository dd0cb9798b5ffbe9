"""Counts the bytes that launches ask global memory for, in Triton's interpreter.

`python -m bench.traffic OPERATION [PART OF A CASE'S NAME]`, with TRITON_INTERPRET=1 in the
environment, prints JSON: for each kernel case a list of [kernel, bytes read, bytes written], a row
a launch. What a cache serves counts too: it is what the kernel asks for, masked lanes left out.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Traffic = tuple[str, int, int]


def counted(operation: str, only: list[str] | None = None) -> list[list[Traffic]]:
    """The launches of each kernel case (or those named so), from a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.traffic", operation, *(only or [])],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"python -m bench.traffic {operation} failed:\n{done.stderr}")
    return [[tuple(row) for row in case] for case in json.loads(done.stdout)]


class Counter:
    """Within a block stands between Triton's interpreter and memory: `launches` has a row for every
    launch.

    If `sampled`, only the first program along each axis of a grid runs, the middle one and the
    last; the middle one counts for all between, which do as it does. What they compute is of no
    use then.
    """

    def __init__(self, sampled: bool = False) -> None:
        self.launches: list[list[Any]] = []
        self._sampled, self._weight = sampled, 1

    def __enter__(self) -> "Counter":
        from triton.runtime import interpreter

        self._module, self._memory = interpreter, interpreter._interpreter
        self._call = call = interpreter.GridExecutor.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches.append([executor.fn.__name__, 0, 0])
            with self._programs(executor, interpreter.interpreter_builder):
                return call(executor, *args, **kwargs)

        interpreter._interpreter = self
        interpreter.GridExecutor.__call__ = launch
        return self

    def __exit__(self, *_: Any) -> None:
        self._module._interpreter = self._memory
        self._module.GridExecutor.__call__ = self._call

    @contextmanager
    def _programs(self, executor: Any, builder: Any) -> Iterator[None]:
        """Makes the executor run some of its programs, which take themselves for all."""
        if not self._sampled:
            yield
            return
        grid = (*executor.grid, 1, 1)[:3]
        kept = [sorted({0, n // 2, n - 1}) for n in grid]
        set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

        def go_to(*sample: int) -> None:
            self._weight = 1
            for n, places, i in zip(grid, kept, sample, strict=True):
                self._weight *= n - len(places) + 1 if i == 1 else 1
            set_index(*(places[i] for places, i in zip(kept, sample, strict=True)))

        executor.grid = tuple(map(len, kept))
        builder.set_grid_dim, builder.set_grid_idx = lambda *_: set_dim(*grid), go_to
        try:
            yield
        finally:
            del builder.set_grid_dim, builder.set_grid_idx
            self._weight = 1

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.launches[-1][1] += self._weight * int(mask.sum()) * dtype.itemsize
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self.launches[-1][2] += self._weight * int(mask.sum()) * value.dtype.itemsize
        return self._memory.store(pointers, value, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)


def main() -> None:
    import fused
    from bench.runner import operations
    from fused.kernels import tuning

    name, only = sys.argv[1], sys.argv[2:] or None
    op = operations([name])[name]
    tuning.INTERPRETED_PROGRAMS = None  # as many as on a GPU
    found = []
    for case in op.kernel_cases():
        if case.named(only):
            with Counter(sampled=True) as counter, fused.backend.use("triton"):
                op.launch(op.traffic_case(case), torch.device("cpu"))
            found.append(counter.launches)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
