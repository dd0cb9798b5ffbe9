"""Softmax cross-entropy in plain PyTorch, with the functions of fused.kernels.cross_entropy.

The mathematics is written there. Losses and gradients come from powers of two and their sum over a
row; nothing but the arguments is kept between forward and backward. Rows come in chunks:
fused.eager.cross_entropy_rows.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.eager.cross_entropy_rows import (
    LOG2_E,
    Dense,
    Powers,
    Rows,
    Scratch,
    computed_in,
    per_class,
    scores,
)
from fused.eager.layout import View

# Above this -log p_y is taken from p_y, below it from the exponent.
_LEAST_P = 2.0**-10
_MASKED = 2**24  # elements whose zeros are looked for at a time: their mask takes memory

# Of each row the loss and, if wanted, the lse, whether its prediction is right, and that.
_RowLosses = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class _Parts(NamedTuple):
    """What the losses are made of, each (n, 1, *S), of the rows of a chunk or of all.

    b is the target, or the weights of the classes where class indices are smoothed.
    """

    sums: Tensor  # of the powers
    t_y: Any  # the exponent at the class; None for probabilities
    b_sum: Any  # sum_c b_c; None for class indices, for which it is one number
    b_t: Any  # sum_c b_c * t_c; None for class indices that are not smoothed
    lse: Any  # None where it is not wanted


def cross_entropy_fwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    loss_dtype: torch.dtype,
    want_extras: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...] | None]:
    """The loss of logits x (N, C, *S), and what its backward needs.

    target is (N, *S) class indices, or probabilities shaped as x; weight (C,); a softcap of 0 is
    none. Returns (loss, stats, scale, extras): loss as `reduction` says, in `loss_dtype`; stats is
    None here; scale is the factor of every row in the mean or sum, one number, None for "none";
    extras, if wanted, the loss and the lse of each row (N, *S), one int64, how many rows have their
    largest score at their target, and the class of each row's largest score (N, *S), the first of
    several, -1 where the row is ignored. An index outside [0, C) that is not `ignore_index` raises
    IndexError on the CPU; elsewhere, where looking would stall the device, its loss is NaN.
    """
    numbers = (label_smoothing, z_loss, softcap, logit_scale)
    view = View.of(x, target)
    with index_errors(target, x.shape[1], ignore_index):
        rows = Rows.of(view(x), view(target), weight, ignore_index, *numbers)
        scale = _scale(rows, reduction)
        losses = _forward(rows, None, None, loss_dtype, want_extras)
    loss, extras = _reduced(losses, view, scale, loss_dtype)
    return loss, None, scale, extras


def cross_entropy_fwd_bwd(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    loss_dtype: torch.dtype,
    want_extras: bool,
    inplace: bool,
    divisor: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor]:
    """The loss of `cross_entropy_fwd`, "mean" or "sum", and its gradient: (loss, extras, dx).

    dx is in x's dtype and memory format, or in x's own memory if `inplace`. A `divisor`, one
    number, divides both, for "sum" as for "mean", which then does not count.
    """
    numbers = (label_smoothing, z_loss, softcap, logit_scale)
    dx = x if inplace else torch.empty_like(x)
    view = View.of(x, target, dx)
    if inplace and x.is_cpu and not target.is_floating_point():  # before anything is overwritten
        raise_if_outside(target, x.shape[1], ignore_index)
    with index_errors(target, x.shape[1], ignore_index):
        rows = Rows.of(view(x), view(target), weight, ignore_index, *numbers)
        scale = _scale(rows, reduction) if divisor is None else _one_over(divisor)
        losses = _forward(rows, scale, view(dx), loss_dtype, want_extras)
    loss, extras = _reduced(losses, view, scale, loss_dtype)
    return loss, extras, dx


def cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    want_dx: bool,
    want_dtarget: bool,
    inplace: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients (dx, dtarget) of the loss, each None where it is not wanted.

    dloss is the upstream gradient, (N, *S) or one number; scale is what `cross_entropy_fwd`
    returned. dx is in x's dtype, in x's own memory if `inplace`; dtarget, of probabilities, in
    their dtype.
    """
    assert stats is None, "stats belong to the Triton kernels"
    numbers = (label_smoothing, z_loss, softcap, logit_scale)
    dx = None if not want_dx else x if inplace else torch.empty_like(x)
    dtarget = torch.empty_like(target) if want_dtarget else None
    view = View.of(x, target, dx, dtarget)
    rows = Rows.of(view(x), view(target), weight, ignore_index, *numbers)
    factor = view(dloss).to(rows.computed_in)
    factor = factor if scale is None else factor * scale
    factor = factor.unsqueeze(1) if factor.dim() else factor
    scratch = Scratch(rows, *([] if dtarget is None else [dtarget.dtype]))
    for chunk, f, f_dx, own_dx, own_dtarget in rows.chunks(
        factor, rows.factors(factor), view(dx), view(dtarget)
    ):
        z = scratch.scores(chunk)
        if own_dtarget is not None:
            dt = torch.log_softmax(z, dim=1).mul_((label_smoothing - 1) * f)
            own_dtarget.copy_(dt if weight is None else dt.mul_(per_class(weight, z)))
        if own_dx is not None:
            powers, _ = scratch.powers(z, chunk, own_dx, lambda t: None)
            _gradient(powers, z, chunk, scratch.dense(chunk), f_dx, own_dx)
    return dx, dtarget


