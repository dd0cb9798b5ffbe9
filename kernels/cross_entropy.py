"""Softmax cross-entropy of logits x (N, C, S), a row being one (n, s) with its C classes.

    z   = cap * tanh(scale * x / cap)                   softcap and logit_scale, both optional
    m   = max_c z_c                s = sum_c exp(z_c - m)              lse = m + log s
    b_c = w_c * ((1 - e) * t_c + e / C)                 t the probabilities, e the smoothing
    loss = sum_c b_c * (lse - z_c) + z_loss * lse^2                   0 where the row is ignored

    a    = sum_c b_c + 2 * z_loss * lse                 the coefficient of p = exp(z - m) / s
    dz_c = dloss * (a * p_c - b_c)                                    0 where the row is ignored
    dx_c = dz_c * scale * (1 - (z_c / cap)^2)
    dt_c = dloss * (1 - e) * w_c * (lse - z_c)

For a class index y the target is one-hot, with the weight w_y for the whole of it: b_c is then
(1 - e) * w_y * [c = y] + e / C * w_c. The mean divides by the sum of the w_y of the rows that are
not ignored; for probabilities by the number of rows.

m and log s are kept apart: of logits near 3e4 their sum has an error of up to 1e-3 in float32, and
loss and gradient would inherit it. Everything is computed in float32 (float64 for float64 logits).
A target outside [0, C) that is not `ignore_index` is never used as an address: its loss and
gradient are NaN. Derivation: docs/derivations.md.

The gradient takes either of two ways. Formed in the forward, for an upstream gradient of 1, it
costs one read and one write of the logits' memory in all: the row is still on chip when its sum is
known. Formed in the backward from m, s and a, it costs another read, and is rounded once.
"""

import math

import torch
import triton
import triton.language as tl

from fused.kernels import layout, tuning
from fused.kernels.cross_entropy_kernels import (
    _cross_entropy_bwd_kernel,
    _cross_entropy_count_kernel,
    _cross_entropy_fwd_kernel,
    _cross_entropy_scale_kernel,
    _cross_entropy_sum_kernel,
)
from fused.kernels.device import on_its_device


@on_its_device
def cross_entropy_fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    loss_dtype: torch.dtype,
    want_extras: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...] | None]:
    """The loss of logits x (N, C, *S), and what its backward needs.

    target is (N, *S) class indices, or probabilities shaped as x; weight (C,); a softcap of 0 is
    none. Returns (loss, stats, scale, extras): loss as `reduction` says, in `loss_dtype`; stats
    (3 or 4, rows), the m, s and a of each row; scale, the factor of every row in the mean or sum,
    one number, None for "none"; extras, if wanted, the loss and the lse of each row (N, *S), one
    int64, how many rows have their largest score at their target, and the class of each row's
    largest score (N, *S), the first of several, -1 where the row is ignored.

    Bytes: reads x once (and the probabilities once); writes 12 bytes a row for a backward, 4 more
    for "none", 16 more for the extras. Launches: as `cross_entropy_fwd_bwd`; one for "none".
    """
    numbers = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    acc = computed_in(x, target)
    n_rows = x.shape[0] * x.shape[2:].numel()
    stats = torch.empty((4 if want_extras else 3, n_rows), dtype=acc, device=x.device)
    scale = None if reduction == "none" else torch.empty((), dtype=acc, device=x.device)
    loss, extras = _forward(
        x, target, weight, numbers, reduction, loss_dtype, want_extras, scale, stats, None
    )
    return loss, stats, scale, extras


@on_its_device
def cross_entropy_fwd_bwd(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    loss_dtype: torch.dtype,
    want_extras: bool,
    inplace: bool,
    divisor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, torch.Tensor]:
    """The loss of `cross_entropy_fwd`, "mean" or "sum", and its gradient: (loss, extras, dx).

    dx is in x's dtype and memory format, or in x's own memory if `inplace`. A `divisor`, one number
    on the device, divides both, for "sum" as for "mean", which then does not count.

    Bytes: reads x once and writes dx once, the least possible: a row stays in registers, or beyond
    `tuning`'s threshold is read a second time from L2, where it is kept until then. Launches: one
    where one program does everything; otherwise a second, small one, adds up the programs' sums;
    a mean over very many rows counts them in one before.
    """
    assert reduction != "none"
    numbers = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    dx = x if inplace else torch.empty_like(x)
    n_rows = x.shape[0] * x.shape[2:].numel()
    stats = None
    if want_extras:
        stats = torch.empty((4, n_rows), dtype=computed_in(x, target), device=x.device)
    loss, extras = _forward(
        x, target, weight, numbers, reduction, loss_dtype, want_extras, None, stats, dx,
        counts=divisor,
    )  # fmt: skip
    return loss, extras, dx


