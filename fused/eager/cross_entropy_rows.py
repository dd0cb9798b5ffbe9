"""Rows of logits in chunks that stay in the CPU's cache, and their exponentials.

    z = cap * tanh(scale * x / cap)        e_c = exp(z_c - shift)        p_c = e_c / sum_k e_k

The logits are read from memory once and their gradient is written once; what is in between is one
chunk of float32 (float64 for float64) that never leaves the cache. On other devices (there are some
without Triton) everything is one chunk.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.eager.activation import tanh_

# Elements of a chunk: 4 MB of float32. Of 0.25 to 8 MB, 4 were fastest or nearly so: a chunk takes
# some 50 us of calls, and a larger one leaves the cache.
CHUNK = 2**20
_LOG2_E = math.log2(math.e)
# Where a row's sum of exponentials is between these, none overflowed, and what vanished was below
# 1e-30 of the sum.
_LEAST_SUM, _LARGEST_SUM = 2.0**-20, 2.0**80


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

    def split(self, n: int) -> "Iterator[Labels]":
        """Parts of n rows."""
        return itertools.starmap(Labels, zip(*(_split(t, n) for t in self), strict=False))


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
        n, size = max(1, x.shape[0]), max(1, x.numel())
        if size <= CHUNK or not x.is_cpu:
            yield self, *others
            return
        step = max(1, CHUNK * n // size)
        parts = itertools.repeat(None) if labels is None else labels.split(step)
        columns = (x.split(step), target.split(step), parts, *(_split(t, step) for t in others))
        for x, target, labels, *own in zip(*columns, strict=False):
            yield Rows(x, target, labels, *self[3:]), *own

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


class Softmax(NamedTuple):
    """p = e / sums."""

    e: Tensor  # (n, C, *S)
    sums: Tensor | None  # (n, 1, *S); None for 1


class Scratch:
    """Memory of a chunk's size, taken once a call: fresh pages cost more than what is done here."""

    def __init__(self) -> None:
        self._z: Tensor | None = None
        self._p: Tensor | None = None
        self._shifts = False

    def scores(self, rows: Rows) -> Tensor:
        """`scores` of a chunk: its own logits where there is nothing to compute."""
        x, dtype = rows.x, rows.computed_in
        if x.dtype == dtype and rows.softcap == 0 and rows.logit_scale == 1:
            return x
        if self._z is None:
            self._z = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        z = _first(self._z, x.shape[0]).copy_(x)
        if rows.logit_scale != 1:
            z.mul_(rows.logit_scale)
        return z if rows.softcap == 0 else tanh_(z.div_(rows.softcap)).mul_(rows.softcap)

    def log_softmax(self, z: Tensor) -> Tensor:
        return torch.log_softmax(z, dim=1, out=self._like(z))

    def softmax(self, z: Tensor, rows: Rows, out: Tensor | None = None) -> Softmax:
        """Of z, never over the logits: in `out` if it fits, else over z if that is free."""
        z_is_free = z.data_ptr() != rows.x.data_ptr() and not (rows.softcap or rows.z_loss)
        if z_is_free and rows.x.dtype.itemsize == 2:
            return self._powers_of_2(z, rows)
        if out is not None and (
            z.dtype == out.dtype and out.is_contiguous() and z.data_ptr() != out.data_ptr()
        ):
            p = out
        else:
            p = z if z_is_free else self._like(z)
        return Softmax(torch.softmax(z, dim=1, out=p), None)

    def _powers_of_2(self, z: Tensor, rows: Rows) -> Softmax:
        """2^(z * log2(e)) over z.

        Exact to about 1e-7 times the exponent, which is nothing to half precision; 2^z takes torch
        a third of the time of e^z. The largest logit is looked for, and subtracted, only where the
        sums show that it must be: logits are seldom far from 0.
        """
        if z.is_cpu and not self._shifts:  # elsewhere nobody may look at the sums
            sums = z.mul_(_LOG2_E).exp2_().sum(1, keepdim=True)
            if torch.equal(sums, sums.clamp(_LEAST_SUM, _LARGEST_SUM)):
                return Softmax(z, sums)
            self._shifts = True
            self.scores(rows)
        largest = z.amax(1, keepdim=True)
        sums = z.sub_(largest).mul_(_LOG2_E).exp2_().sum(1, keepdim=True)
        return Softmax(z, sums)

    def _like(self, z: Tensor) -> Tensor:
        if self._p is None:
            self._p = torch.empty_like(z, memory_format=torch.contiguous_format)
        return _first(self._p, z.shape[0])


def _split(t: Tensor | None, n: int) -> Iterable[Tensor | None]:
    """Parts of n rows of what has rows; the rest again and again."""
    return itertools.repeat(t) if t is None or t.dim() == 0 else t.split(n)


def _first(t: Tensor, n: int) -> Tensor:
    return t if t.shape[0] == n else t[:n]


def computed_in(x: Tensor, target: Tensor) -> torch.dtype:
    """float64 if either is, else float32."""
    return torch.float64 if torch.float64 in (x.dtype, target.dtype) else torch.float32


def scores(x: Tensor, target: Tensor, softcap: float, logit_scale: float) -> Tensor:
    """z = cap * tanh(scale * x / cap), in the dtype that everything is computed in."""
    z = x.to(computed_in(x, target))
    if logit_scale != 1:
        z = z * logit_scale
    return z if softcap == 0 else (z / softcap).tanh() * softcap
