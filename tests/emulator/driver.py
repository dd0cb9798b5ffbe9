"""A Triton driver whose device is the emulator: kernel[grid](...) on CPU tensors.

A launch takes Triton's own way: its arguments are bound and specialised, and the kernel is compiled
for sm_80 or sm_90 as for a GPU, as far as PTX. That then runs on a copy of the tensors' storages,
with guard zones between them, and what it wrote is copied back.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from tests.emulator import machine
from tests.emulator.memory import Array, Memory
from tests.emulator.ptx import Kernel, parse

_GUARD = 4096  # bytes before, between and after storages
_MOST_BYTES = 1 << 28
_SCALARS = {
    "i1": "i1", "i8": "i1", "i16": "i2", "i32": "i4", "i64": "i8", "u1": "u1", "u8": "u1",
    "u16": "u2", "u32": "u4", "u64": "u8", "fp32": "f4", "fp64": "f8",
}  # fmt: skip


class _Compiler(CUDABackend):
    """As far as PTX: ptxas takes long, and nothing here runs what it makes."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: Any, options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        return f"{super().hash()}-ptx"


class _Utils:
    """What Triton's launcher asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": {80: 166912, 90: 232448}[self.capability]}

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[None, str, int, int, int]:
        """(module, function, registers, spilled, most threads)"""
        return None, kernel.decode(), 0, 0, 1024


class Driver(DriverBase):
    """`launches` counts those of every kernel, by name. Kernels may do what Memory calls updates,
    but for those named in `without_updates`."""

    without_updates: frozenset[str] = frozenset()

    def __init__(self, capability: int, early: bool = False) -> None:
        self.capability, self.early = capability, early
        self.utils = _Utils(capability)
        self.launches: Counter[str] = Counter()

    def activate(self) -> None:
        """From now on Triton launches here whatever it launches."""
        backends["nvidia"] = Backend(_Compiler, Driver)
        triton.runtime.driver.set_active(self)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def launcher_cls(self, source: Any, metadata: Any) -> "Launcher":
        return Launcher(self, source, metadata)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("no C++ here")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("times here mean nothing")


class Launcher:
    """One compiled kernel."""

    def __init__(self, driver: Driver, source: Any, metadata: Any) -> None:
        self.driver, self.kinds, self.metadata = driver, tuple(source.signature.values()), metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        _packed, _metadata, _enter, _exit, *arguments = rest
        driver, name = self.driver, self.metadata.name
        driver.launches[name] += 1
        flat = _flat(self.kinds, tuple(arguments))
        updates = name not in driver.without_updates
        grid = (x * self.metadata.num_ctas, y, z)  # of blocks
        launch(function, flat, grid, self.metadata.shared, driver.early, updates)


def _flat(kinds: Sequence[Any], values: Sequence[Any]) -> list[tuple[str, Any]]:
    """The arguments that the compiled kernel has, tuples taken apart."""
    flat: list[tuple[str, Any]] = []
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            flat += _flat(kind, value)
        elif kind != "constexpr":
            flat.append((kind, value))
    return flat


def launch(
    text: str,
    arguments: Sequence[tuple[str, Any]],
    grid: tuple[int, int, int],
    shared: int = 0,
    early: bool = False,
    updates: bool = True,
) -> None:
    """Runs a kernel's PTX; arguments are (Triton's type, tensor or number)."""
    kernel = parse(text)
    tensors = [value for kind, value in arguments if kind[0] == "*"]
    arena = _Arena(tensors, kernel, updates)
    parameters = [
        np.array([arena.address(value)], np.uint64) if kind[0] == "*" else _scalar(kind, value)
        for kind, value in arguments
    ]
    # Triton's kernels end with scratch memory, of which these have none.
    parameters += [np.zeros(1, np.uint64)] * (len(kernel.parameters) - len(parameters))
    machine.run(kernel, parameters, grid, shared, arena.memory, early)
    arena.copy_back()


def _scalar(kind: str, value: float) -> Array:
    if kind not in _SCALARS:
        raise NotImplementedError(f"an argument of type {kind}")
    return np.array([value]).astype(_SCALARS[kind])


class _Arena:
    """Global memory: a copy of every storage of some tensors, no better aligned than it is."""

    def __init__(self, tensors: Sequence[torch.Tensor], kernel: Kernel, updates: bool) -> None:
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()
        }
        self._hosts: dict[int, Array] = {}
        self._starts: dict[int, int] = {}
        end = 0
        for pointer, storage in storages.items():
            if storage.nbytes() > _MOST_BYTES:
                raise NotImplementedError(f"a tensor's storage of {storage.nbytes():,} bytes")
            self._hosts[pointer] = torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
            self._starts[pointer] = -(-end // _GUARD) * _GUARD + _GUARD + pointer % 16
            end = self._starts[pointer] + storage.nbytes()
        self.memory = Memory("global", end + _GUARD, kernel.threads, updates, kernel.cluster)
        for pointer, host in self._hosts.items():
            start = self._starts[pointer]
            self.memory.bytes[start : start + len(host)] = host
            self.memory.allow(start, len(host))

    def address(self, tensor: torch.Tensor) -> int:
        """0 for a tensor without elements, which nobody may access."""
        if not tensor.numel():
            return 0
        pointer = tensor.untyped_storage().data_ptr()
        return self._starts[pointer] + tensor.data_ptr() - pointer

    def copy_back(self) -> None:
        for pointer, host in self._hosts.items():
            start = self._starts[pointer]
            host[:] = self.memory.bytes[start : start + len(host)]
