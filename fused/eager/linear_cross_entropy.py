"""Linear layer and softmax cross-entropy without all of the logits, in plain PyTorch on any device.

    z  = x W^T + b                                 a chunk of rows at a time, in one buffer
    dz = dloss/dz, by the operation cross_entropy  in z's own memory
    dx = dz W        dW = dz^T x        db = sum over rows of dz

The products are the library's; `kernels` is the implementation of cross_entropy that serves the
tensors, fused.kernels.cross_entropy or fused.eager.cross_entropy. Over several chunks the loss is
their sum, and what the mean divides by, `scale`, is applied to the gradients at the end. float16 is
narrow: there dz is formed in a `unit` in which it fits, whatever the class weights and logit_scale
are and however many rows there are. The sums of so large a dz it may not hold: they are float32
until they are scaled.
"""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fused.eager import cross_entropy
from fused.transforms import unless_false


class Problem(NamedTuple):
    """The tensors and numbers of a call; x (N, D), w (C, *S, D), b (C, *S)."""

    x: Tensor
    w: Tensor
    b: Tensor | None
    target: Tensor  # (N, *S) class indices, or (N, C, *S) probabilities
    weight: Tensor | None  # (C,)
    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float
    loss_dtype: torch.dtype
    budget: int  # bytes that a chunk of logits may take

    @property
    def flat_w(self) -> Tensor:
        return self.w.flatten(0, -2)

    @property
    def computed_in(self) -> torch.dtype:
        return cross_entropy.computed_in(self.x, self.target)

    def of(self, rows: Tensor) -> "Problem":
        return self._replace(x=self.x[rows], target=self.target[rows])

    def unit(self) -> Tensor:
        """A power of two, one number: over it no dz is above 2^15, which float16 holds, and the
        largest that there may be is not far below.

        |dz_c| = |logit_scale| * |a p_c - b_c|, of which |a| and |b_c| are at most the class weights
        times the row's probabilities, summed, and 2 * z_loss * |lse| more. Weights and
        probabilities are looked at on their device. Rows whose class weighs less than 10^-6 of the
        largest weight of any row lose digits.
        """
        largest_z = min(65504 * abs(self.logit_scale), self.softcap or math.inf)
        beside = 2 * abs(self.z_loss) * (largest_z + math.log(max(1, self.w.shape[0])))
        scale = abs(self.logit_scale)
        largest = self._largest_b()
        if largest is None:
            bound = (2 + beside) * scale
            exponent = math.ceil(math.log2(bound)) - 15 if bound > 0 else 0
            return self.x.new_full((), 2.0 ** max(-100, exponent), dtype=self.computed_in)
        bound_of_all = (2 * largest + beside) * scale
        exponents = bound_of_all.log2().ceil().clamp(-85, 115) - 15
        return torch.where(bound_of_all > 0, exponents.exp2(), 1.0)

    def _largest_b(self) -> Tensor | None:
        """The largest sum of a row's |b_c|, one number, or a little more; None for 1."""
        soft = self.target.is_floating_point()
        if self.weight is None and not soft or self.target.numel() == 0:
            return None
        weight = self.x.new_ones((), dtype=self.computed_in)
        if self.weight is not None:
            of_classes = self.weight.to(weight.dtype).abs()
            of_classes = of_classes.masked_fill(~of_classes.isfinite(), 0.0)
            if soft or self.label_smoothing:
                weight = of_classes.amax()
            else:
                y = self.target.long()
                counted = (y != self.ignore_index) & (y >= 0) & (y < len(of_classes))
                weight = (of_classes[torch.where(counted, y, 0)] * counted).amax()
        if not soft:
            return weight
        sums = torch.linalg.vector_norm(self.target, 1, dim=1, dtype=weight.dtype)
        sums = sums.masked_fill(~sums.isfinite(), 0.0)
        return weight * sums.amax().clamp(min=1.0)

    def chunk(self, want_dw: bool) -> int:
        """Rows at a time, in a pass that forms dw or does not."""
        row_bytes, saved = _bytes(self.x, self.w, self.reduction)
        saved = saved if want_dw else 0
        return chunk_rows(self.x.shape[0], max(1, row_bytes), self.budget, saved)

    def chunks(self, want_dw: bool) -> Iterator[slice]:
        """At least one, which may be empty."""
        n, chunk = self.x.shape[0], self.chunk(want_dw)
        for start in range(0, max(n, 1), chunk):
            yield slice(start, min(start + chunk, n))


