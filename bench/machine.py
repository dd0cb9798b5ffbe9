"""What a figure depends on: the device, the versions, and how fast memory is copied here."""

import importlib
import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fused

_ROOT = Path(__file__).parents[1]


def describe(device: torch.device) -> dict[str, Any]:
    """The device and the versions of what runs on it, for the JSON of a run."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "liger-kernel", "jax", "numba"):
        try:
            module = importlib.import_module(package) if package in ("torch", "triton") else None
            # What is imported may not be what is installed: a PYTHONPATH may stand before it.
            versions[package] = getattr(module, "__version__", None) or version(package)
        except (ImportError, PackageNotFoundError):
            continue
    found: dict[str, Any] = {"type": device.type, "versions": versions | own_versions()}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {
            "name": p.name,
            "memory_bytes": p.total_memory,
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "capability": f"{p.major}.{p.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
        }
    else:
        found |= {
            "name": _processor(),
            "memory_bytes": _memory(),
            "threads": torch.get_num_threads(),
            # PyTorch asks for large pages then: a new tensor costs fewer page faults.
            "large_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1",
        }
    return found


def own_versions() -> dict[str, str]:
    """This package's, and the commit where it is a checkout: `-dirty` if tracked files differ, of
    which results, written by runs like this one, are none."""
    try:
        commit = _git("describe", "--always", "--exclude=*", "--abbrev=12")
        if commit and _git("diff", "--name-only", "HEAD", "--", ".", ":(exclude)bench/results"):
            commit += "-dirty"
    except OSError:  # no git
        commit = ""
    return {"fused": fused.__version__} | ({"commit": commit} if commit else {})


def _git(*arguments: str) -> str:
    """What it says of this checkout; nothing where this is none."""
    # Named so, git does not answer for a repository around this folder.
    where = [f"--git-dir={_ROOT / '.git'}", f"--work-tree={_ROOT}", "--no-optional-locks"]
    done = subprocess.run(["git", *where, *arguments], cwd=_ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def memory_bytes(device: torch.device) -> int:
    """What the cases may take: free memory, and what PyTorch holds of it for later."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return _memory("MemAvailable")


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, reads and writes both counted: the most that is possible."""
    size = 1 << 30 if device.type == "cuda" else 1 << 28
    source, goal = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            goal.copy_(source)
            end.record()
            torch.cuda.synchronize(device)
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            goal.copy_(source)
            best = min(best, time.perf_counter() - began)
    return 2 * size / best


def slug(machine: dict[str, Any]) -> str:
    """The name of a machine as part of a file's name."""
    name = re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
    if machine["type"] == "cpu":
        pages = "-large-pages" if machine["large_pages"] else ""
        return f"cpu-{name}-{machine['threads']}-threads{pages}"
    return name


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def _memory(line: str = "MemTotal") -> int:
    try:
        found = re.search(rf"{line}:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 8 << 30
