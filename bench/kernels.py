"""What the compiler makes of the kernels, without a GPU: python -m bench kernels

Every kernel is compiled as a user's call launches it (the call is made on meta tensors, its
launches caught instead of carried out) for NVIDIA sm_80, sm_90, sm_100 and AMD gfx942; and the
bytes that it asks memory for are counted in Triton's interpreter.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import fused
from bench import assembly, traffic
from bench.assembly import Code
from bench.cases import Case, Operation
from bench.runner import progress

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_WITH_CLUSTERS = ("sm_90", "sm_100")
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
            elif isinstance(value, torch.Tensor):
                # As far as the allocator goes, every tensor starts at a multiple of 16 bytes.
                begins = value.storage_offset() * value.dtype.itemsize
                if begins % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                    attributes[path] = [["tt.divisibility", 16]]
            elif isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[path] = [["tt.divisibility", 16]]
            return kind

        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            signature[parameter.name] = specialise(parameter, value, (index,))
        return ASTSource(self.kernel, signature, constants, attributes)


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


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compiles the kernel of a launch for one of TARGETS; raises what Triton does if it cannot."""
    compiled = triton.compile(launch.source(), target=TARGETS[target], options=launch.options)
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
    ops: dict[str, Operation], targets: list[str], only: str | None = None
) -> list[dict[str, Any]]:
    """Compiles every launch of every kernel case, or of those whose name contains `only`."""
    todo = [
        (name, op, case)
        for name, op in ops.items()
        for case in op.kernel_cases()
        if (only or "") in str(case)
    ]
    if not todo:
        raise ValueError(f"no kernel case has {only!r} in its name")
    bounded = {name for name, op, case in todo if op.least_bytes(case)}
    counts = {name: iter(traffic.counted(name, only)) for name in bounded}
    found = []
    with progress(len(todo)) as advance:
        for name, op, case in todo:
            advance(f"{name} {case}")
            size, least = op.traffic_case(case).bytes, op.least_bytes(case).get("fwd_bwd")
            count = next(counts[name]) if name in counts else []
            launches, on_amd = caught(op, case), caught(op, case, hip="6.4")
            names = [launch.kernel.__name__ for launch in launches]
            assert name not in bounded or names == [kernel for kernel, _, _ in count]
            for i, launch in enumerate(launches):
                found.append(
                    {
                        "operation": name,
                        "case": str(case),
                        "kernel": names[i].strip("_").removesuffix("_kernel"),
                        "reads": count[i][1] / size if count else None,
                        "writes": count[i][2] / size if count else None,
                        "least": None if least is None else least / case.bytes,
                        "targets": {
                            t: asdict(compile_launch(on_amd[i] if t == "gfx942" else launch, t))
                            for t in targets
                            if launch.options.get("num_ctas", 1) == 1 or t in _WITH_CLUSTERS
                        },
                    }
                )
    return found
