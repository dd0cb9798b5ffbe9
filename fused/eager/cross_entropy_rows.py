"""Rows of logits in chunks that stay in the CPU's cache, and their exponentials.

    z = cap * tanh(scale * x / cap)        e_c = exp(z_c - shift)        p_c = e_c / sum_k e_k

The logits are read from memory once and their gradient is written once; what is in between is one
chunk of float32 (float64 for float64) that never leaves the cache: some rows, or some positions of
an image that is larger. On other devices (there are some without Triton) everything is one chunk.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fused.eager.activation import tanh_, tanh_by_sigmoid_
from fused.eager.layout import sized, split, step

# Elements of a chunk: 4 MB of float32. Of 0.25 to 8 MB, 4 were fastest or nearly so: a chunk takes
# some 40 us of calls, and a larger one leaves the cache.
CHUNK = 2**20
LOG2_E = math.log2(math.e)
# A cap times the error of tanh_by_sigmoid_, 2e-7, is to be far below what half precision shows.
_LARGEST_CAP = 32.0
_Terms = TypeVar("_Terms")


class Labels(NamedTuple):
    """Class indices, looked at once a call."""

    classes: Tensor  # to gather by, (N, 1, *S); 0 for a row that has none
    ignored: Tensor | None  # which rows are, (N, *S); None where it is known that none is
    outside: Tensor | None  # which are out of range; None on the CPU, where gather refuses them

    @staticmethod
    def of(target: Tensor, n_classes: int, ignore_index: int) -> "Labels":
        index = target.long()  # before the comparison: as a uint8, -100 would be 156
        ignored = index == ignore_index
        if target.is_cpu:
            if not ignored.any():  # elsewhere nobody may look
                return Labels(index.unsqueeze(1), None, None)
            return Labels(index.masked_fill(ignored, 0).unsqueeze(1), ignored, None)
        index = index.masked_fill(ignored, 0)
        outside = (index < 0) | (index >= n_classes)
        return Labels(index.masked_fill_(outside, 0).unsqueeze(1), ignored, outside)

    def split(self, n: int, positions: int) -> "Iterator[Labels]":
        """Chunks."""
        parts = zip(*(split(t, n, positions) for t in self), strict=False)
        return itertools.starmap(Labels, parts)


class Rows(NamedTuple):
    """Rows of logits, and the numbers of a call that concern a row."""

    x: Tensor
    target: Tensor
    labels: Labels | None  # None for probabilities
    weight: Tensor | None
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float

    @staticmethod
    def of(
        x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, *numbers: float
    ) -> "Rows":
        soft = target.shape == x.shape
        labels = None if soft else Labels.of(target, x.shape[1], ignore_index)
        return Rows(x, target, labels, weight, *numbers)

    def chunks(self, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Chunks of these rows, each with its rows of `others`, which may be one number for all.

        At least one, of everything where x is not on the CPU.
        """
        x, target, labels = self[:3]
        if x.numel() <= CHUNK or not x.is_cpu:
            yield self, *others
            return
        size = step(x, CHUNK)
        parts = itertools.repeat(None) if labels is None else labels.split(*size)
        tensors = (split(t, *size) for t in (x, target, *others))
        for labels, x, target, *own in zip(parts, *tensors, strict=False):
            yield Rows(x, target, labels, *self[3:]), *own

    def joined(self, parts: tuple[Any, ...]) -> Any:
        """What is of each chunk, (n, 1, *S) or (n, *S), of all rows; none of none."""
        if len(parts) == 1 or parts[0] is None:
            return parts[0]
        if self.x.dim() == 2 or parts[0].shape[-1] == self.x.shape[-1]:
            return torch.cat(parts)
        return torch.cat(parts, -1).view(self.x.shape[0], *parts[0].shape[1:-1], -1)

    @property
    def computed_in(self) -> torch.dtype:
        return computed_in(self.x, self.target)

    @property
    def of_class_alone(self) -> bool:
        """Whether a row's gradient is w_y * (p - onehot)."""
        return self.labels is not None and not (self.label_smoothing or self.z_loss)

    def factors(self, factor: Tensor) -> Tensor:
        """All of the factor of each row's gradient that is known before its softmax.

        `factor` is upstream's, one number or (N, 1, *S), as is the result.
        """
        labels = self.labels
        if self.logit_scale != 1:
            factor = factor * self.logit_scale
        if labels is None:
            return factor
        if self.of_class_alone and self.weight is not None:
            factor = factor * self.weight.to(self.computed_in)[labels.classes]
        if labels.outside is not None:
            factor = torch.where(labels.outside.unsqueeze(1), float("nan"), factor)
        if labels.ignored is not None:  # a mean over no rows has the factor infinity
            factor = torch.where(labels.ignored.unsqueeze(1), 0.0, factor)
        return factor


class Dense(NamedTuple):
    """b_c = w_c * ((1 - e) * t_c + e / C) of probabilities t, and its sum over the classes."""

    b: Tensor  # (n, C, *S)
    sums: Tensor  # (n, 1, *S)


class Powers(NamedTuple):
    """p = e / sums and lse = shift + ln(sums), of e = exp(z - shift)."""

    e: Tensor  # (n, C, *S)
    sums: Tensor  # (n, 1, *S)
    shift: Tensor | None  # (n, 1, *S); None for 0

    @property
    def lse(self) -> Tensor:
        lse = self.sums.log()
        if self.shift is None:
            return lse
        return torch.where(self.shift.isinf(), self.shift, lse + self.shift)


