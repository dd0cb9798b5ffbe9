"""What the compiler makes of the kernels, without a GPU: python -m bench.kernels

Every kernel is compiled as its launcher launches it (the launcher itself runs, on CPU tensors, with
the launch caught instead of carried out) for NVIDIA sm_80, sm_90, sm_100 and AMD gfx942.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fused.kernels import batch_norm, cross_entropy

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel: the arguments that decide what is compiled."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """The kernel specialised as Triton's launcher would: None and 1 are constants, and
        divisibility by 16 is known of pointers and of whole numbers that may be specialised."""
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}

        def specialise(parameter: Any, value: Any, path: tuple[int, ...]) -> Any:
            if isinstance(value, tuple):
                return tuple(specialise(parameter, v, (*path, i)) for i, v in enumerate(value))
            kind = _kind(parameter, value)
            if kind == "constexpr":
                constants[path] = value
            elif isinstance(value, torch.Tensor) or (
                isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
            ):
                attributes[path] = [["tt.divisibility", 16]]
            return kind

        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            signature[parameter.name] = specialise(parameter, value, (index,))
        return ASTSource(self.kernel, signature, constants, attributes)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor; None where no tool tells (AMD)."""

    registers: int | None
    stack_bytes: int | None
    shared_bytes: int


def _kind(parameter: Any, value: Any) -> str:
    if parameter.is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if parameter.annotation_type:
        return parameter.annotation_type
    if isinstance(value, float):
        return "fp32"
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextmanager
def catch_launches() -> Iterator[list[Launch]]:
    """Within the block, launching a kernel records a Launch and does nothing else."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [p.name for p in self.params]
        arguments = dict(zip(names, args, strict=False))
        arguments |= {k: v for k, v in kwargs.items() if k in names}
        options = {k: v for k, v in kwargs.items() if k not in names}
        launches.append(Launch(self, arguments, options))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, target: GPUTarget) -> Resources:
    """Compiles the kernel of a launch for `target`; raises what Triton raises where it cannot."""
    compiled = triton.compile(launch.source(), target=target, options=launch.options)
    if target.backend != "cuda":
        return Resources(None, None, compiled.metadata.shared)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return Resources(numbers["REG"], numbers["STACK"], compiled.metadata.shared)


def cross_entropy_launches(n: int, c: int, dtype: torch.dtype) -> None:
    """Mean, as `fused.cross_entropy` calls it: its gradient in the forward, and in the backward."""
    x, target = torch.empty(n, c, dtype=dtype), torch.zeros(n, dtype=torch.int64)
    plain = (x, target, None, -100, "mean", 0.0, 0.0, 0.0, 1.0, dtype, False)
    loss, _, dx = cross_entropy.cross_entropy_fwd_bwd(*plain, False)
    cross_entropy.cross_entropy_scale(dx, loss)
    loss, stats, scale, _ = cross_entropy.cross_entropy_fwd(*plain)
    cross_entropy.cross_entropy_bwd(
        loss, x, target, None, stats, scale, -100, 0.0, 0.0, 0.0, 1.0, True, False, False
    )


def cross_entropy_options_launches(n: int, c: int, dtype: torch.dtype) -> None:
    """Every option at once: probabilities, then weighted class indices of an (N, C, S) input."""
    weight, numbers = torch.ones(c, dtype=dtype), (0.1, 1e-4, 30.0, 0.5)
    rows = torch.empty(n, c, dtype=dtype)
    inner = torch.empty(n // 16, c, 16, dtype=dtype)
    indices = torch.zeros(n // 16, 16, dtype=torch.int64)
    for x, target in ((rows, rows), (inner, indices)):
        arguments = (x, target, weight, -100, "mean", *numbers, dtype, True)
        cross_entropy.cross_entropy_fwd_bwd(*arguments, False)
        loss, stats, scale, _ = cross_entropy.cross_entropy_fwd(*arguments)
        cross_entropy.cross_entropy_bwd(
            loss, x, target, weight, stats, scale, -100, *numbers, True, target is rows, False
        )


def batch_norm_launches(n: int, c: int, dtype: torch.dtype) -> None:
    """Training forward and backward and evaluation, with float32 parameters and statistics."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, v = torch.empty(n, c, dtype=dtype), torch.ones(c, dtype=acc)
    tracked = torch.zeros((), dtype=torch.int64)
    y, mean, rstd = batch_norm.batch_norm_fwd(
        x, v, v, None, v, v, tracked, 0.1, 1e-5, 0, None, False
    )
    batch_norm.batch_norm_bwd(y, x, v, v, None, mean, rstd, 0, None, True, False)
    y, mean, rstd = batch_norm.batch_norm_eval(x, v, v, None, v, v, 1e-5, None)
    batch_norm.batch_norm_bwd(y, x, v, v, None, mean, rstd, 0, None, False, False)


def batch_norm_options_launches(n: int, c: int, dtype: torch.dtype) -> None:
    """Contiguous (N, C, S) and channels_last, with activations and a residual."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    inner = torch.empty(n // 16, c, 4, 4, dtype=dtype)
    v, tracked = torch.ones(c, dtype=acc), torch.zeros((), dtype=torch.int64)
    last = inner.contiguous(memory_format=torch.channels_last)
    for x, activation in ((inner, "tanh"), (inner, "gelu"), (last, "relu"), (last, "silu")):
        y, mean, rstd = batch_norm.batch_norm_fwd(
            x, v, v, x, v, v, tracked, None, 1e-5, 1, activation, True
        )
        batch_norm.batch_norm_bwd(y, x, v, v, x, mean, rstd, 1, activation, True, True)


GRID: list[tuple[str, Callable[[int, int, torch.dtype], None], int, int]] = [
    ("cross_entropy", cross_entropy_launches, 32, 27),
    ("cross_entropy", cross_entropy_launches, 4096, 1000),
    ("cross_entropy", cross_entropy_launches, 4096, 32000),
    ("cross_entropy", cross_entropy_launches, 4096, 50257),
    ("cross_entropy", cross_entropy_options_launches, 32, 27),
    ("cross_entropy", cross_entropy_options_launches, 4096, 32000),
    ("batch_norm", batch_norm_launches, 32, 64),
    ("batch_norm", batch_norm_launches, 32, 200),
    ("batch_norm", batch_norm_launches, 65536, 1024),
    ("batch_norm", batch_norm_options_launches, 32, 200),
    ("batch_norm", batch_norm_options_launches, 65536, 64),
]


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    print(f"triton {triton.__version__}; registers a thread / stack bytes / shared bytes")
    print(
        f"{'kernel':32s} {'shape':>12s} {'dtype':>9s}  " + "  ".join(f"{t:>14s}" for t in TARGETS)
    )
    for _, launchers, n, c in GRID:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            with catch_launches() as launches:
                launchers(n, c, dtype)
            for launch in launches:
                cells = []
                for target in TARGETS.values():
                    r = compile_launch(launch, target)
                    reg, stack = ("-" if v is None else v for v in (r.registers, r.stack_bytes))
                    cells.append(f"{f'{reg} / {stack} / {r.shared_bytes}':>14s}")
                name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
                shape, kind = f"{n}x{c}", str(dtype).removeprefix("torch.")
                print(f"{name:32s} {shape:>12s} {kind:>9s}  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
