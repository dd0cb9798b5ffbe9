"""Softmax cross-entropy in plain PyTorch, with the functions of fused.kernels.cross_entropy.

The mathematics is written there. Here lse - z_c is -log_softmax(z)_c and p is softmax(z), which are
native and take one pass, or 2^z over its sum; nothing but the arguments is kept between forward and
backward. Rows come in chunks: fused.eager.cross_entropy_rows.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.eager.cross_entropy_rows import Rows, Scratch, Softmax, computed_in, scores

# Up to so many elements torch's several passes stay in the cache as well, and take fewer calls.
SMALL = 2**19
# Below this the probability of a target has lost digits, or everything, to underflow.
_TINY = 1e-30
_LOG_TINY = math.log(_TINY)

# Of each row the loss and, if wanted, the lse, and whether its prediction is right.
_RowLosses = tuple[Tensor, Tensor | None, Tensor | None]


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
    extras, if wanted, the loss and the lse of each row (N, *S) and, one int64, how many rows have
    their largest logit at their target. An index outside [0, C) that is not `ignore_index` raises
    IndexError on the CPU; elsewhere, where looking would stall the device, its loss is NaN.
    """
    rows = Rows.of(x, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    with _index_errors(target, x.shape[1], ignore_index):
        scale = _scale(rows, reduction)
        losses = _forward(rows, None, None, want_extras)
    loss, extras = _reduced(losses, reduction, scale, loss_dtype)
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
) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor]:
    """The loss of `cross_entropy_fwd`, "mean" or "sum", and its gradient: (loss, extras, dx).

    dx is in x's dtype and memory format, or in x's own memory if `inplace`.
    """
    rows = Rows.of(x, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    dx = x if inplace else torch.empty_like(x)
    with _index_errors(target, x.shape[1], ignore_index):
        scale = _scale(rows, reduction)
        losses = _forward(rows, scale, dx, want_extras)
    loss, extras = _reduced(losses, reduction, scale, loss_dtype)
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
    rows = Rows.of(x, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    factor = dloss.to(computed_in(x, target))
    factor = factor if scale is None else factor * scale
    factor = factor.unsqueeze(1) if factor.dim() else factor
    dx = None if not want_dx else x if inplace else torch.empty_like(x)
    dtarget = torch.empty_like(target) if want_dtarget else None
    scratch = Scratch()
    for chunk, f, f_dx, own_dx, own_dtarget in rows.chunks(
        factor, rows.factors(factor), dx, dtarget
    ):
        z = scratch.scores(chunk)
        if own_dtarget is not None:
            dt = scratch.log_softmax(z).mul_((label_smoothing - 1) * f)
            own_dtarget.copy_(dt if weight is None else dt.mul_(_per_class(weight, z)))
        if own_dx is not None:
            _gradient_from(scratch.softmax(z, chunk, own_dx), None, z, chunk, f_dx, own_dx)
    return dx, dtarget


def cross_entropy_scale(dx: Tensor, dloss: Tensor) -> Tensor:
    """dx, in its own memory, times dloss, one number."""
    if dx.is_cpu and dloss.item() == 1:  # elsewhere nobody may look
        return dx
    return dx.mul_(dloss)


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
        # NaN of a total weight of 0, as torch's mean, also where the losses are not 0.
        return total.reciprocal().masked_fill_(total == 0, float("nan"))
    assert labels.ignored is not None
    return labels.ignored.logical_not().sum().to(dtype).reciprocal()


def _forward(rows: Rows, scale: Tensor | None, dx: Tensor | None, want_extras: bool) -> _RowLosses:
    """Of each row the loss and what is wanted besides; the gradient, times `scale`, in dx."""
    # The loss is taken from the softmax, which the gradient needs anyway. Not where more is asked,
    # nor where nobody may look whether a probability has underflowed.
    plain = rows.of_class_alone and rows.x.is_cpu and not want_extras
    factors = None if scale is None else rows.factors(scale)
    scratch = Scratch()
    outputs: list[_RowLosses] = []
    for chunk, factor, own_dx in rows.chunks(factors, dx):
        z = scratch.scores(chunk)
        p = own = None
        if plain:
            p = scratch.softmax(z, chunk, own_dx)
            own = p.e.gather(1, chunk.labels.classes)
            p_y = own if p.sums is None else own / p.sums
            outputs.append((_log_p(p_y, chunk) if dx is rows.x else p_y, None, None))
        else:
            outputs.append(_losses(scratch.log_softmax(z), z, chunk, want_extras))
        if own_dx is not None:
            p = p or scratch.softmax(z, chunk, own_dx)
            _gradient_from(p, own, z, chunk, factor, own_dx)
    losses, lses, hits = (_joined(parts) for parts in zip(*outputs, strict=True))
    assert losses is not None
    if plain:
        # Once for all rows, unless their logits are overwritten: an operation on a chunk's rows
        # takes longer than its arithmetic.
        logp = losses if dx is rows.x else _log_p(losses, rows)
        losses = _weighted(logp.squeeze(1).neg_(), rows)
    return losses, lses, hits


def _joined(parts: tuple[Any, ...]) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


def _losses(logp: Tensor, z: Tensor, rows: Rows, want_extras: bool) -> _RowLosses:
    """Loss and, if wanted, lse of each row (N, *S), and whether its prediction is right."""
    x, target, labels, weight, label_smoothing, z_loss = rows[:6]
    if labels is None:
        loss = -(_dense_target(target, z, weight, label_smoothing) * logp).sum(1)
    else:
        loss = _pick(logp, labels.classes).neg_()
        if labels.outside is not None:
            loss.masked_fill_(labels.outside, float("nan"))
        if weight is not None:
            loss *= _pick(_per_class(weight, z), labels.classes)
        if label_smoothing > 0:
            share = -label_smoothing / x.shape[1]
            dense = logp if weight is None else logp * _per_class(weight, z)
            loss = (1 - label_smoothing) * loss + share * dense.sum(1)
    lse = torch.logsumexp(z, 1) if z_loss or want_extras else None
    if z_loss and lse is not None:
        loss = loss + z_loss * lse.square()
    ignored = None if labels is None else labels.ignored
    if ignored is not None:
        loss = loss.masked_fill_(ignored, 0.0)
    if not want_extras or lse is None:
        return loss, None, None
    hit = z.argmax(1) == (target.argmax(1) if labels is None else target)
    if ignored is not None:
        hit, lse = hit.logical_and_(~ignored), lse.masked_fill_(ignored, 0.0)
    return loss, lse, hit


def _log_p(p: Tensor, rows: Rows) -> Tensor:
    """log p (n, 1, *S) of p of each row's class, on the CPU."""
    logp = p.log()
    if logp.numel() and not logp.amin() >= _LOG_TINY:  # it may be NaN
        labels, lost = rows.labels, (p < _TINY).squeeze(1)
        assert labels is not None
        x, y = rows.x.movedim(1, -1)[lost], labels.classes.movedim(1, -1)[lost]
        z = scores(x, rows.target, rows.softcap, rows.logit_scale)
        logp.squeeze(1)[lost] = _pick(torch.log_softmax(z, dim=1), y)
    return logp


def _weighted(losses: Tensor, rows: Rows) -> Tensor:
    """Losses of class indices times their classes' weights, 0 where they are ignored."""
    labels = rows.labels
    assert labels is not None
    if rows.weight is not None:
        losses *= rows.weight.to(losses.dtype)[labels.classes.squeeze(1)]
    return losses if labels.ignored is None else losses.masked_fill_(labels.ignored, 0.0)


def _gradient_from(
    p: Softmax, own: Tensor | None, z: Tensor, rows: Rows, factor: Tensor, out: Tensor
) -> None:
    """out = (a * p - b) * dz/dx, of p = softmax(z), whose memory is used, times rows.factors.

    Of class indices alone it is p - onehot: one pass for e - sums * onehot, at few places, and one
    for its factor; own is e at these places, if it is known.
    """
    e, sums = p
    labels = rows.labels
    if labels is not None and rows.of_class_alone:
        own = e.gather(1, labels.classes) if own is None else own
        e.scatter_(1, labels.classes, own - (1.0 if sums is None else sums))
        factor = factor if sums is None else factor / sums
    else:
        _subtract(p, z, rows)
    if rows.softcap:
        e.mul_(1 - (z / rows.softcap).square())
    if labels is not None and labels.ignored is not None:
        _clear(e, labels.ignored)
    if out.dtype == e.dtype:
        torch.mul(e, factor, out=out)
    else:
        out.copy_(e.mul_(factor))


def _subtract(p: Softmax, z: Tensor, rows: Rows) -> None:
    """e = a * p - b of a p = e / sums"""
    e, sums = p
    x, target, labels, weight, label_smoothing, z_loss = rows[:6]
    if labels is None:
        b = _dense_target(target, z, weight, label_smoothing)
        a = b.sum(1, keepdim=True)
    else:
        a = b_y = e.new_full((1,), 1 - label_smoothing)
        if weight is not None:
            a = b_y = b_y * _pick(_per_class(weight, e), labels.classes).unsqueeze(1)
        b = torch.full_like(e[:1], label_smoothing / x.shape[1])
        b = b if weight is None else b * _per_class(weight, e)
        a = a + b.sum(1, keepdim=True)
    if z_loss:
        a = a + 2 * z_loss * torch.logsumexp(z, 1, keepdim=True)
    e.mul_(a if sums is None else a / sums).sub_(b)
    if labels is not None:
        e.scatter_add_(1, labels.classes, (-b_y).expand_as(labels.classes))


def _clear(e: Tensor, rows: Tensor) -> None:
    """Writes 0 to the rows of e (n, C, *S) where `rows` (n, *S) is true."""
    if e.is_cpu and e.dim() == 2:  # masked_fill_ takes as long there as the softmax
        e.index_fill_(0, rows.nonzero().squeeze(1), 0.0)
    else:  # elsewhere nobody may look
        e.masked_fill_(rows.unsqueeze(1), 0.0)


def _reduced(
    losses: _RowLosses,
    reduction: str,
    scale: Tensor | None,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """(loss, extras) of the rows' losses, lse and hits."""
    rows, lse, hit = losses
    extras = None
    if lse is not None and hit is not None:
        row_loss = rows if scale is not None else rows.to(loss_dtype, copy=True)
        extras = (row_loss, lse, hit.sum())
    if scale is None:
        return rows.to(loss_dtype), extras
    return (rows.sum() * scale).to(loss_dtype), extras


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
        factor = factor * (x.shape[1] / x.numel())
    z = scores(x, target, softcap, logit_scale)
    terms = _dense_target(target, z, None, label_smoothing) * torch.log_softmax(z, dim=1)
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
    hit = counted & (z.argmax(1) == (index.argmax(1) if soft else index))
    row_loss = rows.to(loss_dtype) if reduction == "none" else rows
    return loss, row_loss.detach(), torch.where(counted, lse, 0.0).detach(), hit.sum()


def _dense_target(target: Tensor, z: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """b_c = w_c * ((1 - e) * t_c + e / C)"""
    b = target.to(z.dtype)
    if smoothing > 0:
        b = b * (1 - smoothing) + smoothing / z.shape[1]
    return b if weight is None else b * _per_class(weight, z)


def _per_class(weight: Tensor, z: Tensor) -> Tensor:
    """weight (C,) in z's dtype and in the shape (1, C, 1, ...) that broadcasts over it."""
    return weight.to(z.dtype).view(1, -1, *[1] * (z.dim() - 2))


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values (N or 1, C, ...) of each row's own class: (N, *S)."""
    return values.expand(*index.shape[:1], -1, *index.shape[2:]).gather(1, index).squeeze(1)


@contextlib.contextmanager
def _index_errors(target: Tensor, n_classes: int, ignore_index: int) -> Iterator[None]:
    """Says which class index it was, where something fails because of one."""
    try:
        yield
    except (IndexError, RuntimeError):
        if not target.is_floating_point():
            raise_if_outside(target, n_classes, ignore_index)
        raise


def raise_if_outside(target: Tensor, n_classes: int, ignore_index: int) -> None:
    index = target.long()
    outside = ((index < 0) | (index >= n_classes)) & (index != ignore_index)
    if outside.any():
        row = outside.nonzero()[0].tolist()
        raise IndexError(
            f"cross_entropy: expected target in [0, {n_classes}) or ignore_index={ignore_index}, "
            f"got {int(target[tuple(row)])} at row {row[0] if len(row) == 1 else tuple(row)}"
        )
