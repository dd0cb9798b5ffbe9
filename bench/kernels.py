"""What the compiler makes of the kernels, without a GPU: python -m bench kernels

Every kernel is compiled as a user's call launches it (the call is made on meta tensors, its
launches caught instead of carried out) for NVIDIA sm_80, sm_90, sm_100 and AMD gfx942; and the
bytes that it asks memory for are counted in Triton's interpreter.
"""

import importlib.util
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import fused
from bench import assembly, traffic
from bench.assembly import Code
from bench.cases import Case, Operation
from bench.runner import none_named, operations, progress
from fused.makemore.processes import without_interruption

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_WITH_CLUSTERS = ("sm_90", "sm_100")


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel: the arguments that decide what is compiled."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]

    def specialised(self, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
        """What Triton's launcher would compile on a device of that kind, and its options.

        Its own code decides: None and 1 are constants, and of pointers and whole numbers it is
        known whether 16 divides them; on AMD, whether a tensor has less than 2 GB.
        """
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, kinds, options = bind(**self.arguments, **self.options)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.options, bound, kinds, options
        )
        return ASTSource(self.kernel, signature, constants, attributes), options.__dict__

    def compile(self, target: GPUTarget) -> Any:
        """Into Triton's cache, too."""
        source, options = self.specialised(target)
        return triton.compile(source, target=target, options=options)


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a multiprocessor, and what its instructions do."""

    registers: int  # a thread
    spilled: int  # bytes a thread of local memory (NVIDIA), spilled registers (AMD)
    shared: int  # bytes a program
    warps: int  # a program
    programs: int  # that fit one multiprocessor at once
    code: Code
    loops: tuple[Code, ...]  # the innermost ones that access global memory, in their order


@dataclass(frozen=True)
class _Multiprocessor:
    """What programs share; from the vendors' occupancy tables."""

    registers: int  # of 32 bits
    register_unit: int  # they are allotted to a warp in these
    shared: int
    reserved: int  # shared memory that every program takes besides its own
    warps: int
    programs: int


_MULTIPROCESSORS = {
    "sm_80": _Multiprocessor(65536, 256, 164 << 10, 1024, 64, 32),
    "sm_90": _Multiprocessor(65536, 256, 228 << 10, 1024, 64, 32),
    "sm_100": _Multiprocessor(65536, 256, 228 << 10, 1024, 64, 32),
    # 4 SIMDs with 512 registers of 64 lanes each, 8 waves a SIMD.
    "gfx942": _Multiprocessor(4 * 512 * 64, 8 * 64, 64 << 10, 0, 32, 32),
}


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


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compiles the kernel of a launch for one of TARGETS; raises what Triton does if it cannot."""
    compiled = launch.compile(TARGETS[target])
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        numbers = {k: int(v) for k, v in re.findall(r"\.(vgpr_\w+):\s+(\d+)", text)}
        registers, spilled = numbers["vgpr_count"], numbers["vgpr_spill_count"]
        instructions = assembly.parse_amdgcn(text)
    else:
        usage, listing = _cuobjdump(compiled.asm["cubin"], "-res-usage", "--dump-sass")
        numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK):(\d+)", usage)}
        registers, spilled = numbers["REG"], numbers["STACK"]
        instructions = assembly.parse_sass(listing)
    loops = tuple(assembly.summary(loop) for loop in assembly.inner_loops(instructions))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return Compiled(
        registers,
        spilled,
        shared,
        warps,
        _programs(_MULTIPROCESSORS[target], registers, shared, warps, TARGETS[target].warp_size),
        assembly.summary(instructions),
        tuple(loop for loop in loops if loop.moved),
    )


def _cuobjdump(cubin: bytes, *options: str) -> list[str]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return [
            subprocess.run([tool, o, file.name], capture_output=True, text=True, check=True).stdout
            for o in options
        ]


def _programs(m: _Multiprocessor, registers: int, shared: int, warps: int, lanes: int) -> int:
    a_warp = -(-registers * lanes // m.register_unit) * m.register_unit
    return min(
        m.programs,
        m.warps // warps,
        m.registers // (a_warp * warps),
        m.shared // (shared + m.reserved) if shared + m.reserved else m.programs,
    )


def caught(op: Operation, case: Case, hip: str | None = None) -> list[Launch]:
    """The launches of a user's forward and backward of the case, on a PyTorch for ROCm if `hip`."""
    before, torch.version.hip = torch.version.hip, hip
    try:
        with fused.backend.use("triton"), catch_launches() as launches:
            op.launch(case, torch.device("meta"))
    finally:
        torch.version.hip = before
    return launches


