"""Tensors of shape (N, C, *S) as the closed forms see them: neighbours in memory as neighbours, and
in chunks that stay in the CPU's cache."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# Of a chunk of an image. The positions of a channel or class are together in memory, its others are
# far away: at 32,000 classes 16 took half as long again.
LEAST_POSITIONS = 64
_Seen = TypeVar("_Seen", Tensor, Tensor | None)


class View(NamedTuple):
    """How the tensors of a call, those with channels (or classes) (N, C, *S) and those without
    (N, *S), are seen: (A, C, B) and (A, B), or (A, C) and (A,).

    A are the sizes of N and S that are wider apart in memory than the channels, B the others, from
    the widest to the nearest both: of channels_last A are all, of (N, C) column by column B is N.
    """

    order: tuple[int, ...] | None = None  # the dimensions of A, C and B; None: all is as it is
    shape: tuple[int, ...] = ()  # (A, C, B) or (A, C)
    sizes: tuple[int, ...] = ()  # of A and B
    dim: int = 0  # of tensors with channels

    @staticmethod
    def of(x: Tensor, *others: Tensor | None) -> "View":
        """How x and `others` are seen: views of x and of those that have its channels."""
        size, stride, dim = x.shape, x.stride(), x.dim()
        if x.numel() == 0 or (dim == 2 and stride[0] >= stride[1]):
            return View()
        # What is the same place in memory all along is nowhere: channels are then the nearest,
        # others the widest.
        nowhere = [math.inf, -1.0, *[math.inf] * (dim - 2)]
        apart = [stride[d] if size[d] > 1 and stride[d] else nowhere[d] for d in range(dim)]
        order = sorted(range(dim), key=apart.__getitem__, reverse=True)
        k = order.index(1)
        groups = order[:k], order[k + 1 :]
        with_channels = [x, *(t for t in others if t is not None and t.dim() == dim)]
        if not all(_is_one(t, group) for t in with_channels for group in groups):
            return View()
        a, b = (torch.Size(size[d] for d in group) for group in groups)
        shape = (a.numel(), size[1], b.numel()) if b else (a.numel(), size[1])
        return View(tuple(order), shape, a + b, dim)

    @staticmethod
    def in_order(x: Tensor) -> "View":
        """x (N, C, *S) as (N, C, S), or (N, C); a copy where no view is."""
        n, c, *inner = x.shape
        shape = (n, c, math.prod(inner)) if inner else (n, c)
        return View(tuple(range(x.dim())), shape, (n, *inner), x.dim())

    def __call__(self, t: _Seen) -> _Seen:
        """t as said above, a copy where no view is; a number, or none, is itself."""
        if t is None or t.dim() == 0 or self.order is None:
            return t
        if t.dim() == self.dim:
            return t.permute(self.order).reshape(self.shape)
        return t.permute(self._rows()).reshape(self.shape[:1] + self.shape[2:])

    def empty_like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor (N, C, *S) that is seen in its own memory, in x's memory format if it can be."""
        y = torch.empty_like(x, dtype=dtype)
        if self.order is None or self(y).data_ptr() == y.data_ptr():
            return y
        # No view of an (A, C, B), which autograd would forbid to change in place.
        return torch.empty_permuted(x.shape, self.order, dtype=dtype or x.dtype, device=x.device)

    def back(self, t: Tensor) -> Tensor:
        """Numbers of rows, (A, B) or (A,), as (N, *S)."""
        if self.order is None:
            return t
        rows = self._rows()
        return t.view(self.sizes).permute([rows.index(d) for d in range(len(rows))]).contiguous()

    def _rows(self) -> list[int]:
        """`order` without the classes."""
        assert self.order is not None
        return [d - (d > 1) for d in self.order if d != 1]


def step(view: Tensor, elements: int) -> tuple[int, int]:
    """(rows, positions) of chunks of so many elements of view (A, C, B) or (A, C): of its first
    dimension, and of its last, 0 for all of them."""
    a, size = max(1, view.shape[0]), max(1, view.numel())
    rows = elements * a // size
    if rows == 0 and view.dim() == 3 and view.shape[2] > LEAST_POSITIONS:
        return 1, max(LEAST_POSITIONS, elements // view.shape[1])
    return max(1, rows), 0


def split(t: Tensor | None, rows: int, positions: int) -> Iterable[Any]:
    """The chunks of t; a number, or none, again and again."""
    if t is None or t.dim() == 0:
        return itertools.repeat(t)
    parts = t.split(rows)
    if not positions:
        return parts
    return itertools.chain.from_iterable(part.split(positions, -1) for part in parts)


def sized(buffer: Tensor, chunk: Tensor) -> Tensor:
    """What a chunk takes of `buffer`, which was made for the first, the largest; in its shape."""
    if buffer.shape == chunk.shape:
        return buffer
    return buffer.view(-1)[: chunk.numel()].view(chunk.shape)


def _is_one(t: Tensor, dimensions: Sequence[int]) -> bool:
    """Whether these dimensions, the widest first, lie in memory as one."""
    inside = [d for d in dimensions if t.shape[d] > 1]
    return all(
        t.stride(d) == t.stride(e) * t.shape[e] for d, e in zip(inside, inside[1:], strict=False)
    )
