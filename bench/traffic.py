"""Counts the bytes that launches ask global memory for, in Triton's interpreter.

`python -m bench.traffic OPERATION [PART OF A CASE'S NAME]`, with TRITON_INTERPRET=1 in the
environment, prints JSON: for each kernel case a list of [kernel, bytes read, bytes written], a row
a launch. What a cache serves counts too: it is what the kernel asks for, masked lanes left out.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

Traffic = tuple[str, int, int]
_MOST_ELEMENTS = 1 << 20  # the interpreter takes minutes for more: nothing is counted then


def counted(operation: str, only: str | None = None) -> list[list[Traffic]]:
    """The launches of each kernel case (or those named so), from a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.traffic", operation, only or ""],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"python -m bench.traffic {operation} failed:\n{done.stderr}")
    return [[tuple(row) for row in case] for case in json.loads(done.stdout)]


class Counter:
    """Stands between Triton's interpreter and memory; `launches` has a row for every launch."""

    def __init__(self) -> None:
        from triton.runtime import interpreter

        self._memory: Any = interpreter._interpreter
        self.launches: list[list[Any]] = []
        interpreter._interpreter = self
        begin = interpreter.GridExecutor.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches.append([executor.fn.__name__, 0, 0])
            return begin(executor, *args, **kwargs)

        interpreter.GridExecutor.__call__ = launch

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.launches[-1][1] += int(mask.sum()) * dtype.itemsize
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self.launches[-1][2] += int(mask.sum()) * value.dtype.itemsize
        return self._memory.store(pointers, value, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)


def main() -> None:
    import fused
    from bench.runner import operations

    name, only = sys.argv[1], "".join(sys.argv[2:])
    op = operations([name])[name]
    counter = Counter()
    found: list[Any] = []
    for case in op.kernel_cases():
        if only not in str(case):
            continue
        counter.launches = []
        small = op.traffic_case(case)
        if math.prod(small.shape) > _MOST_ELEMENTS:
            found.append([])
            continue
        with fused.backend.use("triton"):
            op.launch(small, torch.device("cpu"))
        found.append(counter.launches)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
