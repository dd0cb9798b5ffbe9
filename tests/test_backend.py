"""Which implementation serves a tensor."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fused
from fused import backend


def python(
    code: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process, in `folder`, without this one's TRITON_INTERPRET."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)


def test_cpu_takes_the_closed_forms_by_default() -> None:
    assert backend.name_for(torch.zeros(1)) == "eager"


@pytest.mark.cuda
def test_cuda_takes_the_kernels_by_default() -> None:
    assert backend.name_for(torch.zeros(1, device="cuda")) == "triton"


def test_a_gpu_without_triton_takes_the_closed_forms(monkeypatch) -> None:
    on_a_gpu: Any = SimpleNamespace(is_cuda=True)
    for installed, name in ((True, "triton"), (False, "eager")):
        monkeypatch.setattr(backend, "_triton_installed", lambda installed=installed: installed)
        assert backend.name_for(on_a_gpu) == name


def test_use_overrides_and_restores(device) -> None:
    x = torch.zeros(1, device=device)
    default = backend.name_for(x)
    with backend.use("triton"):
        assert backend.name_for(x) == "triton"
        with backend.use("eager"):
            assert backend.name_for(x) == "eager"
        assert backend.name_for(x) == "triton"
    assert backend.name_for(x) == default


def test_use_is_seen_by_all_threads(device) -> None:
    """Autograd runs the backward of CUDA tensors in a thread of its own."""
    x, found = torch.zeros(1, device=device), []
    for name in ("eager", "triton"):
        with backend.use(name):
            thread = threading.Thread(target=lambda: found.append(backend.name_for(x)))
            thread.start()
            thread.join()
    assert found == ["eager", "triton"]


def test_blocks_that_overlap_without_nesting(device) -> None:
    """As those of two threads do."""
    x = torch.zeros(1, device=device)
    default = backend.name_for(x)
    first, second = backend.use("eager"), backend.use("triton")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backend.name_for(x) == "triton"
    second.__exit__(None, None, None)
    assert backend.name_for(x) == default


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_use_within_a_compiled_function(monkeypatch, device) -> None:
    """Operators look at it when they run, and by then the block would have ended."""
    served: list[str] = []
    module = backend._module

    def recorded(name: str, operation: str) -> ModuleType:
        served.append(name)
        return module(name, operation)

    monkeypatch.setattr(backend, "_module", recorded)
    norm = fused.BatchNorm1d(5, device=device)

    def step(x: torch.Tensor) -> torch.Tensor:
        with backend.use("triton"):
            return norm(x).square().sum()

    torch.compiler.reset()
    torch.compile(step, backend="aot_eager")(torch.randn(6, 5, device=device))
    assert set(served) == {"triton"}
    torch.compiler.reset()


@pytest.mark.parametrize("forward", ["eager", "triton"])
def test_a_checkpoint_recomputed_by_another_thread(forward, device) -> None:
    x = torch.randn(6, 5, device=device, requires_grad=True)
    target = torch.zeros(6, dtype=torch.int64, device=device)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return fused.cross_entropy(x, target, reduction="none", z_loss=0.1).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    with backend.use(forward):
        recomputed = checkpoint(loss, x, use_reentrant=False)
        thread = threading.Thread(target=recomputed.backward)
        thread.start()
        thread.join()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_backward_is_served_by_what_served_forward(device) -> None:
    x = torch.randn(4, 27, device=device, requires_grad=True)
    with backend.use("triton"):
        loss = fused.cross_entropy(x, torch.zeros(4, dtype=torch.int64, device=device))
    with backend.use("eager"):
        loss.backward()  # eager would refuse the statistics of the kernels
    assert x.grad is not None


def test_kernels_are_launched_on_their_tensors_device(monkeypatch) -> None:
    """A stand-in for a second GPU: the guard is there, and left out where it has nothing to do."""
    pytest.importorskip("triton")
    from fused.kernels.device import on_its_device

    class Elsewhere(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 1)

    current = [0]

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", guard)
    launch = on_its_device(lambda x: list(current))
    x = torch.zeros(2).as_subclass(Elsewhere)
    assert launch(x) == [0, 1] and current == [0]
    current[0] = 1
    assert launch(x) == [1]
    assert launch(torch.zeros(2)) == [1]


def test_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="one of auto, triton, eager, got 'cuda'"):
        with backend.use("cuda"):
            pass


CALL = "import torch, fused; fused.cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())"


def test_environment_variable() -> None:
    result = python(CALL, FUSED_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    result = python(CALL, FUSED_BACKEND="nonsense")
    assert "ValueError: expected backend to be one of auto, triton, eager, got 'nonsense'" in (
        result.stderr
    )
    assert "got 'nonsense' in the environment variable FUSED_BACKEND" in result.stderr
    result = python(CALL, FUSED_BACKEND="")  # exported, and empty: not set
    assert result.returncode == 0, result.stderr


def test_kernels_on_cpu_tensors_without_the_interpreter() -> None:
    result = python(CALL, FUSED_BACKEND="triton")
    assert "RuntimeError: the Triton kernels were asked for on a cpu tensor" in result.stderr
    assert "TRITON_INTERPRET=1" in result.stderr


NO_TRITON = "import sys; sys.modules['triton'] = None\n"


def test_without_triton_the_cpu_path_works_whole() -> None:
    code = NO_TRITON + (
        "import torch, fused\n"
        "x = torch.randn(4, 27, requires_grad=True)\n"
        "h = fused.BatchNorm1d(27, correction=1)(x)\n"
        "fused.cross_entropy(h, torch.zeros(4).long()).backward()\n"
        "assert x.grad.isfinite().all()\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_without_triton_asking_for_it_says_what_is_missing() -> None:
    result = python(NO_TRITON + CALL, FUSED_BACKEND="triton")
    assert "RuntimeError: the Triton kernels were asked for, but triton is not installed" in (
        result.stderr
    )