def report(
    ops: dict[str, Operation],
    targets: list[str],
    only: list[str] | None = None,
    processes: int = 1,
) -> list[dict[str, Any]]:
    """Compiles every launch of every kernel case, or of those whose name contains one of `only`."""
    cases = [(name, case) for name, op in ops.items() for case in op.kernel_cases()]
    todo = [(name, case) for name, case in cases if case.named(only)]
    if not todo:
        raise none_named("kernel case", only)
    bounded = list(dict.fromkeys(name for name, case in todo if ops[name].least_bytes(case)))
    if importlib.util.find_spec("numpy") is None:  # Triton's interpreter needs it
        print("reads and writes are not counted: NumPy is not installed", file=sys.stderr)
        bounded = []
    counts: dict[str, Iterator[list[traffic.Traffic]]] = {}
    found = []
    with progress(len(todo)) as advance, _in_order(processes) as each:
        counted = iter(each(traffic.counted, bounded, [only] * len(bounded)))
        compiled = iter(each(_compiled, *zip(*todo, strict=True), [targets] * len(todo)))
        for name, case in todo:
            advance(f"{name} {case}")
            if name in bounded and name not in counts:
                counts[name] = iter(next(counted))
            launches = next(compiled)
            size, least = ops[name].traffic_case(case).bytes, ops[name].least_bytes(case)
            count = next(counts[name]) if name in counts else []
            names = [kernel for kernel, _ in launches]
            assert name not in bounded or names == [kernel for kernel, _, _ in count]
            for i, (kernel, by_target) in enumerate(launches):
                found.append(
                    {
                        "operation": name,
                        "case": str(case),
                        "kernel": kernel.strip("_").removesuffix("_kernel"),
                        "reads": count[i][1] / size if count else None,
                        "writes": count[i][2] / size if count else None,
                        "least": least["fwd_bwd"] / case.bytes if "fwd_bwd" in least else None,
                        "targets": by_target,
                    }
                )
    return found


def build(todo: list[tuple[Operation, Case]], processes: int) -> None:
    """Compiles what these cases launch for the GPU of this process, into Triton's cache.

    The few kernels that only a forward without gradients launches are left to it.
    """
    target = triton.runtime.driver.active.get_current_target()
    cases = [(op.OPERATION, case) for op, case in todo if op.kernel_cases()]
    with _in_order(processes) as each:
        for _ in each(_built, *zip(*cases, strict=True), [target] * len(cases)):
            pass


def _built(name: str, case: Case, target: GPUTarget) -> None:
    for launch in caught(operations([name])[name], case, torch.version.hip):
        launch.compile(target)


@contextmanager
def _in_order(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` whose calls are shared by processes: Triton compiles a kernel on one core."""
    if processes == 1:
        yield map
        return
    spawn = multiprocessing.get_context("spawn")  # torch has threads, which a fork would not
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:

        def submitted(*arguments: Any) -> Iterator[Any]:
            with without_interruption():  # the processes start as calls are submitted
                return pool.map(*arguments)

        try:
            yield submitted
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()  # rather than wait for the calls that it is at
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _compiled(name: str, case: Case, targets: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """The kernel of each launch of a case, and what the compiler makes of it for each target."""
    op = operations([name])[name]
    launches, on_amd = caught(op, case), caught(op, case, hip="6.4")
    names = [[launch.kernel.__name__ for launch in each] for each in (launches, on_amd)]
    assert names[0] == names[1], f"{name} {case}: other kernels on AMD: {names}"
    return [
        (
            launch.kernel.__name__,
            {
                t: asdict(compile_launch(on_amd[i] if t == "gfx942" else launch, t))
                for t in targets
                if launch.options.get("num_ctas", 1) == 1 or t in _WITH_CLUSTERS
            },
        )
        for i, launch in enumerate(launches)
    ]
