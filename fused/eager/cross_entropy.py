"""Softmax cross-entropy in plain PyTorch, with the functions of fused.kernels.cross_entropy.

The mathematics is written there. Here lse - z_c is -log_softmax(z)_c and p is softmax(z): both are
native and take one pass, so nothing but the arguments is kept between forward and backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    z = scores(x, target, softcap, logit_scale)
    logp = torch.log_softmax(z, dim=1)
    soft = target.shape == x.shape
    if soft:
        ignored = None
        loss = -(_dense_target(target, z, weight, label_smoothing) * logp).sum(1)
        parts: Tensor | int = loss.numel()
    else:
        ignored, outside, index = _split_targets(target, x.shape[1], ignore_index)
        loss = _pick(logp, index, target, ignore_index).neg_()
        if outside is not None:
            loss.masked_fill_(outside, float("nan"))
        w_y = None if weight is None else _pick(_per_class(weight, z), index, target, ignore_index)
        if w_y is not None:
            loss *= w_y
        if label_smoothing > 0:
            share = -label_smoothing / x.shape[1]
            dense = logp if weight is None else logp * _per_class(weight, z)
            loss = (1 - label_smoothing) * loss + share * dense.sum(1)
        counted = ignored.logical_not()
        parts = counted.sum() if w_y is None else (w_y * counted).sum(dtype=loss.dtype)
    lse = torch.logsumexp(z, 1) if z_loss or want_extras else None
    if z_loss and lse is not None:
        loss = loss + z_loss * lse.square()
    if ignored is not None:
        loss = loss.masked_fill(ignored, 0.0)
    extras = None
    if want_extras and lse is not None:
        hit = z.argmax(1) == (target.argmax(1) if soft else target)
        if ignored is not None:
            hit, lse = hit & ~ignored, lse.masked_fill(ignored, 0.0)
        row_dtype = loss_dtype if reduction == "none" else loss.dtype
        extras = (loss.to(row_dtype, copy=True), lse, hit.sum())
    if reduction == "none":
        return loss.to(loss_dtype), None, None, extras
    total = loss.sum()
    scale = torch.ones_like(total) if reduction == "sum" else total.new_ones(()).div_(parts)
    return (total * scale).to(loss_dtype), None, scale, extras


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
    soft = target.shape == x.shape
    z = scores(x, target, softcap, logit_scale)
    factor = dloss.to(z.dtype) if scale is None else dloss.to(z.dtype) * scale
    factor = factor.unsqueeze(1) if factor.dim() else factor.view([1] * x.dim())
    dtarget = None
    if want_dtarget:
        dtarget = torch.log_softmax(z, dim=1).mul_((label_smoothing - 1) * factor)
        if weight is not None:
            dtarget *= _per_class(weight, z)
        dtarget = dtarget.to(target.dtype)
    if not want_dx:
        return None, dtarget

    # a * p - b, with the coefficient a = sum_c b_c + 2 * z_loss * lse
    lse = torch.logsumexp(z, 1, keepdim=True) if z_loss else None
    dz = torch.softmax(z, dim=1)
    if soft:
        ignored, outside = None, None
        b = _dense_target(target, z, weight, label_smoothing)
        a = b.sum(1, keepdim=True)
        dz.mul_(a if lse is None else a + 2 * z_loss * lse).sub_(b)
    else:
        ignored, outside, index = _split_targets(target, x.shape[1], ignore_index)
        a_y = z.new_full([1] * x.dim(), 1 - label_smoothing)
        if weight is not None:
            a_y = a_y * _pick(_per_class(weight, z), index, target, ignore_index).unsqueeze(1)
        a = a_y
        if label_smoothing > 0:
            share = label_smoothing / x.shape[1]
            b = z.new_full([1] * x.dim(), share)
            b = (
                b.expand(1, x.shape[1], *b.shape[2:])
                if weight is None
                else b * _per_class(weight, z)
            )
            a = a_y + b.sum(1, keepdim=True)
        if lse is not None:
            a = a + 2 * z_loss * lse
        if label_smoothing > 0 or weight is not None or z_loss:
            dz.mul_(a)
        if label_smoothing > 0:
            dz.sub_(b)
        dz.scatter_add_(1, index, (-a_y).expand_as(index))
    if outside is not None:
        factor = factor.masked_fill(outside.unsqueeze(1), float("nan"))
    dz.mul_(factor * logit_scale)
    if softcap:
        dz.mul_(1 - (z / softcap).square())
    if ignored is not None:
        dz.masked_fill_(ignored.unsqueeze(1), 0.0)
    return (x.copy_(dz) if inplace else dz.to(x.dtype)), dtarget


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
    wide = torch.float64 in (x.dtype, target.dtype)
    z = x.to(torch.float64 if wide else torch.float32)
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


def _pick(values: Tensor, index: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """values (N or 1, C, ...) of each row's own class: (N, *S)."""
    try:
        return values.expand(*index.shape[:1], -1, *index.shape[2:]).gather(1, index).squeeze(1)
    except (IndexError, RuntimeError):
        _raise_if_outside(target, values.shape[1], ignore_index)
        raise


def _split_targets(
    target: Tensor, n_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Which rows are ignored (N, *S), which out of range (N, *S), and indices to gather by
    (N, 1, *S).

    On the CPU gather itself refuses what is out of range, so nobody has to look: None.
    """
    index = target.long()  # before the comparison: as a uint8, -100 would be 156
    ignored = index == ignore_index
    index = index.masked_fill(ignored, 0)
    if target.device.type == "cpu":
        return ignored, None, index.unsqueeze(1)
    outside = (index < 0) | (index >= n_classes)
    return ignored, outside, index.masked_fill_(outside, 0).unsqueeze(1)


def _raise_if_outside(target: Tensor, n_classes: int, ignore_index: int) -> None:
    index = target.long()
    outside = ((index < 0) | (index >= n_classes)) & (index != ignore_index)
    if outside.any():
        row = outside.nonzero()[0].tolist()
        raise IndexError(
            f"cross_entropy: expected target in [0, {n_classes}) or ignore_index={ignore_index}, "
            f"got {int(target[tuple(row)])} at row {row[0] if len(row) == 1 else tuple(row)}"
        )