def dw_dtype(x: Tensor, w: Tensor, reduction: str, budget: int) -> torch.dtype:
    """What dw is summed in until it is scaled: float32 where half precision is too narrow, that is
    over several chunks, and for float16. Of a number of rows that only a recorded graph's run will
    tell, it is as of several."""
    row_bytes, saved = _bytes(x, w, reduction)
    several = x.shape[0] * row_bytes > budget + saved
    wide = _overflows(x, reduction) or (w.dtype.itemsize == 2 and unless_false(several))
    return torch.float32 if wide else w.dtype


def _bytes(x: Tensor, w: Tensor, reduction: str) -> tuple[int, int]:
    """Of a row of logits; and what one chunk does without, a float32 sum of dw."""
    saved = 4 * w.numel() if w.dtype.itemsize == 2 and not _overflows(x, reduction) else 0
    return math.prod(w.shape[:-1]) * x.dtype.itemsize, saved


def _overflows(x: Tensor, reduction: str) -> bool:
    """Whether x's dtype may not hold gradients that are still to be scaled."""
    return x.dtype == torch.float16 and reduction != "none"


class Gradients:
    """dx, dw and db, each None where it is not wanted, a chunk of rows at a time.

    Until `scaled` they are in float32 where their own dtype is too narrow: db always; dw as
    `dw_dtype` says; dx of float16 that is still to be multiplied by what the mean divides by or by
    an upstream gradient.
    """

    def __init__(
        self,
        p: Problem,
        wants: tuple[bool, bool, bool],
        x: Tensor,
        summed_in: torch.dtype | None = None,
    ) -> None:
        """`x` are the rows of p.x that take part; the dtypes do not depend on how many they are,
        as the compiler has to know them."""
        self._x, self._w = x, p.flat_w
        self.dx = self.dw = None
        if wants[0]:
            # Where wide it is added to, as the library has no such product alone.
            wide = _overflows(p.x, p.reduction)
            self.dx = torch.zeros_like(x, dtype=torch.float32) if wide else torch.empty_like(x)
        if wants[1]:
            summed_in = summed_in or dw_dtype(p.x, p.w, p.reduction, p.budget)
            self.dw = torch.zeros_like(self._w, dtype=summed_in)
        self.db = self._w.new_zeros(len(self._w), dtype=p.computed_in) if wants[2] else None

    def add(self, rows: slice, dz: Tensor) -> None:
        """Takes dz (n, C, *S) of a chunk of rows."""
        dz = dz.view(dz.shape[0], len(self._w))
        if self.dx is not None and self.dx.dtype == dz.dtype:
            torch.mm(dz, self._w, out=self.dx[rows])
        elif self.dx is not None:
            _add_product(self.dx[rows], dz, self._w)
        if self.dw is not None:
            _add_product(self.dw, dz.T, self._x[rows])
        if self.db is not None:
            self.db += dz.sum(0, dtype=self.db.dtype)

    def spread(self, rows: Tensor, n: int) -> None:
        """Makes the gradient of `rows` of x that of all n rows: 0 for the others."""
        if self.dx is not None:
            self.dx = _spread(self.dx, rows, n)

    def scaled(self, kernels: ModuleType, factor: Tensor | None, p: Problem) -> list[Tensor | None]:
        """The gradients times one number (None for 1), in the dtypes and shapes of x, w and b;
        their memory is taken over."""
        found: list[Tensor | None] = []
        for gradient, like in ((self.dx, p.x), (self.dw, p.w), (self.db, p.b)):
            if gradient is None or like is None:
                found.append(None)
                continue
            if factor is not None:
                gradient = kernels.cross_entropy_scale(gradient, factor)
            found.append(gradient.to(like.dtype).view(like.shape))
        return found


class Forward(NamedTuple):
    """What a forward leaves."""

    loss: Tensor  # as `reduction` says, in `loss_dtype`
    extras: tuple[Tensor, ...] | None  # as cross_entropy_fwd gives them
    stats: Tensor | None  # what a backward of "none" needs, a column for each row
    gradients: Gradients | None  # for "mean" and "sum", where any are wanted
    scale: Tensor | None  # what the gradients are still to be multiplied by; None for 1


