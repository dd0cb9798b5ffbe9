"""Cross-entropy of classes in shards, with the functions of
fused.kernels.vocab_parallel_cross_entropy, where the mathematics is written.

Rows come in chunks that stay in the CPU's cache: the logits are read from memory once in either
direction, and the gradient is written once.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fused.eager import cross_entropy_rows
from fused.eager.cross_entropy import raise_if_outside
from fused.eager.cross_entropy_rows import computed_in, scores


def shard_fwd(
    x: Tensor,
    target: Tensor,
    shard: tuple[int, int],
    layout: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """What the other processes need of this one's logits x (N, C, *S): a shard of the classes.

    shard is (the first of these classes, the number of all); target (N, *S) counts from the first
    of all. Returns m, s, b and d of each row, then the number of all classes, and `layout`, which
    stands for the widths of all shards: (4 * rows + 2,).
    """
    own = torch.zeros(4 * target.numel() + 2, dtype=computed_in(x, target), device=x.device)
    own[-2:-1].fill_(shard[1])
    own[-1:].fill_(layout)
    if x.shape[1] == 0:
        return own
    stats = own[:-2].view(4, *target.shape)
    share = label_smoothing / shard[1]
    for rows, scratch in _chunks(x, own.dtype):
        z = scores(x[rows], target, softcap, logit_scale)
        index, here = _places(target[rows], shard[0], x.shape[1])
        m = _safe_shift(z.amax(1))
        below = m - z.gather(1, index).squeeze(1)  # m - z_y
        d = torch.where(here, (1 - label_smoothing) * below, 0.0)
        b = (1 - label_smoothing) * here.to(z.dtype)
        e = torch.sub(z, m.unsqueeze(1), out=scratch)
        if label_smoothing > 0:
            d, b = d - share * e.sum(1), b + share * x.shape[1]
        s = _exp(e, x.dtype).sum(1)
        for whole, part in zip(stats, (m, s, b, d), strict=True):
            whole[rows] = part
    return own


def merged(
    shards: Tensor,
    x: Tensor,
    target: Tensor,
    n_all: int,
    layout: int,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, of what `shard_fwd` returned in each process: shards (processes, 4 * rows + 2).

    Returns (loss, stats, scale): loss as `reduction` says, in `loss_dtype`; stats (3, rows), the m,
    s and a of all classes; scale, the factor of every row in the mean or sum, None for "none". On
    the CPU a target that is none of n_all classes raises IndexError, and a process with another
    n_all or `layout` ValueError; elsewhere, where looking would stall the device, they make NaN.
    """
    (counts, layouts), y = shards[:, -2:].unbind(1), target.long()
    valid, others = y != ignore_index, (counts != n_all) | (layouts != layout)
    wrong = valid & ((y < 0) | (y >= n_all) | others.any())
    if x.is_cpu and wrong.any():
        if others.any():
            ranks = others.nonzero().squeeze(1).tolist()
            found = ", ".join(f"{int(counts[rank])} classes at rank {rank}" for rank in ranks)
            raise ValueError(
                "vocab_parallel_cross_entropy: expected slices of equal width, or the same "
                f"`widths` in every process: here they make {n_all} classes, others make {found}"
            )
        raise_if_outside(target, n_all, ignore_index)
    m_k, s_k, b_k, d_k = shards[:, :-2].view(len(shards), 4, *target.shape).unbind(1)
    nothing = s_k == 0
    m = _safe_shift(m_k.masked_fill(nothing, -torch.inf).amax(0))
    s = (s_k * (m_k - m).exp()).masked_fill(nothing, 0.0).sum(0)
    log_s, a = s.log(), b_k.sum(0)
    loss = (b_k * (m - m_k) + d_k).sum(0) + a * log_s
    if z_loss:
        lse = m + log_s
        loss, a = loss + z_loss * lse.square(), a + 2 * z_loss * lse
    loss = loss.masked_fill(wrong, torch.nan).masked_fill(~valid, 0.0)
    stats = torch.stack((m, s, a.masked_fill(wrong, torch.nan))).view(3, -1)
    if reduction == "none":
        return loss.to(loss_dtype), stats, None
    scale = torch.ones_like(counts[0])
    if reduction == "mean":
        scale = scale / valid.sum()
    return (loss.sum() * scale).to(loss_dtype), stats, scale


def shard_bwd(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    shard: tuple[int, int],
    stats: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    inplace: bool,
) -> Tensor:
    """The gradient of the logits x, from the stats and scale of `merged`.

    dloss is the upstream gradient, (N, *S) or one number. The gradient is in x's dtype, in x's own
    memory if `inplace`.
    """
    dx = x if inplace else torch.empty_like(x)
    factor = dloss.to(stats.dtype) if scale is None else dloss.to(stats.dtype) * scale
    factor = factor.expand(target.shape)
    m, s, a = stats.view(3, *target.shape)
    if x.shape[1] == 0:
        return dx
    for rows, scratch in _chunks(x, stats.dtype):
        z = scores(x[rows], target, softcap, logit_scale)
        index, here = _places(target[rows], shard[0], x.shape[1])
        f = factor[rows].unsqueeze(1)
        dz = _exp(torch.sub(z, m[rows].unsqueeze(1), out=scratch), x.dtype)
        dz *= a[rows].unsqueeze(1) * f / s[rows].unsqueeze(1)
        if label_smoothing > 0:
            dz -= label_smoothing / shard[1] * f
        dz.scatter_add_(1, index, torch.where(here.unsqueeze(1), (label_smoothing - 1) * f, 0.0))
        if softcap:
            dz *= 1 - (z / softcap).square()
        if logit_scale != 1:
            dz *= logit_scale
        ignored = target[rows].long() == ignore_index  # as a uint8, -100 would be 156
        if not x.is_cpu or ignored.any():  # elsewhere nobody may look
            dz.masked_fill_(ignored.unsqueeze(1), 0.0)
        dx[rows] = dz
    return dx


def _chunks(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, on other devices than the CPU one of all; and memory for as many logits."""
    n = x.shape[0]
    step = max(1, cross_entropy_rows.CHUNK * n // max(1, x.numel())) if x.is_cpu else max(1, n)
    scratch = torch.empty((min(n, step), *x.shape[1:]), dtype=dtype, device=x.device)
    for i in range(0, n, step):
        yield slice(i, i + step), scratch[: n - i]


def _places(target: Tensor, first: int, classes: int) -> tuple[Tensor, Tensor]:
    """(index to gather by, 0 for a target elsewhere, (n, 1, *S); which targets are here)"""
    y = target.long() - first
    here = (y >= 0) & (y < classes)
    return torch.where(here, y, 0).unsqueeze(1), here


def _exp(e: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(e) over e; for half precision by 2^x, which takes a third of the time."""
    return e.mul_(math.log2(math.e)).exp2_() if dtype.itemsize == 2 else e.exp_()


def _safe_shift(m: Tensor) -> Tensor:
    return m.masked_fill(m == -torch.inf, 0.0)
