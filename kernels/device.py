"""Kernels run where their tensors are: Triton launches on whatever device is the current one."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """The launcher, with the device of its first argument, a tensor, as the current one."""

    @functools.wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        x = args[0]
        assert isinstance(x, torch.Tensor)
        # The guard itself takes some microseconds.
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return launcher(*args, **kwargs)
        with torch.cuda.device(x.device):
            return launcher(*args, **kwargs)

    return launch
