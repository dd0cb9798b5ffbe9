"""How batch norm's kernels walk over tensors, and how the signs of z lie in memory; no Triton."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fused.kernels import layout, tuning


class View(NamedTuple):
    """Tensors as the kernels see them: (n, c, length), or all rows in n or in length, where the
    strides of every tensor allow it, whichever leaves neighbours in memory neighbours."""

    n: int
    c: int
    length: int
    columns: bool  # the channels are adjacent in memory, not the positions
    strides: list[tuple[int, int, int]]
    compact: bool  # nothing lies between a tensor's elements, and there are no signs

    @classmethod
    def of(cls, x: torch.Tensor, *others: torch.Tensor | None, signs: bool) -> "View":
        """Of tensors (N, C, L); None has strides of 0. Bytes of `signs` end where an image ends."""
        n, c, length = x.shape
        tensors = x, *others
        strides = [layout.strides(t) for t in tensors]
        columns = by_channel(x)
        if length == 1:
            rows = [s[0] for s in strides]
        elif n == 1 or (all(s[0] == length * s[2] for s in strides) and (columns or not signs)):
            rows = [s[2] for s in strides]
        else:
            rows = None
        if rows is not None and columns:
            n, length = n * length, 1
            strides = [(r, s[1], 0) for r, s in zip(rows, strides, strict=True)]
        elif rows is not None:
            n, length = 1, n * length
            strides = [(0, s[1], r) for r, s in zip(rows, strides, strict=True)]
        dense = (c, 1, 0) if columns else (0 if n == 1 else c * length, length, 1)
        compact = not signs and all(
            s == dense for s, t in zip(strides, tensors, strict=True) if t is not None
        )
        return cls(n, c, length, columns, strides, compact)

    def packed(self, plan: tuning.BatchNormPlan) -> "View":
        """As the plan wants it; its channels are columns."""
        if plan.pack is None:
            return self
        members = plan.pack.members
        n, c = self.n * self.length // members, self.c * members
        strides = [(c, 1, 0) if any(s) else s for s in self.strides]
        return View(n, c, 1, True, strides, True)

    def align(self) -> int:
        """What divides all strides but those of neighbours, and the number of neighbours."""
        sizes = [s[0] for s in self.strides] + [self.c if self.length == 1 else self.length]
        if self.length > 1:
            sizes += [s[1] for s in self.strides]
        return math.gcd(16, *sizes)

    def group(self, plan: tuning.BatchNormPlan, dtype: torch.dtype) -> int:
        """Signs in a byte: those of 16 bytes, or of the neighbours that there are."""
        n, block = (self.c, plan.BLOCK_C) if self.columns else (self.length, plan.BLOCK_L)
        assert block >= min(n, 16 // dtype.itemsize), "a byte would be of two programs"
        return min(16 // dtype.itemsize, block)

    def plan(self, x: torch.Tensor, tensors: int) -> tuning.BatchNormPlan:
        """For x, one of the tensors."""
        return tuning.batch_norm(
            self.n, self.c, self.length, self.columns, self.align(), x.dtype, tensors,
            tuning.multiprocessors(x.device), self.compact,
        )  # fmt: skip


def by_channel(x: torch.Tensor) -> bool:
    """Whether neighbours in memory are channels of x (N, C, S), not positions."""
    return x.shape[1] > 1 and x.stride(1) <= x.stride(0 if x.shape[2] == 1 else 2)


def signs_shape(x: torch.Tensor) -> tuple[int, ...]:
    """Of the signs of x (N, C, *S) in bits, one uint8 for 16 bytes of neighbours: (rows, groups of
    channels) or (N, C, groups of positions), and (1, C, groups of rows) where S is 1."""
    x = layout.inner(x)
    (n, c, s), group = x.shape, 16 // x.dtype.itemsize
    if by_channel(x):
        return n * s, -(-c // group)
    n, s = (1, n) if s == 1 else (n, s)
    return n, c, -(-s // group)


def pack_signs(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The signs of y = relu(z), of x's shape: whether its numbers are above 0, or NaN."""
    shape, y = signs_shape(x), layout.inner(y)
    y = y.transpose(1, 2) if len(shape) == 2 else y.transpose(0, 2) if y.shape[2] == 1 else y
    group = 16 // x.dtype.itemsize
    bits = (y <= 0).logical_not_().to(torch.uint8).reshape(*shape[:-1], y.shape[-1])
    bits = F.pad(bits, (0, -y.shape[-1] % group)).unflatten(-1, (-1, group))
    return (bits << torch.arange(group, device=y.device)).sum(-1, dtype=torch.uint8)


def unpack_signs(signs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What pack_signs packed, as a tensor of bool of x's shape."""
    (n, c, *_), size = x.shape, math.prod(x.shape[2:])
    group = 16 // x.dtype.itemsize
    bits = (signs.unsqueeze(-1) >> torch.arange(group, device=x.device) & 1).bool().flatten(-2)
    if signs.dim() == 2:
        bits = bits[:, :c].view(n, size, c).transpose(1, 2)
    else:
        bits = bits[..., : n if size == 1 else size]
        bits = bits.transpose(0, 2) if size == 1 else bits
    return bits.reshape(x.shape)