def linear_cross_entropy_fwd(
    kernels: ModuleType,
    p: Problem,
    wants: tuple[bool, bool, bool],
    want_extras: bool,
    summed_in: torch.dtype | None = None,
) -> Forward:
    """The loss, and for "mean" and "sum" the gradients (of x, w, b) that are wanted.

    Memory: one chunk of logits, and the gradients. Products: one, and one for each of dx and dw. On
    the CPU rows that are ignored take no part in them; a GPU would have to be waited for to know
    how many there are, so there they do, and their gradients are 0. A class index out of range
    raises IndexError on the CPU. `summed_in` is what `dw_dtype` said, if it was asked before.
    """
    kept = _kept(kernels, p)
    those = p if kept is None else p.of(kept)
    formed = p.reduction != "none" and any(wants)
    gradients = Gradients(p, wants, those.x, summed_in) if formed else None
    done = _forward(kernels, those, gradients, want_extras)
    if kept is None:
        return done
    loss, extras, n = done.loss, done.extras, p.x.shape[0]
    if p.reduction == "none":
        loss = _spread(loss, kept, n)
    if extras is not None:
        row_loss, lse, correct, prediction = extras
        rows = (_spread(row_loss, kept, n), _spread(lse, kept, n))
        extras = (*rows, correct, _spread(prediction, kept, n, of_others=-1))
    if done.gradients is not None:
        done.gradients.spread(kept, n)
    return done._replace(loss=loss, extras=extras)


def _forward(
    kernels: ModuleType, p: Problem, gradients: Gradients | None, want_extras: bool
) -> Forward:
    reduced = p.reduction != "none"
    want_dw = gradients is not None and gradients.dw is not None
    # Of one chunk cross_entropy takes the mean itself, whose factor then costs nothing; float16
    # would flush gradients over the number of rows to zero.
    whole = p.chunk(want_dw) >= p.x.shape[0] and p.x.dtype != torch.float16
    reduction = p.reduction if whole or not reduced else "sum"
    loss_dtype = p.loss_dtype if whole or not reduced else p.computed_in
    mean, divisor = (None, None) if whole else _factors(p, gradients is not None)
    losses, extras, stats = [], [], []
    for rows, z in _logits(kernels, p, want_dw):
        arguments = (
            z, p.target[rows], p.weight, p.ignore_index, reduction, p.label_smoothing, p.z_loss,
            p.softcap, p.logit_scale, loss_dtype, want_extras,
        )  # fmt: skip
        if gradients is None:
            loss, own, _, extra = kernels.cross_entropy_fwd(*arguments)
            if own is not None and not reduced:
                stats.append(own)
        else:
            loss, extra, dz = kernels.cross_entropy_fwd_bwd(*arguments, True, divisor)
            gradients.add(rows, dz)
        losses.append(loss)
        extras.append(extra)
    scale = None
    if not reduced:
        loss = torch.cat(losses)
    elif whole:
        (loss,) = losses
    else:
        loss = torch.stack(losses).sum()
        for factor in (divisor, mean):
            if factor is not None:
                loss, scale = loss * factor, factor if scale is None else factor * scale
        loss = loss.to(p.loss_dtype)
    merged = None
    if want_extras:
        row_losses, lses, correct, predictions = zip(*extras, strict=True)
        rows_of_all = (torch.cat(row_losses), torch.cat(lses))
        merged = (*rows_of_all, torch.stack(correct).sum(), torch.cat(predictions))
    return Forward(loss, merged, torch.cat(stats, 1) if stats else None, gradients, scale)


def _factors(p: Problem, formed: bool) -> tuple[Tensor | None, Tensor | None]:
    """What the sums are multiplied by for the mean, and what dz, if it is `formed`, is divided by;
    each None for 1."""
    divisor = p.unit() if formed and _overflows(p.x, p.reduction) else None
    if p.reduction != "mean":
        return None, divisor
    logits = p.x.new_empty(()).expand(p.x.shape[0], *p.w.shape[:-1])  # only their shape counts
    mean = cross_entropy.row_scale(logits, p.target, p.weight, p.ignore_index, p.reduction)
    assert mean is not None
    if formed and p.weight is not None:
        # Rows that count and weigh nothing have a gradient of 0 / 0, the others 0.
        divisor = torch.where(
            mean.isnan(), 0.0, torch.ones_like(mean) if divisor is None else divisor
        )
    return mean, divisor


