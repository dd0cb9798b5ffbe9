"""A step captured once and replayed on other numbers in the same memory.

On a GPU by a CUDA graph. On the CPU by what stands in for one: the launches and the operations of
PyTorch are written down, and what a capture refuses is refused: numbers and sizes that come of a
tensor's values, and constants that are copied from the host.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused

_LOOKS_AT_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Recording(TorchDispatchMode):
    """Within the block, what is computed is written down; `replay` does it again."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self._steps: list[Callable[[], Any]] = []
        self._interpreting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if self._interpreting:
            return outputs
        if any(tag in func.tags for tag in _LOOKS_AT_VALUES) or "lift_fresh" in func.name():
            raise AssertionError(f"{func.name()} cannot be captured in a CUDA graph")
        alias = [r.alias_info for r in func._schema.returns]
        if any(a is not None and a.is_write for a in alias):
            self._steps.append(lambda: func(*args, **kwargs))
        elif all(a is None for a in alias) and not func.name().startswith("aten::empty"):
            self._steps.append(lambda: _overwrite(outputs, func(*args, **kwargs)))
        return outputs  # a view, and memory, stay what they are

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Launches of kernels are written down, too; what Triton's interpreter does is not."""
        from fused.kernels.cross_entropy_kernels import _cross_entropy_fwd_kernel as kernel

        cls = type(kernel)
        launcher = cls.__getitem__  # Triton 3.5's interpreted kernels have run in the instance

        def recorded(self_: Any, grid: Any) -> Any:
            run = launcher(self_, grid)

            def launch(*args: Any, **kwargs: Any) -> Any:
                self.launches += 1
                self._steps.append(lambda: run(*args, **kwargs))
                self._interpreting = True
                try:
                    return run(*args, **kwargs)
                finally:
                    self._interpreting = False

            return launch

        cls.__getitem__ = recorded
        try:
            with self:
                yield
        finally:
            cls.__getitem__ = launcher

    def replay(self) -> None:
        with torch.no_grad():
            for step in self._steps:
                step()


def _overwrite(old: Any, new: Any) -> None:
    for o, n in zip(tree_leaves(old), tree_leaves(new), strict=True):
        if isinstance(o, Tensor):
            o.copy_(n)


def check_replay(step: Callable[[], Any], state: Iterable[Tensor]) -> None:
    """A graph of `step`, replayed after all of `state` (what it reads, and updates) has changed,
    gives the bits, and leaves the state, that the step itself does. By the Triton kernels."""
    pytest.importorskip("triton")
    with fused.backend.use("triton"):
        _check_replay(step, list(state))


def _check_replay(step: Callable[[], Any], state: list[Tensor]) -> None:
    # The other numbers: the rows of each tensor in another order, and counters one further.
    others = [t.roll(1, 0) if t.dim() else t + 1 for t in _copies(state)]
    graph: Any
    if state[0].is_cuda:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles what must not be compiled while capturing
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
    else:
        graph = Recording()
        with graph.capturing():
            found = step()
        assert graph.launches
    outputs = [t.detach() for t in tree_leaves(found)]
    del found  # and its graph, whose leaves belong to the stream that captured
    _set(state, others)
    expected = [t.detach() for t in tree_leaves(step())], _copies(state)
    assert not all(a.equal(b) for a, b in zip(outputs, expected[0], strict=True))
    _set(state, others)
    graph.replay()
    torch.testing.assert_close((outputs, state), expected, rtol=0, atol=0)


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def _set(tensors: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for t, v in zip(tensors, values, strict=True):
            t.copy_(v)