@on_its_device
def cross_entropy_shard(
    x: torch.Tensor,
    target: torch.Tensor,
    shard: tuple[int, int],
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    stats: torch.Tensor,
) -> None:
    """Of logits x (N, C, *S) that are a shard of the classes, what the loss of all classes needs.

    shard is (the first of these classes, the number of all); target counts from the first of all.
    Writes stats (4, rows): m and s of the shard, its sum of b_c, and its sum of b_c * (m - z_c).

    Bytes: reads x once; writes 16 bytes a row. One launch.
    """
    numbers = (ignore_index, label_smoothing, 0.0, softcap, logit_scale)
    rows = stats[3]
    _forward(x, target, None, numbers, "none", rows.dtype, False, None, stats, None, shard, rows)


def _forward(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    numbers: tuple[int, float, float, float, float],
    reduction: str,
    loss_dtype: torch.dtype,
    want_extras: bool,
    scale: torch.Tensor | None,
    stats: torch.Tensor | None,
    dx: torch.Tensor | None,
    shard: tuple[int, int] | None = None,
    rows_loss: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """(loss, extras); fills scale, stats, dx and rows_loss, where they are given. `counts`, one
    number, is what the reduction divides by, where it is known."""
    ignore_index, label_smoothing, z_loss, softcap, logit_scale = numbers
    x3, target3, soft = layout.inner(x), rows_of_target(x, target), target.shape == x.shape
    dx3 = None if dx is None else x3 if dx is x else layout.inner(dx)
    if layout.rows_are_neighbours(x):
        x3, target3 = x3.transpose(0, -1), target3.transpose(0, -1)
        dx3 = None if dx3 is None else dx3.transpose(0, -1)
    n_rows, n_inner, n_classes = x3.shape[0] * x3.shape[2], x3.shape[2], x3.shape[1]
    acc, t_strides = computed_in(x, target), _target_strides(target3, soft)
    reduced, mean = reduction != "none", reduction == "mean" or counts is not None
    plan, weight = tuning.cross_entropy(x3, dx is None or dx is x), layout.vector(weight)

    def new(*shape: int, dtype: torch.dtype = acc) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    n_counts = 1
    if mean and counts is None and not soft and n_rows > plan.max_rows_to_count:
        walk = tuning.count(n_rows)
        n_counts = walk.n_programs
        counts = new(n_counts)
        _cross_entropy_count_kernel[(n_counts,)](
            target3,
            weight,
            counts,
            n_rows,
            n_inner,
            n_classes,
            t_strides,
            ignore_index,
            ACC=TRITON_DTYPE[acc],
            BLOCK=walk.BLOCK,
            num_warps=walk.num_warps,
            enable_fp_fusion=False,
        )
    best = new(n_rows, dtype=torch.int64) if want_extras else None
    parts = None
    if rows_loss is None and (want_extras or not reduced):
        rows_loss = new(n_rows, dtype=acc if reduced else loss_dtype)
    if reduced:  # one program's part is the whole
        parts = new(dtype=loss_dtype) if plan.n_programs == 1 else new(plan.n_programs)
    if n_rows > 0 or reduced:
        _cross_entropy_fwd_kernel[(plan.n_programs,)](
            x3,
            target3,
            weight,
            counts,
            rows_loss,
            parts,
            scale,
            stats,
            best,
            dx3,
            n_rows,
            n_counts,
            n_inner,
            n_classes,
            layout.strides(x3),
            t_strides,
            layout.strides(dx3),
            ignore_index,
            shard,
            label_smoothing,
            z_loss,
            softcap,
            logit_scale,
            SOFT=soft,
            SMOOTHED=label_smoothing > 0,
            Z_LOSS=z_loss != 0,
            CAPPED=softcap != 0,
            SCALED=logit_scale != 1,
            MEAN=mean,
            ACC=TRITON_DTYPE[acc],
            BLOCK_N=plan.BLOCK_N,
            BLOCK_C=plan.BLOCK_C,
            BLOCK_COUNT=plan.BLOCK_COUNT,
            LANES=plan.LANES,
            VEC=plan.VEC,
            EDGES=plan.EDGES,
            THREADS=plan.THREADS,
            PARTS=plan.PARTS,
            HELD=plan.HELD,
            NUM_CTAS=plan.num_ctas,
            num_warps=plan.num_warps,
            enable_fp_fusion=False,
            num_ctas=plan.num_ctas,
            **plan.options,
        )
    layout.copy_back(dx, dx3)
    shape = x.shape[:1] + x.shape[2:]
    extras = None
    if best is not None and stats is not None and rows_loss is not None:
        rows = rows_loss if reduced else rows_loss.clone()
        largest, correct = stats[0], stats[3].sum(dtype=torch.int64)
        # Of an infinite logit the sum is NaN, and the log-sum-exp infinite.
        lse = torch.where(largest == math.inf, largest, largest + stats[1].log())
        extras = (rows.view(shape), lse.view(shape), correct, best.view(shape))
    if parts is None and rows_loss is not None:
        return rows_loss.view(shape), extras
    assert parts is not None
    if plan.n_programs == 1:
        return parts, extras
    loss = new(dtype=loss_dtype)
    _cross_entropy_sum_kernel[(1,)](
        parts, loss, plan.n_programs, ACC=TRITON_DTYPE[acc], BLOCK=tuning.scan(plan.n_programs),
        enable_fp_fusion=False,
    )  # fmt: skip
    return loss, extras


@on_its_device
def cross_entropy_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    scale: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    want_dx: bool,
    want_dtarget: bool,
    inplace: bool,
    shard: tuple[int, int] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients (dx, dtarget) of the loss, each None where it is not wanted.

    dloss is the upstream gradient, (N, *S) with any strides or one number; stats and scale are what
    `cross_entropy_fwd` returned. dx is in x's dtype and memory format, or in x's own memory if
    `inplace`; dtarget, of probabilities, in their dtype and memory format. If x is a `shard` of the
    classes, as in `cross_entropy_shard`, stats are those of all, and a is NaN in a row whose target
    is none of them.

    Bytes: reads x once (and the probabilities once), writes dx once (and dtarget once). With the
    forward 2 reads and 1 write of the logits; the least possible is 1 read and 1 write, which
    `cross_entropy_fwd_bwd` takes.
    """
    soft = target.shape == x.shape
    dx = None if not want_dx else x if inplace else torch.empty_like(x)
    dtarget = torch.empty_like(target) if want_dtarget else None
    if x.numel() == 0:
        return dx, dtarget
    x3, target3 = layout.inner(x), rows_of_target(x, target)
    # Of a layout that no view collapses, the gradient is written contiguous and copied.
    dx3 = None if dx is None else x3 if dx is x else layout.inner(dx)
    dt3 = None if dtarget is None else layout.inner(dtarget)
    if layout.rows_are_neighbours(x):
        x3, target3 = x3.transpose(0, -1), target3.transpose(0, -1)
        dx3 = None if dx3 is None else dx3.transpose(0, -1)
        dt3 = None if dt3 is None else dt3.transpose(0, -1)
    n_rows, n_inner, n_classes = x3.shape[0] * x3.shape[2], x3.shape[2], x3.shape[1]
    # Without a reduction nothing keeps a cluster's blocks from writing over what others will read.
    plan = tuning.cross_entropy(x3, inplace, clusters=False)
    dloss = dloss.resolve_neg().reshape(-1)
    _cross_entropy_bwd_kernel[(triton.cdiv(n_rows, plan.BLOCK_N),)](
        dloss,
        x3,
        target3,
        layout.vector(weight),
        stats,
        scale,
        dx3,
        dt3,
        n_rows,
        n_inner,
        n_classes,
        dloss.stride(0) if dloss.numel() == n_rows > 1 else 0,
        layout.strides(x3),
        _target_strides(target3, soft),
        layout.strides(dx3),
        layout.strides(dt3),
        ignore_index,
        shard,
        label_smoothing,
        softcap,
        logit_scale,
        SOFT=soft,
        SMOOTHED=label_smoothing > 0,
        CAPPED=softcap != 0,
        SCALED=logit_scale != 1,
        ACC=TRITON_DTYPE[computed_in(x, target)],
        BLOCK_N=plan.BLOCK_N,
        BLOCK_C=plan.BLOCK_C,
        VEC=plan.VEC,
        EDGES=plan.EDGES,
        THREADS=plan.THREADS,
        PARTS=plan.PARTS,
        num_warps=plan.num_warps,
        enable_fp_fusion=False,
        **plan.options,
    )
    layout.copy_back(dx, dx3)
    layout.copy_back(dtarget, dt3)
    return dx, dtarget


@on_its_device
def cross_entropy_scale(dx: torch.Tensor, dloss: torch.Tensor) -> torch.Tensor:
    """dx, in its own memory, times dloss, one number on the device; what is 0, as an ignored row
    is, stays so where dloss is inf or NaN (but in a slice of larger memory).

    Bytes: none where dloss is 1, which only the device looks at; else reads and writes dx once. One
    launch.
    """
    span = 1 + sum((size - 1) * stride for size, stride in zip(dx.shape, dx.stride(), strict=True))
    if dx.numel() == 0:
        return dx
    if span != dx.numel():  # a slice of larger memory: logits of a padded vocabulary, in place
        dx.mul_(dloss)
    else:
        walk = tuning.scale(dx.numel(), dx.device)
        _cross_entropy_scale_kernel[(walk.n_programs,)](
            dx,
            dloss.resolve_neg(),
            dx.numel(),
            ACC=TRITON_DTYPE[computed_in(dx, dx)],
            BLOCK=walk.BLOCK,
            num_warps=walk.num_warps,
            enable_fp_fusion=False,
        )
    return dx


TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def computed_in(x: torch.Tensor, target: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, target.dtype) else torch.float32


def rows_of_target(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Probabilities as (N, C, S), class indices as (N, S); a view wherever one exists."""
    if target.shape == x.shape:
        return layout.inner(target)
    return target.unsqueeze(1) if target.dim() == 1 else target.flatten(1)


def _target_strides(target: torch.Tensor, soft: bool) -> tuple[int, int, int]:
    if soft:
        return target.stride(0), target.stride(1), target.stride(2)
    return target.stride(0), 0, target.stride(1)
