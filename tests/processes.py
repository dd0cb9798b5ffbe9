"""Processes that talk over gloo, each running one function of a test module."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.test_package import ROOT


def run(worker: Callable[[int, str], None], count: int, folder: Path) -> None:
    """`worker(rank, folder)` in `count` processes; raises AssertionError where one fails."""
    call = "import sys; sys.path.insert(0, sys.argv[1]); from tests import processes; "
    call += "processes.run_one(*sys.argv[2:])"
    command = [sys.executable, "-W", "ignore", "-c", call, str(ROOT)]
    module = "tests." + worker.__module__.removeprefix("tests.")
    command += [module, worker.__name__, str(folder), str(count)]
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error


def run_one(module: str, name: str, folder: str, count: str, rank: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=int(rank), world_size=int(count))
    getattr(importlib.import_module(module), name)(int(rank), folder)
    dist.destroy_process_group()
    # DistributedDataParallel keeps the group and its threads. One that lets go of a tensor needs
    # Python's lock, and ends the process where Python is ending (pytorch#179291).
    os._exit(0)


def counted(*names: str) -> list[str]:
    """What this process calls of torch.distributed from now on, of these."""
    called: list[str] = []

    def counts(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return collective(*args, **kwargs)

        return call

    for name in names:
        if hasattr(dist, name):
            setattr(dist, name, counts(name, getattr(dist, name)))
    return called