def linear_cross_entropy_bwd(
    kernels: ModuleType,
    dloss: Tensor,
    p: Problem,
    stats: Tensor | None,
    wants: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """The gradients of x, w and b for the rows' upstream gradients dloss (N, *S), of "none".

    `stats` are the forward's, whose chunks may have been other ones. The logits are computed a
    second time: one product more.
    """
    kept = _kept(kernels, p)
    those = p if kept is None else p.of(kept)
    if kept is not None:
        dloss = dloss[kept]
    gradients = Gradients(p, wants, those.x)
    inner = p.w.shape[1:-1].numel()
    for rows, z in _logits(kernels, those, wants[1]):
        columns = slice(rows.start * inner, rows.stop * inner)
        own = None if stats is None else stats[:, columns].contiguous()
        dz, _ = kernels.cross_entropy_bwd(
            dloss[rows], z, those.target[rows], p.weight, own, None, p.ignore_index,
            p.label_smoothing, p.z_loss, p.softcap, p.logit_scale, True, False, inplace=True,
        )  # fmt: skip
        gradients.add(rows, dz)
    if kept is not None:
        gradients.spread(kept, p.x.shape[0])
    return gradients.scaled(kernels, None, p)


def chunk_rows(n: int, row_bytes: int, budget: int, saved: int) -> int:
    """Rows at a time, in chunks of one size: as few chunks as `budget` bytes of logits allow.

    Of one size, so that each has more than half of the rows that the budget allows: a last chunk of
    few rows takes as long for w and dw, which every chunk reads and writes, as one of many.

    `saved` are bytes that one chunk of all rows does without: it is taken where it needs no more
    memory than several and their float32 sum of dw.
    """
    if n * row_bytes <= budget + saved:
        return max(n, 1)
    chunks = -(-n // max(1, budget // row_bytes))
    return -(-n // chunks)


def _kept(kernels: ModuleType, p: Problem) -> Tensor | None:
    """On the CPU, which rows are not ignored; None for all."""
    if kernels is not cross_entropy or p.x.device.type != "cpu":
        return None
    if p.target.is_floating_point() or p.w.dim() > 2:
        return None
    cross_entropy.raise_if_outside(p.target, p.w.shape[0], p.ignore_index)
    kept = (p.target.long() != p.ignore_index).nonzero().squeeze(1)
    return None if len(kept) == len(p.target) else kept


def _spread(values: Tensor, rows: Tensor, n: int, of_others: int = 0) -> Tensor:
    return values.new_full((n, *values.shape[1:]), of_others).index_copy_(0, rows, values)


def _logits(kernels: ModuleType, p: Problem, want_dw: bool) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits (n, C, *S), each in the memory of those before."""
    w = p.flat_w
    b = None if p.b is None else p.b.reshape(-1)
    # Rows begin at multiples of 16 bytes, which a GPU's library asks for where it is to be fast.
    beyond = 0 if kernels is cross_entropy else -len(w) % (16 // w.dtype.itemsize)
    n = min(p.chunk(want_dw), p.x.shape[0])
    memory = p.x.new_empty(n, len(w) + beyond)[:, : len(w)]
    for rows in p.chunks(want_dw):
        x, z = p.x[rows], memory[: rows.stop - rows.start]
        if b is None:
            torch.mm(x, w.T, out=z)
        else:
            torch.addmm(b, x, w.T, out=z)
        yield rows, z.view(z.shape[0], *p.w.shape[:-1])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than they are."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)  # torch's counter of operations leaves addmm_ out
    elif total.is_cuda and torch.version.hip is None:  # ROCm's library has no such product
        if torch.__version__ >= "2.10":  # compared as versions
            torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
        else:  # that wanted `total` in the dtype of a and b
            total += torch.mm(a, b, out_dtype=total.dtype)
    elif a.dtype == torch.float16:  # whose range the product itself may leave
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)
    else:
        total += torch.mm(a, b)
