"""Softmax cross-entropy in plain PyTorch, with the functions of fused.kernels.cross_entropy.

The mathematics is written there. Here lse - z_c is -log_softmax(z)_c and p is softmax(z): both are
native and take one pass, so nothing but the arguments is kept between forward and backward.

On the CPU the rows are taken in chunks that stay in its cache. The logits are read from memory once
and their gradient is written once; what is in between never leaves the cache. On other devices
(there are some without Triton) everything is one chunk.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a chunk: 2 MB of float32. Of 0.25 to 4 MB, 1 to 2 were fastest; smaller ones are
# Python's overhead, larger ones leave the cache.
_CHUNK = 2**19
# Up to so many elements torch's several passes stay in the cache as well, and take fewer calls.
SMALL = 2**18
_LOG2_E = math.log2(math.e)
# Below this the probability of a target has lost digits, or everything, to underflow.
_TINY = 1e-30


class _Labels(NamedTuple):
    """Class indices, looked at once a call."""

    classes: Tensor  # to gather by, (N, 1, *S); 0 for a row that has none
    ignored: Tensor | None  # which rows are, (N, *S); None where it is known that none is
    outside: Tensor | None  # which are out of range; None on the CPU, where gather refuses them


class _Rows(NamedTuple):
    """Rows of logits, and the numbers of a call that concern a row."""

    x: Tensor
    target: Tensor
    labels: _Labels | None  # None for probabilities
    weight: Tensor | None
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float

    def chunks(self) -> Iterator[tuple[slice, "_Rows"]]:
        """Slices of rows, and those: at least one, of everything where x is not on the CPU."""
        n, size = max(1, self.x.shape[0]), max(1, self.x.numel())
        step = max(1, _CHUNK * n // size) if self.x.is_cpu else n
        for i in range(0, n, step):
            part, labels = slice(i, i + step), self.labels
            if labels is not None:
                classes, ignored, outside = labels
                labels = _Labels(
                    classes[part],
                    None if ignored is None else ignored[part],
                    None if outside is None else outside[part],
                )
            yield part, self._replace(x=self.x[part], target=self.target[part], labels=labels)


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
    rows = _rows(x, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    with _index_errors(target, x.shape[1], ignore_index):
        scale = _scale(rows, reduction)
        outputs = [_losses(chunk, want_extras) for _, chunk in rows.chunks()]
    loss, extras = _reduced(outputs, reduction, scale, loss_dtype)
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
    rows = _rows(x, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    dx = x if inplace else torch.empty_like(x)
    # The loss is in what the gradient takes anyway: its softmax. Not where more is asked, nor where
    # nobody may look whether a probability has underflowed.
    plain = x.is_cpu and not (rows.labels is None or label_smoothing or z_loss or want_extras)
    scratch, outputs = _Scratch(), []
    with _index_errors(target, x.shape[1], ignore_index):
        scale = _scale(rows, reduction)
        assert scale is not None
        for part, chunk in rows.chunks():
            losses = None if plain else _losses(chunk, want_extras)
            z = scratch.scores(chunk)
            p = scratch.softmax(z, chunk, dx[part])
            if losses is None:
                losses = _losses_from(p, chunk), None, None
            outputs.append(losses)
            _gradient_from(p, z, chunk, scale, dx[part])
    loss, extras = _reduced(outputs, reduction, scale, loss_dtype)
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
    rows = _rows(x, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    factor = dloss.to(computed_in(x, target))
    factor = factor if scale is None else factor * scale
    dx = None if not want_dx else x if inplace else torch.empty_like(x)
    dtarget = torch.empty_like(target) if want_dtarget else None
    scratch = _Scratch()
    for part, chunk in rows.chunks():
        z = scratch.scores(chunk)
        f = factor[part].unsqueeze(1) if factor.dim() else factor
        if dtarget is not None:
            dt = torch.log_softmax(z, dim=1).mul_((label_smoothing - 1) * f)
            dtarget[part] = dt if weight is None else dt.mul_(_per_class(weight, z))
        if dx is not None:
            p = scratch.softmax(z, chunk, dx[part])
            _gradient_from(p, z, chunk, f, dx[part])
    return dx, dtarget


def cross_entropy_scale(dx: Tensor, dloss: Tensor) -> Tensor:
    """dx, in its own memory, times dloss, one number."""
    if dx.is_cpu and dloss.item() == 1:  # elsewhere nobody may look
        return dx
    return dx.mul_(dloss)


def cross_entropy_small(
    x: Tensor, target: Tensor, ignore_index: int, reduction: str, loss_dtype: torch.dtype
) -> Tensor:
    """The loss of logits (N, C, *S) and class indices by torch's own function, in float32.

    For autograd to differentiate.
    """
    if x.dtype != torch.float32:
        x = x.float()
    try:
        loss = F.cross_entropy(x, target, ignore_index=ignore_index, reduction=reduction)
    except IndexError:
        raise_if_outside(target, x.shape[1], ignore_index)
        raise
    return loss if loss_dtype == torch.float32 else loss.to(loss_dtype)


def _rows(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, *numbers: float
) -> _Rows:
    soft = target.shape == x.shape
    labels = None if soft else _labels(target, x.shape[1], ignore_index)
    return _Rows(x, target, labels, weight, *numbers)


class _Scratch:
    """Memory of a chunk's size, taken once a call: fresh pages cost more than what is done here."""

    def __init__(self) -> None:
        self._z: Tensor | None = None
        self._p: Tensor | None = None

    def scores(self, rows: _Rows) -> Tensor:
        """`scores` of a chunk: its own logits where there is nothing to compute."""
        x, dtype = rows.x, computed_in(rows.x, rows.target)
        if x.dtype == dtype and rows.softcap == 0 and rows.logit_scale == 1:
            return x
        if self._z is None:
            self._z = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        z = self._z[: x.shape[0]].copy_(x)
        if rows.logit_scale != 1:
            z.mul_(rows.logit_scale)
        return z if rows.softcap == 0 else z.div_(rows.softcap).tanh_().mul_(rows.softcap)

    def softmax(self, z: Tensor, rows: _Rows, out: Tensor) -> Tensor:
        """softmax(z), never over the logits: in `out` if it fits, else over z if that is free."""
        if z.dtype == out.dtype and out.is_contiguous() and z.data_ptr() != out.data_ptr():
            p = out
        elif z.data_ptr() != rows.x.data_ptr() and not (rows.softcap or rows.z_loss):
            if rows.x.dtype.itemsize == 2:
                return _softmax_(z)
            p = z
        else:
            if self._p is None:
                self._p = torch.empty_like(z, memory_format=torch.contiguous_format)
            p = self._p[: z.shape[0]]
        return torch.softmax(z, dim=1, out=p)


