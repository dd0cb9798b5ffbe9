"""Two copies, one of which reads its input twice: what the kernel report has to tell apart.

Run in a process of its own: prints JSON, what `bench.kernels` finds without the interpreter, and
what `bench.traffic` counts in it.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench import kernels, traffic


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, SWEEPS: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SWEEPS):
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.load(x_ptr + i, mask=i < n, other=0.0)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, total, mask=i < n)


def copies(device: str) -> None:
    for sweeps in (1, 2):
        x = torch.zeros(4096, device=device)
        _copy_kernel[(1,)](x, torch.empty_like(x), 4096, BLOCK=1024, SWEEPS=sweeps)


if triton.knobs.runtime.interpret:
    with traffic.Counter() as counter:
        copies("cpu")
    print(json.dumps(counter.launches))
else:
    with kernels.catch_launches() as launches:
        copies("meta")
    print(json.dumps([asdict(kernels.compile_launch(launch, "sm_90")) for launch in launches]))
