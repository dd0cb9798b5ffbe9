"""Linear layer and softmax cross-entropy without all of the logits, in plain PyTorch on any device.

    z  = x W^T + b                                 a chunk of rows at a time, in one buffer
    dz = dloss/dz, by the operation cross_entropy  in z's own memory
    dx = dz W        dW = dz^T x        db = sum over rows of dz

The products are the library's; `kernels` is the implementation of cross_entropy that serves the
tensors, fused.kernels.cross_entropy or fused.eager.cross_entropy. Over several chunks the loss is
their sum, and what the mean divides by, `scale`, is applied to the gradients at the end: dz is then
p - onehot, which float16 holds well, as it would not hold it over the number of rows.
"""

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fused.eager import cross_entropy


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
    chunk: int  # rows at a time

    @property
    def flat_w(self) -> Tensor:
        return self.w.flatten(0, -2)

    @property
    def computed_in(self) -> torch.dtype:
        return cross_entropy.computed_in(self.x, self.target)

    def of(self, rows: Tensor) -> "Problem":
        return self._replace(x=self.x[rows], target=self.target[rows])

    def chunks(self) -> Iterator[slice]:
        """At least one, which may be empty."""
        n = self.x.shape[0]
        for start in range(0, max(n, 1), self.chunk):
            yield slice(start, min(start + self.chunk, n))


class Gradients:
    """dx, dw and db, each None where it is not wanted, a chunk of rows at a time.

    Over several chunks dw of half precision is summed in float32, and so is db always.
    """

    def __init__(self, p: Problem, wants: tuple[bool, bool, bool]) -> None:
        self._x, self._w = p.x, p.flat_w
        several = p.chunk < p.x.shape[0]
        wide = torch.float32 if several and p.w.dtype.itemsize == 2 else p.w.dtype
        self.dx = torch.empty_like(p.x) if wants[0] else None
        self.dw = torch.zeros_like(self._w, dtype=wide) if wants[1] else None
        self.db = self._w.new_zeros(len(self._w), dtype=p.computed_in) if wants[2] else None

    def add(self, rows: slice, dz: Tensor) -> None:
        """Takes dz (n, C, *S) of a chunk of rows."""
        dz = dz.view(dz.shape[0], len(self._w))
        if self.dx is not None:
            torch.mm(dz, self._w, out=self.dx[rows])
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
    stats: list[Tensor | None]  # of each chunk, what a backward of "none" needs
    gradients: Gradients | None  # for "mean" and "sum", where any are wanted
    scale: Tensor | None  # what the gradients are still to be multiplied by; None for 1


