"""Tensors of shape (N, C, *S) as the closed forms see them: neighbours in memory as neighbours."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_Seen = TypeVar("_Seen", Tensor, Tensor | None)


class View(NamedTuple):
    """How the tensors of a call, those with classes (N, C, *S) and those without (N, *S), are seen:
    (A, C, B) and (A, B), or (A, C) and (A,).

    A are the sizes of N and S that are wider apart in memory than the classes, B the others, either
    from the widest to the nearest: of channels_last A are all, of (N, C) column by column B is N.
    """

    order: tuple[int, ...] | None = None  # the dimensions of A, C and B; None: all is as it is
    shape: tuple[int, ...] = ()  # (A, C, B) or (A, C)
    sizes: tuple[int, ...] = ()  # of A and B
    dim: int = 0  # of tensors with classes

    @staticmethod
    def of(x: Tensor, *others: Tensor | None) -> "View":
        """How logits x and `others` are seen: views of x and of those that have its classes."""
        size, stride, dim = x.shape, x.stride(), x.dim()
        if x.numel() == 0 or (dim == 2 and stride[0] >= stride[1]):
            return View()
        # What is the same place in memory all along is nowhere: classes are then the nearest,
        # others the widest.
        nowhere = [math.inf, -1.0, *[math.inf] * (dim - 2)]
        apart = [stride[d] if size[d] > 1 and stride[d] else nowhere[d] for d in range(dim)]
        order = sorted(range(dim), key=apart.__getitem__, reverse=True)
        k = order.index(1)
        groups = order[:k], order[k + 1 :]
        with_classes = [x, *(t for t in others if t is not None and t.dim() == dim)]
        if not all(_is_one(t, group) for t in with_classes for group in groups):
            return View()
        a, b = (torch.Size(size[d] for d in group) for group in groups)
        shape = (a.numel(), size[1], b.numel()) if b else (a.numel(), size[1])
        return View(tuple(order), shape, a + b, dim)

    def __call__(self, t: _Seen) -> _Seen:
        """t as said above; a number, or none, is itself."""
        if t is None or t.dim() == 0 or self.order is None:
            return t
        if t.dim() == self.dim:
            return t.permute(self.order).reshape(self.shape)
        return t.permute(self._rows()).reshape(self.shape[:1] + self.shape[2:])

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


def _is_one(t: Tensor, dimensions: Sequence[int]) -> bool:
    """Whether these dimensions, the widest first, lie in memory as one."""
    inside = [d for d in dimensions if t.shape[d] > 1]
    return all(
        t.stride(d) == t.stride(e) * t.shape[e] for d, e in zip(inside, inside[1:], strict=False)
    )
