"""Which implementation serves a tensor: the Triton kernels or the closed forms in plain PyTorch.

By default CUDA tensors (NVIDIA and ROCm) take the Triton kernels where triton is installed, and
everything else takes `fused.eager`. `use` overrides that for a block of code, the environment
variable FUSED_BACKEND for a process.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

import torch

_NAMES = ("auto", "triton", "eager")
_overrides: tuple[list[str], ...] = ()  # the blocks of `use` that are open; each list is its own
_lock = threading.Lock()


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Within the block, serve every operation by `name`: "triton", "eager" or "auto" (the default).

    It holds in all threads, since autograd runs the backward of CUDA tensors, and what is
    recomputed for it, in a thread of its own; of several open blocks the one that began last
    counts. A backward pass is served by whatever served its forward; a compiled graph, forward and
    backward each, and what a checkpoint recomputes, by what is asked for when it runs: there the
    backward belongs in the block, too. Within a function that is compiled, `use` is a graph break.

    "triton" on CPU tensors works only where Triton's driver is one for CPUs, and in its interpreter
    (TRITON_INTERPRET=1 in the environment before triton is imported), which is for tests: it is
    slow. On meta tensors it shows what would be launched (`bench.kernels.catch_launches`).
    """
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # operators look when they run: the block would be over
    global _overrides
    own = [_checked(name)]
    with _lock:
        _overrides = (*_overrides, own)
    try:
        yield
    finally:
        with _lock:
            _overrides = tuple(o for o in _overrides if o is not own)


def name_for(tensor: torch.Tensor) -> str:
    """ "triton" or "eager": what serves an operation on `tensor` here and now.

    Raises RuntimeError where the Triton kernels were asked for and cannot serve the tensor.
    """
    overrides = _overrides
    return resolved(overrides[-1][0] if overrides else _from_environment(), tensor)


def resolved(name: str, tensor: torch.Tensor) -> str:
    """What `name_for` returns, and raises, where `name` was asked for."""
    if name == "auto":
        return "triton" if tensor.is_cuda and _triton_installed() else "eager"
    if name == "triton":
        if not _triton_installed():
            raise RuntimeError(
                "the Triton kernels were asked for, but triton is not installed "
                "(it exists for Linux: pip install triton); backend 'eager' needs nothing but torch"
            )
        if not (tensor.is_cuda or tensor.is_meta or _runs_on_cpus()):
            raise RuntimeError(
                f"the Triton kernels were asked for on a {tensor.device.type} tensor; move it to a "
                "CUDA device, or set TRITON_INTERPRET=1 before Python starts to interpret them"
            )
    return name


def implementation(operation: str, tensor: torch.Tensor) -> ModuleType:
    """The module that serves `operation` ("cross_entropy", ...) on `tensor`."""
    return _module(name_for(tensor), operation)


def kernels_could_serve(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels may serve `tensor` later, where `use` ends or another begins."""
    if tensor.is_cuda or tensor.is_meta:
        return _triton_installed()
    return "triton" in sys.modules and _runs_on_cpus()


@functools.cache
def _module(name: str, operation: str) -> ModuleType:
    # Not imported before it is needed: triton costs a quarter of a second.
    package = {"triton": "fused.kernels", "eager": "fused.eager"}[name]
    return importlib.import_module(f"{package}.{operation}")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _runs_on_cpus() -> bool:
    """Whether Triton takes CPU tensors: in its interpreter, or by a driver for them."""
    import triton

    if triton.knobs.runtime.interpret:
        return True
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # there is no driver
        return False


@functools.cache
def _from_environment() -> str:
    name = os.environ.get("FUSED_BACKEND") or "auto"  # empty is not set
    return _checked(name, " in the environment variable FUSED_BACKEND")


def _checked(name: str, where: str = "") -> str:
    if name not in _NAMES:
        raise ValueError(f"expected backend to be one of {', '.join(_NAMES)}, got {name!r}{where}")
    return name
