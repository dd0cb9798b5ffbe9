"""What is measured: cases (an operation at a shape) and contenders (ways to compute it)."""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}


class Unavailable(Exception):
    """A contender that cannot run here; the message is the reason that the tables give."""


@dataclass(frozen=True)
class Case:
    """An operation at a shape, whose first size is the one that shrinks to fit a machine."""

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    variant: str = ""
    headline: bool = False  # also for contenders that take long to build

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return "-".join(filter(None, (size, DTYPES[self.dtype], self.variant)))

    @property
    def bytes(self) -> int:
        """Size of the one large tensor of the case."""
        return math.prod(self.shape) * self.dtype.itemsize

    def named(self, parts: list[str] | None) -> bool:
        """Whether the name contains one of `parts`; None is any."""
        return parts is None or any(part in str(self) for part in parts)

    def with_rows(self, rows: int) -> "Case":
        return replace(self, shape=(rows, *self.shape[1:]))


@dataclass(frozen=True)
class Phase:
    """Something to time: `run` takes what `prepare`, which is not timed, returned."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    units: int = 1  # how much one run does: a figure is per unit
    capturable: bool = False  # needs nothing prepared, so that a CUDA graph can hold it
    waits: bool = False  # works on streams of its own, and returns when the device is done


@dataclass(frozen=True)
class Contender:
    """One way to compute a case: what it computes, to be checked, and what is timed."""

    outputs: Callable[[], dict[str, Tensor]]
    phases: dict[str, Phase]


class Operation(Protocol):
    """What a module `bench_*.py` of this package provides."""

    OPERATION: str
    BYTES: dict[str, str]  # by phase: the least that has to be moved, in words

    def cases(self, suite: str) -> list[Case]:
        """What to measure: suite "quick" or "full"."""

    def kernel_cases(self) -> list[Case]:
        """The shapes of the kernel report."""

    def least_bytes(self, case: Case) -> dict[str, int]:
        """By phase: the least number of bytes that has to be moved."""

    def contenders(self, case: Case, device: torch.device) -> dict[str, Callable[[], Contender]]:
        """Builders by name, "torch" and "chunked" first: the others are checked against
        them. A builder raises Unavailable where it cannot run."""

    def traffic_case(self, case: Case) -> Case:
        """The case, or a little less, whose bytes are counted: programs in the middle of a grid
        do alike."""

    def launch(self, case: Case, device: torch.device) -> None:
        """Forward and backward once, as a user calls them, for the kernel report."""


def differentiable(
    function: Callable[[], Tensor], leaves: dict[str, Tensor], upstream: Tensor
) -> Contender:
    """A contender that autograd differentiates: phases fwd (without a graph), bwd, fwd_bwd."""
    tensors = list(leaves.values())

    def forward(_: Any) -> Tensor:
        with torch.no_grad():
            return function()

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, tensors, upstream)

    def outputs() -> dict[str, Tensor]:
        output = function()
        names = [f"d{name}" for name in leaves]
        return {"output": output.detach(), **dict(zip(names, gradients(output), strict=True))}

    return Contender(
        outputs,
        {
            "fwd": Phase(forward, capturable=True),
            "bwd": Phase(gradients, function),
            "fwd_bwd": Phase(lambda _: gradients(function()), capturable=True),
        },
    )


def compiled(
    build: Callable[[Callable[..., Any]], Contender], mode: str | None
) -> Callable[[], Contender]:
    """A builder whose function went through torch.compile: `build` is given the wrapper."""
    return lambda: build(lambda function: torch.compile(function, mode=mode, dynamic=False))


def forget_compiled() -> None:
    """Drops what was compiled for the cases before: of one function Dynamo compiles 8 shapes, and
    no more. Not between the contenders of a case: some would be compiled again as they are
    measured."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def in_graph(build: Callable[[], Contender], device: torch.device) -> Callable[[], Contender]:
    """A builder of the same contender replayed from a CUDA graph: nothing waits for Python."""

    def captured() -> Contender:
        if device.type != "cuda":
            raise Unavailable("CUDA graphs need a CUDA device")
        contender = build()
        phases = {}
        for name, phase in contender.phases.items():
            if phase.capturable:
                phases[name] = Phase(_replay(phase), units=phase.units)
        return Contender(contender.outputs, phases)

    return captured


def _replay(phase: Phase) -> Callable[[Any], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is allocated and compiled on first use stays out of the graph
            phase.run(None)
    torch.cuda.current_stream().wait_stream(side)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            kept = phase.run(None)
    except BaseException:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own
        _end_capture(pool)
        raise
    graph.replay()
    torch.testing.assert_close(kept, phase.run(None))

    def replay(_: Any, kept: Any = kept) -> None:  # the graph writes to what it was captured with
        graph.replay()

    return replay


def _end_capture(pool: Any) -> None:
    """Where CUDA refuses to end a capture, PyTorch's allocator takes it to go on: from then on it
    gives nothing back, and `empty_cache`, which every case begins with, raises."""
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # it ended, and what failed is something else
    torch._C._cuda_releasePool(device, pool)


def require(module: str) -> None:
    """Raises Unavailable where a package is not installed."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed")


def require_liger(device: torch.device) -> None:
    """Raises Unavailable where Liger's kernels cannot run."""
    require("liger_kernel")
    if device.type != "cuda":
        raise Unavailable("Liger's kernels need a GPU")


def generator(device: torch.device) -> torch.Generator:
    """Where the inputs of a case come from: the same in every run."""
    return torch.Generator(device).manual_seed(0)


def upstream_of_loss(
    scaled: bool, dtype: torch.dtype, device: torch.device, numbers: torch.Generator
) -> Tensor:
    """1, or if `scaled` 0.25 to 0.75: not 1, which has a shorter way."""
    if not scaled:
        return torch.ones((), dtype=dtype, device=device)
    return (0.25 + torch.rand((), device=device, generator=numbers) / 2).to(dtype)