def linear_cross_entropy_fwd(
    kernels: ModuleType, p: Problem, wants: tuple[bool, bool, bool], want_extras: bool
) -> Forward:
    """The loss, and for "mean" and "sum" the gradients (of x, w, b) that are wanted.

    Memory: one chunk of logits, and the gradients. Products: one, and one for each of dx and dw. On
    the CPU rows that are ignored take no part in them; a GPU would have to be waited for to know
    how many there are, so there they do, and their gradients are 0. A class index out of range
    raises IndexError on the CPU.
    """
    kept = _kept(kernels, p)
    if kept is None:
        return _forward(kernels, p, wants, want_extras)
    done, n = _forward(kernels, p.of(kept), wants, want_extras), p.x.shape[0]
    loss, extras = done.loss, done.extras
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
    kernels: ModuleType, p: Problem, wants: tuple[bool, bool, bool], want_extras: bool
) -> Forward:
    reduced = p.reduction != "none"
    # Of one chunk cross_entropy takes the mean itself, whose factor then costs nothing; float16
    # would flush gradients over the number of rows to zero.
    whole = p.chunk >= p.x.shape[0] and p.x.dtype != torch.float16
    reduction = p.reduction if whole or not reduced else "sum"
    loss_dtype = p.loss_dtype if whole or not reduced else p.computed_in
    gradients = Gradients(p, wants) if reduced and any(wants) else None
    losses, extras, stats = [], [], []
    for rows, z in _logits(kernels, p):
        arguments = (
            z, p.target[rows], p.weight, p.ignore_index, reduction, p.label_smoothing, p.z_loss,
            p.softcap, p.logit_scale, loss_dtype, want_extras,
        )  # fmt: skip
        if gradients is None:
            loss, kept, _, extra = kernels.cross_entropy_fwd(*arguments)
            stats.append(kept)
        else:
            loss, extra, dz = kernels.cross_entropy_fwd_bwd(*arguments, inplace=True)
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
        if p.reduction == "mean":
            logits = p.x.new_empty(()).expand(p.x.shape[0], *p.w.shape[:-1])  # of that shape
            scale = cross_entropy.row_scale(logits, p.target, p.weight, p.ignore_index, p.reduction)
            assert scale is not None
            loss = loss * scale
            # A mean over no rows: gradients are 0. Over rows that weigh nothing they are NaN.
            soft = p.target.is_floating_point()
            none = scale.isinf() if soft else (p.target.long() == p.ignore_index).all()
            scale = scale.masked_fill(none, 0.0)
        loss = loss.to(p.loss_dtype)
    merged = None
    if want_extras:
        row_losses, lses, correct, predictions = zip(*extras, strict=True)
        rows_of_all = (torch.cat(row_losses), torch.cat(lses))
        merged = (*rows_of_all, torch.stack(correct).sum(), torch.cat(predictions))
    return Forward(loss, merged, stats, gradients, scale)


def linear_cross_entropy_bwd(
    kernels: ModuleType,
    dloss: Tensor,
    p: Problem,
    stats: list[Tensor | None],
    wants: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """The gradients of x, w and b for the rows' upstream gradients dloss (N, *S), of "none".

    `stats` are the forward's, of each chunk; none where `kernels` keeps none.

    The logits are computed a second time: one product more.
    """
    kept = _kept(kernels, p)
    rows_of = p if kept is None else p.of(kept)
    if kept is not None:
        dloss = dloss[kept]
    gradients = Gradients(rows_of, wants)
    for (rows, z), s in zip(
        _logits(kernels, rows_of), stats or itertools.repeat(None), strict=False
    ):
        dz, _ = kernels.cross_entropy_bwd(
            dloss[rows], z, rows_of.target[rows], p.weight, s, None, p.ignore_index,
            p.label_smoothing, p.z_loss, p.softcap, p.logit_scale, True, False, inplace=True,
        )  # fmt: skip
        gradients.add(rows, dz)
    if kept is not None:
        gradients.spread(kept, p.x.shape[0])
    return gradients.scaled(kernels, None, p)


def chunk_rows(n: int, row_bytes: int, budget: int, saved: int) -> int:
    """Rows at a time, in chunks of one size: as many as `budget` bytes of logits hold.

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


def _logits(kernels: ModuleType, p: Problem) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits (n, C, *S), each in the memory of those before."""
    w = p.flat_w
    b = None if p.b is None else p.b.reshape(-1)
    # Rows begin at multiples of 16 bytes, which a GPU's library asks for where it is to be fast.
    beyond = 0 if kernels is cross_entropy else -len(w) % (16 // w.dtype.itemsize)
    memory = p.x.new_empty(min(p.chunk, p.x.shape[0]), len(w) + beyond)[:, : len(w)]
    for rows in p.chunks():
        x, z = p.x[rows], memory[: rows.stop - rows.start]
        if b is None:
            torch.mm(x, w.T, out=z)
        else:
            torch.addmm(b, x, w.T, out=z)
        yield rows, z.view(z.shape[0], *p.w.shape[:-1])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than they are."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and torch.version.hip is None:  # ROCm's library has no such product
        if torch.__version__ >= "2.10":  # compared as versions
            torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
        else:  # that wanted `total` in the dtype of a and b
            total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += torch.mm(a, b)