def cross_entropy_scale(dx: Tensor, dloss: Tensor) -> Tensor:
    """dx, in its own memory, times dloss, one number; what is 0, as an ignored row is, stays so
    where dloss is inf or NaN."""
    factor = dloss.item() if dx.is_cpu else math.nan  # elsewhere nobody may look
    if factor == 1:
        return dx
    if math.isfinite(factor):
        return dx.mul_(dloss)
    for part in dx.split(max(1, _MASKED * len(dx) // max(1, dx.numel()))):
        zero = part == 0
        part.mul_(dloss).masked_fill_(zero, 0.0)
    return dx


def row_scale(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor | None:
    """The factor of every row in the mean or sum, one number; of x only shape and dtype count."""
    return _scale(Rows.of(x, target, weight, ignore_index, 0.0, 0.0, 0.0, 1.0), reduction)


def _scale(rows: Rows, reduction: str) -> Tensor | None:
    x, target, labels, weight = rows[:4]
    if reduction == "none":
        return None
    dtype = computed_in(x, target)
    if reduction == "sum" or labels is None or (weight is None and labels.ignored is None):
        n = 1 if reduction == "sum" else x.numel() // max(1, x.shape[1])
        return torch.full((), 1 / n if n else float("inf"), dtype=dtype, device=x.device)
    if weight is not None:
        w_y = weight.to(dtype)[labels.classes.squeeze(1)]
        total = (w_y if labels.ignored is None else w_y.masked_fill(labels.ignored, 0.0)).sum()
        return _one_over(total)
    assert labels.ignored is not None
    return labels.ignored.logical_not().sum().to(dtype).reciprocal()


def _one_over(total: Tensor) -> Tensor:
    """NaN of a total weight of 0, also where the losses are not 0."""
    return total.reciprocal().masked_fill_(total == 0, float("nan"))


def _forward(
    rows: Rows,
    scale: Tensor | None,
    dx: Tensor | None,
    loss_dtype: torch.dtype,
    want_extras: bool,
) -> _RowLosses:
    """Of each row the loss and what is wanted besides; the gradient, times `scale`, in dx."""
    factors = None if scale is None else rows.factors(scale)
    want_lse = bool(rows.z_loss) or want_extras
    scratch = Scratch(rows, loss_dtype)
    parts, predicted = [], []
    for chunk, factor, own_dx in rows.chunks(factors, dx):
        z = scratch.scores(chunk)
        if want_extras:  # before z is gone
            predicted.append(_predicted(z, chunk))
        dense = scratch.dense(chunk)
        powers, terms = scratch.powers(z, chunk, own_dx, partial(_terms, scratch, chunk, dense))
        parts.append(_Parts(powers.sums, *terms, powers.lse if want_lse else None))
        if own_dx is not None:
            _gradient(powers, z, chunk, dense, factor, own_dx)
    # Once for all rows: an operation on a chunk's rows takes longer than its arithmetic.
    of_all = _Parts(*map(rows.joined, zip(*parts, strict=True)))
    losses = _losses(of_all, rows).squeeze(1)
    if not want_extras:
        return losses, None, None, None
    lse = of_all.lse.squeeze(1)
    if rows.labels is not None and rows.labels.ignored is not None:
        lse = lse.masked_fill_(rows.labels.ignored, 0.0)
    hits, predictions = map(rows.joined, zip(*predicted, strict=True))
    return losses, lse, hits, predictions


def _terms(
    scratch: Scratch, rows: Rows, dense: Dense | None, t: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(t_y, b_sum, b_t) of a chunk's exponents: see _Parts."""
    labels, weight = rows.labels, rows.weight
    if dense is not None:
        return None, dense.sums, scratch.dot(dense.b, t)
    assert labels is not None
    t_y = t.gather(1, labels.classes)
    if not rows.label_smoothing:
        return t_y, None, None
    if weight is None:
        return t_y, None, t.sum(1, keepdim=True)
    return t_y, None, scratch.dot(per_class(weight, t), t)


def _predicted(z: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Which rows (n, *S) of a chunk have their largest score at their target, and where it is."""
    labels, prediction = rows.labels, z.argmax(1)
    hit = prediction == (rows.target.argmax(1) if labels is None else rows.target)
    if labels is None or labels.ignored is None:
        return hit, prediction
    return hit.logical_and_(~labels.ignored), prediction.masked_fill_(labels.ignored, -1)


def _losses(parts: _Parts, rows: Rows) -> Tensor:
    """The losses of all rows, (N, 1, *S)."""
    labels, weight, label_smoothing = rows.labels, rows.weight, rows.label_smoothing
    log_sums = parts.sums.log()
    if labels is None:
        loss = log_sums * parts.b_sum - parts.b_t
    else:
        # Near 1 p_y is the more exact, and it vanishes where the difference is large.
        p_y = (parts.t_y * LOG2_E).exp2_().div_(parts.sums)
        loss = torch.where(p_y > _LEAST_P, p_y.log().neg_(), log_sums - parts.t_y)
        w = None if weight is None else weight.to(loss.dtype)
        if w is not None:
            loss *= w[labels.classes]
        if label_smoothing:
            share = label_smoothing / rows.x.shape[1]
            total = rows.x.shape[1] if w is None else w.sum()
            loss = (1 - label_smoothing) * loss + share * (log_sums * total - parts.b_t)
    if rows.z_loss:
        loss = loss + rows.z_loss * parts.lse.square()
    if labels is None:
        return loss
    if labels.outside is not None:
        loss = loss.masked_fill_(labels.outside.unsqueeze(1), float("nan"))
    return loss if labels.ignored is None else loss.masked_fill_(labels.ignored.unsqueeze(1), 0.0)


def _gradient(
    powers: Powers, z: Tensor, rows: Rows, dense: Dense | None, factor: Tensor, out: Tensor
) -> None:
    """out = (a * p - b) * dz/dx, over the powers, times rows.factors.

    Of class indices alone it is p - onehot: one pass for e - sums * onehot, at few places, and one
    for its factor.
    """
    e, sums, shift = powers
    labels = rows.labels
    if labels is not None and rows.of_class_alone:
        own = e.gather(1, labels.classes)
        e.scatter_(1, labels.classes, own.sub_(sums))
        factor = factor / sums
    else:
        _subtract(powers, rows, dense)
    if rows.softcap:
        # 1 - (z / cap)^2, over z, which is not needed any more
        e.mul_(z.div_(rows.softcap).square_().neg_().add_(1))
    gradient = torch.mul(e, factor, out=out if out.dtype == e.dtype else e)
    # A row that is ignored has the factor 0, which is enough where everything is finite: p is where
    # no shift was needed, which is known on the CPU alone.
    if labels is not None and labels.ignored is not None:
        w = None if rows.of_class_alone else rows.weight
        if shift is not None or (w is not None and not w.isfinite().all()):
            _clear(gradient, labels.ignored)
    if gradient is not out:
        out.copy_(gradient)


def _subtract(powers: Powers, rows: Rows, dense: Dense | None) -> None:
    """e = a * p - b of a p = e / sums"""
    e, sums, _ = powers
    labels, weight, label_smoothing = rows.labels, rows.weight, rows.label_smoothing
    b = b_y = None
    if dense is not None:
        b, a = dense
    else:
        assert labels is not None
        a = b_y = e.new_full((1,), 1 - label_smoothing)
        if weight is not None:
            a = b_y = b_y * _pick(per_class(weight, e), labels.classes).unsqueeze(1)
        if label_smoothing:
            b = torch.full_like(e[:1], label_smoothing / e.shape[1])
            b = b if weight is None else b * per_class(weight, e)
            a = a + b.sum(1, keepdim=True)
    if rows.z_loss:
        a = a + 2 * rows.z_loss * powers.lse
    e.mul_(a / sums)
    if b is not None:
        e.sub_(b)
    if labels is not None and b_y is not None:
        e.scatter_add_(1, labels.classes, (-b_y).expand_as(labels.classes))


def _clear(e: Tensor, rows: Tensor) -> None:
    """Writes 0 to the rows of e (n, C, *S) where `rows` (n, *S) is true."""
    if e.is_cpu and e.dim() == 2:  # masked_fill_ takes as long there as the softmax
        e.index_fill_(0, rows.nonzero().squeeze(1), 0.0)
    else:  # elsewhere nobody may look
        e.masked_fill_(rows.unsqueeze(1), 0.0)


def _reduced(
    losses: _RowLosses,
    view: View,
    scale: Tensor | None,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """(loss, extras) of what is known of the rows, which are seen so."""
    rows, lse, hit, prediction = losses
    extras = None
    if lse is not None and hit is not None and prediction is not None:
        row_loss = rows if scale is not None else rows.to(loss_dtype, copy=True)
        extras = (view.back(row_loss), view.back(lse), hit.sum(), view.back(prediction))
    if scale is None:
        return view.back(rows).to(loss_dtype), extras
    return (rows.sum() * scale).to(loss_dtype), extras


def cross_entropy_stats(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    want_extras: bool,
) -> Tensor:
    """What the backward of fused.kernels.cross_entropy takes, (3 or 4, rows): m, s and a of a row.

    It takes memory of x's size: for where that backward may follow the forward of this file.
    """
    z = scores(x, target, softcap, logit_scale)
    m = z.amax(1)
    s = (z - m.unsqueeze(1)).exp_().sum(1)
    w = z.new_ones(x.shape[1]) if weight is None else weight.to(z.dtype)
    if target.shape == x.shape:
        own = (per_class(w, z) * target).sum(1)
    else:
        y = target.long()
        own = w[torch.where((y >= 0) & (y < len(w)), y, 0)]
    a = (1 - label_smoothing) * own + label_smoothing * w.mean()
    a = a + 2 * z_loss * (m + s.log())
    return torch.stack([m, s, a, torch.zeros_like(a)][: 4 if want_extras else 3]).flatten(1)


def cross_entropy_dweight(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """dw_c = sum over rows of dloss * ((1 - e) * t_c + e / C) * (lse - z_c), t probabilities.

    (C,) in weight's dtype. It takes memory of x's size; no kernel of its own, as hardly anybody
    trains class weights.
    """
    factor = dloss.unsqueeze(1) if dloss.dim() else dloss
    if reduction == "mean":
        factor = factor * (x.shape[1] / max(1, x.numel()))
    z = scores(x, target, softcap, logit_scale)
    t = target.to(z.dtype) * (1 - label_smoothing) + label_smoothing / x.shape[1]
    terms = t * torch.log_softmax(z, dim=1)
    return -(terms * factor).transpose(0, 1).flatten(1).sum(1).to(weight.dtype)


def cross_entropy_composed(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    loss_dtype: torch.dtype,
    want_extras: bool,
) -> tuple[Tensor, ...]:
    """The same loss, and extras, from operations that torch can differentiate any number of times.

    For derivatives of higher order and for torch.func; the arguments are `cross_entropy_fwd`'s.
    """
    soft = target.shape == x.shape
    z = scores(x, target, softcap, logit_scale)
    index = target.to(z.dtype) if soft else target.long()
    w = None if weight is None else weight.to(z.dtype)
    rows = F.cross_entropy(
        z, index, w, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if z_loss or want_extras:  # torch 2.9 has it not of DTensors
        lse = torch.logsumexp(z, 1)
    counted = torch.ones_like(rows, dtype=torch.bool) if soft else index != ignore_index
    if z_loss:
        rows = rows + torch.where(counted, z_loss * lse.square(), 0.0)
    loss = rows if reduction == "none" else rows.sum()
    if reduction == "mean":
        parts = counted.to(z.dtype)
        if w is not None and not soft:
            parts = parts * w[torch.where(counted, index, 0)]
        loss = loss / parts.sum()
    loss = loss.to(loss_dtype)
    if not want_extras:
        return (loss,)
    best = z.argmax(1)
    hit = counted & (best == (index.argmax(1) if soft else index))
    row_loss = rows.to(loss_dtype, copy=True) if reduction == "none" else rows
    lse, prediction = torch.where(counted, lse, 0.0), torch.where(counted, best, -1)
    return loss, row_loss.detach(), lse.detach(), hit.sum(), prediction


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values (N or 1, C, ...) of each row's own class: (N, *S)."""
    return values.expand(*index.shape[:1], -1, *index.shape[2:]).gather(1, index).squeeze(1)


@contextlib.contextmanager
def index_errors(target: Tensor, n_classes: int, ignore_index: int) -> Iterator[None]:
    """Says which class index it was, where something fails because of one."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if is_of_an_index(error) and not target.is_floating_point():
            raise_if_outside(target, n_classes, ignore_index)
        raise


def is_of_an_index(error: Exception) -> bool:
    """Whether torch may have raised it for a class index: looking calls operations, at which what
    stopped the call (checkpointing does, once it has what it needs) may take offence."""
    return "out of bounds" in str(error)


def raise_if_outside(target: Tensor, n_classes: int, ignore_index: int) -> None:
    index = target.long()
    outside = ((index < 0) | (index >= n_classes)) & (index != ignore_index)
    if outside.any():
        row = outside.nonzero()[0].tolist()
        raise IndexError(
            f"cross_entropy: expected target in [0, {n_classes}) or ignore_index={ignore_index}, "
            f"got {int(target[tuple(row)])} at row {row[0] if len(row) == 1 else tuple(row)}"
        )