def _softmax_(z: Tensor) -> Tensor:
    """softmax(z) over z, exact to about 1e-7 times what z falls below its row's maximum.

    That is nothing to half precision, and 2^z takes torch a third of the time of e^z.
    """
    z.sub_(z.amax(1, keepdim=True)).mul_(_LOG2_E).exp2_()
    return z.mul_(z.sum(1, keepdim=True).reciprocal_())


def computed_in(x: Tensor, target: Tensor) -> torch.dtype:
    """float64 if either is, else float32."""
    return torch.float64 if torch.float64 in (x.dtype, target.dtype) else torch.float32


def row_scale(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor | None:
    """The factor of every row in the mean or sum, one number; of x only shape and dtype count."""
    return _scale(_rows(x, target, weight, ignore_index, 0.0, 0.0, 0.0, 1.0), reduction)


def _scale(rows: _Rows, reduction: str) -> Tensor | None:
    x, target, labels, weight = rows[:4]
    if reduction == "none":
        return None
    one = torch.ones((), dtype=computed_in(x, target), device=x.device)
    if reduction == "sum":
        return one
    if labels is None:
        return one / (x.numel() // max(1, x.shape[1]))
    if weight is not None:
        w_y = weight.to(one.dtype)[labels.classes.squeeze(1)]
        return one / (w_y if labels.ignored is None else w_y.masked_fill(labels.ignored, 0.0)).sum()
    if labels.ignored is None:
        return one / labels.classes.numel()
    return one / labels.ignored.logical_not().sum()


def _losses(rows: _Rows, want_extras: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss and, if wanted, lse of each row (N, *S), and whether its prediction is right."""
    x, target, labels, weight, label_smoothing, z_loss, softcap, logit_scale = rows
    z = scores(x, target, softcap, logit_scale)
    logp = torch.log_softmax(z, dim=1)
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


def _losses_from(p: Tensor, rows: _Rows) -> Tensor:
    """Loss of each row (N, *S), of class indices on the CPU, from its softmax p."""
    labels = rows.labels
    assert labels is not None
    p_y = _pick(p, labels.classes)
    lost = p_y < _TINY
    loss = p_y.log_().neg_()
    if lost.any():
        x, y = rows.x.movedim(1, -1)[lost], labels.classes.movedim(1, -1)[lost]
        z = scores(x, rows.target, rows.softcap, rows.logit_scale)
        loss[lost] = _pick(torch.log_softmax(z, dim=1), y).neg_()
    if rows.weight is not None:
        loss *= _pick(_per_class(rows.weight, p), labels.classes)
    return loss if labels.ignored is None else loss.masked_fill_(labels.ignored, 0.0)


def _gradient_from(p: Tensor, z: Tensor, rows: _Rows, factor: Tensor, out: Tensor) -> None:
    """out = (a * p - b) * factor * dz/dx, of p = softmax(z), whose memory is used."""
    x, target, labels, weight, label_smoothing, z_loss, softcap, logit_scale = rows
    a: Tensor | None = None  # sum_c b_c + 2 * z_loss * lse; None for 1
    if labels is None:
        b = _dense_target(target, z, weight, label_smoothing)
        a = b.sum(1, keepdim=True)
    else:
        b_y = z.new_full([1] * z.dim(), 1 - label_smoothing)
        if weight is not None:
            b_y = b_y * _pick(_per_class(weight, z), labels.classes).unsqueeze(1)
        if weight is not None or label_smoothing > 0:
            a = b_y
        if label_smoothing > 0:
            share = torch.full_like(z[:1], label_smoothing / x.shape[1])
            b = share if weight is None else share * _per_class(weight, z)
            a = b_y + b.sum(1, keepdim=True)
    if z_loss:
        a = (1 if a is None else a) + 2 * z_loss * torch.logsumexp(z, 1, keepdim=True)
    if a is not None:
        p.mul_(a)
    if labels is None or label_smoothing > 0:
        p.sub_(b)
    if labels is not None:
        p.scatter_add_(1, labels.classes, (-b_y).expand_as(labels.classes))
        if labels.outside is not None:
            nan = torch.where(labels.outside, float("nan"), 1.0).to(p.dtype)
            factor = factor * nan.unsqueeze(1)
    if logit_scale != 1:
        factor = factor * logit_scale
    if softcap:
        p.mul_(1 - (z / softcap).square())
    if labels is not None and labels.ignored is not None:
        p.masked_fill_(labels.ignored.unsqueeze(1), 0.0)
        # A mean over no rows has the factor infinity.
        factor = torch.where(labels.ignored.unsqueeze(1), 0.0, factor)
    if out.dtype == p.dtype:
        torch.mul(p, factor, out=out)
    else:
        out.copy_(p.mul_(factor))


def _reduced(
    outputs: list[tuple[Tensor, Tensor | None, Tensor | None]],
    reduction: str,
    scale: Tensor | None,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """(loss, extras) of the chunks' losses, lse and hits."""

    def joined(tensors: tuple[Any, ...]) -> Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    losses, lses, hits = zip(*outputs, strict=True)
    rows, extras = joined(losses), None
    if lses[0] is not None:
        row_loss = rows if scale is not None else rows.to(loss_dtype, copy=True)
        extras = (row_loss, joined(lses), joined(hits).sum())
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


def scores(x: Tensor, target: Tensor, softcap: float, logit_scale: float) -> Tensor:
    """z = cap * tanh(scale * x / cap), in the dtype that everything is computed in."""
    z = x.to(computed_in(x, target))
    if logit_scale != 1:
        z = z * logit_scale
    return z if softcap == 0 else (z / softcap).tanh() * softcap


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


def _labels(target: Tensor, n_classes: int, ignore_index: int) -> _Labels:
    index = target.long()  # before the comparison: as a uint8, -100 would be 156
    ignored = index == ignore_index
    if target.is_cpu:
        if not ignored.any():  # elsewhere nobody may look
            return _Labels(index.unsqueeze(1), None, None)
        return _Labels(index.masked_fill(ignored, 0).unsqueeze(1), ignored, None)
    index = index.masked_fill(ignored, 0)
    outside = (index < 0) | (index >= n_classes)
    return _Labels(index.masked_fill_(outside, 0).unsqueeze(1), ignored, outside)


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