class Scratch:
    """Memory of a chunk's size, taken once a call: fresh pages cost more than what is done here.

    `results` are the dtypes of what a call returns besides dx.
    """

    def __init__(self, rows: Rows, *results: torch.dtype) -> None:
        self._buffers: dict[str, Tensor] = {}
        # Elsewhere nobody may look whether a shift is needed. The loss of probabilities is a
        # difference of exponents, which may be small.
        self._shifts = not rows.x.is_cpu or rows.labels is None
        half = rows.x.dtype.itemsize == 2
        self._least_sum, self._largest_sum = (2.0**-20, 2.0**80) if half else (2.0**-10, 2.0**24)
        rounded = half and all(dtype.itemsize == 2 for dtype in results)
        by_sigmoid = rounded and rows.softcap <= _LARGEST_CAP
        self._tanh_ = tanh_by_sigmoid_ if by_sigmoid else tanh_

    def scores(self, rows: Rows) -> Tensor:
        """`scores` of a chunk: its own logits where there is nothing to compute."""
        x, dtype = rows.x, rows.computed_in
        if x.dtype == dtype and rows.softcap == 0 and rows.logit_scale == 1:
            return x
        z = self._buffer("z", x, dtype).copy_(x)
        if rows.logit_scale != 1:
            z.mul_(rows.logit_scale)
        if rows.softcap == 0:
            return z
        return self._tanh_(z.div_(rows.softcap)).mul_(rows.softcap)

    def powers(
        self,
        z: Tensor,
        rows: Rows,
        out: Tensor | None,
        of_exponents: Callable[[Tensor], _Terms],
    ) -> tuple[Powers, _Terms]:
        """e^t = 2^(t * log2(e)) of t = z - shift, and `of_exponents(t)`, after which t is gone.

        They are in `out` if that fits, never over the logits, over z if that is free. 2^z takes
        torch a fraction of the time of e^z, and its error is about that of subtracting the largest
        logit, as a softmax does. That is looked for, and subtracted, only where the sums show that
        it must be: logits are seldom far from 0. Without it t * log2(e) is exact to |z| * 2^-24
        in float32, for which the sums are held closer to 1 than for half precision: there it is
        only to be smaller than its rounding, nothing may overflow, and what vanishes is below 1e-30
        of the sum. That product, not t, may be infinite, of logits near the least number.
        """
        e = self._room(z, rows, out)
        if not self._shifts:
            terms = of_exponents(z)
            sums = torch.mul(z, LOG2_E, out=e).exp2_().sum(1, keepdim=True)
            if torch.equal(sums, sums.clamp(self._least_sum, self._largest_sum)):
                return Powers(e, sums, None), terms
            self._shifts = True
            z = self.scores(rows)  # e may lie over it
        shift = z.amax(1, keepdim=True)
        terms = of_exponents(torch.sub(z, shift, out=e))
        return Powers(e, e.mul_(LOG2_E).exp2_().sum(1, keepdim=True), shift), terms

    def _room(self, z: Tensor, rows: Rows, out: Tensor | None) -> Tensor:
        logits = rows.x.data_ptr()
        if z.data_ptr() != logits and rows.softcap == 0:
            return z
        if out is not None and (
            z.dtype == out.dtype and out.is_contiguous() and out.data_ptr() != logits
        ):
            return out
        return self._buffer("e", z, z.dtype)

    def dense(self, rows: Rows) -> Dense | None:
        """Of probabilities; None for class indices."""
        if rows.labels is not None:
            return None
        b, dtype, weight = rows.target, rows.computed_in, rows.weight
        if b.dtype != dtype or rows.label_smoothing or weight is not None:
            b = self._buffer("b", b, dtype).copy_(b)
        if rows.label_smoothing:
            b.mul_(1 - rows.label_smoothing).add_(rows.label_smoothing / b.shape[1])
        if weight is not None:
            b.mul_(per_class(weight, b))
        return Dense(b, b.sum(1, keepdim=True))

    def dot(self, b: Tensor, t: Tensor) -> Tensor:
        """sum_c b_c * t_c, (n, 1, *S)"""
        return torch.mul(b, t, out=self._buffer("product", t, t.dtype)).sum(1, keepdim=True)

    def _buffer(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Contiguous memory of a chunk's shape."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(like.shape, dtype=dtype, device=like.device)
        return sized(self._buffers[name], like)


def computed_in(x: Tensor, target: Tensor) -> torch.dtype:
    """float64 if either is, else float32."""
    return torch.float64 if torch.float64 in (x.dtype, target.dtype) else torch.float32


def scores(x: Tensor, target: Tensor, softcap: float, logit_scale: float) -> Tensor:
    """z = cap * tanh(scale * x / cap), in the dtype that everything is computed in."""
    z = x.to(computed_in(x, target))
    if logit_scale != 1:
        z = z * logit_scale
    return z if softcap == 0 else (z / softcap).tanh() * softcap


def per_class(weight: Tensor, z: Tensor) -> Tensor:
    """weight (C,) in z's dtype and in the shape (1, C, 1, ...) that broadcasts over it."""
    return weight.to(z.dtype).view(1, -1, *[1] * (z.dim() - 2))
