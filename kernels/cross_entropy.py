"""Softmax cross-entropy of logits x (N, C, S), a row being one (n, s) with its C classes.

    z   = cap * tanh(scale * x / cap)                   softcap and logit_scale, both optional
    m   = max_c z_c                s = sum_c exp(z_c - m)              lse = m + log s
    b_c = w_c * ((1 - e) * t_c + e / C)                 t the probabilities, e the smoothing
    loss = sum_c b_c * (lse - z_c) + z_loss * lse^2                   0 where the row is ignored

    a    = sum_c b_c + 2 * z_loss * lse                 the coefficient of p = exp(z - m - log s)
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
"""

import torch
import triton
import triton.language as tl

from fused.kernels import layout, tuning
from fused.kernels.activation import tanh


@triton.jit
def _safe_shift(m):
    # exp(-inf - -inf) is NaN where exp(-inf) = 0 is meant: a maximum of -inf shifts by 0 instead.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _row_offsets(rows, n_inner, stride):
    return (rows // n_inner) * stride[0] + (rows % n_inner) * stride[2]


@triton.jit
def _scores(x, mask, logit_scale, softcap, SCALED: tl.constexpr, CAPPED: tl.constexpr):
    """z, and -inf behind the mask: after the cap, which would turn it into -cap."""
    if SCALED:
        x = x * logit_scale
    if CAPPED:
        x = softcap * tanh(x / softcap)
    if SCALED or CAPPED:
        x = tl.where(mask, x, float("-inf"))
    return x


@triton.jit
def _dense_target(
    target_ptr, offsets, weight_ptr, cols, mask, n_classes, keep, smoothing, acc: tl.constexpr,
    SOFT: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """b, the part of the target that may be anywhere in the row: (BLOCK_N, BLOCK_C), masked."""
    if SOFT:
        b = keep * tl.load(target_ptr + offsets, mask=mask, other=0.0).to(acc)
        if SMOOTHED:
            b += smoothing / n_classes
    else:
        b = tl.zeros(mask.shape, acc) + smoothing / n_classes
    if weight_ptr is not None:
        w = tl.load(weight_ptr + cols, mask=cols < n_classes, other=0.0).to(acc)
        b *= w[None, :]
    return tl.where(mask, b, 0.0)


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def _cross_entropy_fwd_kernel(
    x_ptr,  # logits, shape (n_rows / n_inner, n_classes, n_inner)
    target_ptr,  # class indices (n_rows / n_inner, n_inner), or probabilities shaped as x
    weight_ptr,  # class weights, shape (n_classes,), or None for 1
    loss_ptr,  # out: loss of each row, shape (n_rows,)
    stats_ptr,  # out: m, log s and a of each row, and whether its prediction is correct if
    #             CORRECT; shape (3 or 4, n_rows); its dtype is the one computed in
    n_rows,
    n_inner,
    n_classes,
    stride_x,  # of n, c and s; so are the other strides
    stride_t,
    ignore_index,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    SOFT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    CORRECT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """m and s with a running maximum; loss = sum_c b_c * (log s - (z_c - m)) + z_loss * lse^2"""
    acc: tl.constexpr = stats_ptr.dtype.element_ty
    cap, scale = tl.full((), softcap, acc), tl.full((), logit_scale, acc)
    smoothing = tl.full((), label_smoothing, acc)
    keep = 1.0 - smoothing
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    row_mask = rows < n_rows
    x_rows = _row_offsets(rows, n_inner, stride_x)
    t_rows = _row_offsets(rows, n_inner, stride_t)
    valid = row_mask
    if not SOFT:
        target = tl.load(target_ptr + t_rows, mask=row_mask, other=0).to(tl.int64)
        valid = row_mask & (target != ignore_index)

    m = tl.full((BLOCK_N,), float("-inf"), acc)
    s = tl.zeros((BLOCK_N,), acc)
    b_sum = tl.zeros((BLOCK_N,), acc)  # sum of b_c
    bz_sum = tl.zeros((BLOCK_N,), acc)  # sum of b_c * (z_c - m)
    best = tl.zeros((BLOCK_N,), tl.int64)  # class of the largest logit
    t_best = tl.zeros((BLOCK_N,), tl.int64)  # class of the largest probability
    t_max = tl.full((BLOCK_N,), float("-inf"), acc)
    for start in range(0, n_classes, BLOCK_C):
        cols = (start + tl.arange(0, BLOCK_C)).to(tl.int64)  # (BLOCK_C,)
        mask = valid[:, None] & (cols < n_classes)[None, :]
        x_offsets = x_rows[:, None] + cols[None, :] * stride_x[1]
        x = tl.load(x_ptr + x_offsets, mask=mask, other=float("-inf")).to(acc)
        z = _scores(x, mask, scale, cap, SCALED, CAPPED)  # (BLOCK_N, BLOCK_C)
        if CORRECT:
            tile_max, tile_best = tl.max(z, axis=1, return_indices=True)
            best = tl.where(tile_max > m, start + tile_best, best)
        m_new = tl.maximum(m, tl.max(z, axis=1))
        shift = _safe_shift(m_new)
        s = s * tl.exp(m - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
        if SOFT or SMOOTHED:
            t_offsets = t_rows[:, None] + cols[None, :] * stride_t[1]
            b = _dense_target(
                target_ptr, t_offsets, weight_ptr, cols, mask, n_classes, keep, smoothing, acc,
                SOFT, SMOOTHED,
            )  # fmt: skip
            bz_sum += b_sum * (_safe_shift(m) - shift)
            bz_sum += tl.sum(tl.where(mask, b * (z - shift[:, None]), 0.0), axis=1)
            b_sum += tl.sum(b, axis=1)
            if SOFT and CORRECT:
                t = tl.load(target_ptr + t_offsets, mask=mask, other=float("-inf")).to(acc)
                tile_max, tile_best = tl.max(t, axis=1, return_indices=True)
                t_best = tl.where(tile_max > t_max, start + tile_best, t_best)
                t_max = tl.maximum(t_max, tile_max)
        m = m_new
    m = tl.where(valid, _safe_shift(m), 0.0)
    log_s = tl.log(tl.where(valid, s, 1.0))

    loss = tl.zeros((BLOCK_N,), acc)
    a = tl.zeros((BLOCK_N,), acc)
    if SOFT or SMOOTHED:
        loss += b_sum * log_s - bz_sum
        a += b_sum
    if not SOFT:
        inside = valid & (target >= 0) & (target < n_classes)
        x_y = tl.load(x_ptr + x_rows + target * stride_x[1], mask=inside, other=float("nan"))
        z_y = _scores(x_y.to(acc), inside, scale, cap, SCALED, CAPPED)
        z_y = tl.where(inside, z_y, float("nan"))
        w_y = tl.full((BLOCK_N,), 1.0, acc)
        if weight_ptr is not None:
            w_y = tl.load(weight_ptr + target, mask=inside, other=0.0).to(acc)
        loss += keep * w_y * (log_s - (z_y - m))
        a += keep * w_y
    if Z_LOSS:
        coefficient = tl.full((), z_loss, acc)
        lse = m + log_s
        loss += coefficient * lse * lse
        a += 2.0 * coefficient * lse
    tl.store(loss_ptr + rows, tl.where(valid, loss, 0.0), mask=row_mask)
    stats_rows = stats_ptr + rows
    tl.store(stats_rows, m, mask=row_mask)
    tl.store(stats_rows + n_rows, log_s, mask=row_mask)
    tl.store(stats_rows + 2 * tl.cast(n_rows, tl.int64), a, mask=row_mask)
    if CORRECT:
        correct = valid & (best == (t_best if SOFT else target))
        tl.store(stats_rows + 3 * tl.cast(n_rows, tl.int64), correct.to(acc), mask=row_mask)


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def _cross_entropy_reduce_kernel(
    loss_ptr,  # loss of each row, shape (n_rows,)
    target_ptr,  # class indices (n_rows / n_inner, n_inner), or None for probabilities
    weight_ptr,  # class weights, shape (n_classes,), or None for 1
    out_ptr,  # out: the sum or the mean, one number
    scale_ptr,  # out: what the mean multiplies a row by (1 for the sum), one number
    n_rows,
    n_inner,
    n_classes,
    stride_t,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = scale * sum_i loss_i, added up by one program in a fixed order"""
    acc: tl.constexpr = loss_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), acc)
    parts = tl.zeros((BLOCK,), acc)  # what the mean divides by
    for start in range(0, n_rows, BLOCK):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        mask = rows < n_rows
        total += tl.load(loss_ptr + rows, mask=mask, other=0.0)
        if target_ptr is not None:
            offsets = _row_offsets(rows, n_inner, stride_t)
            target = tl.load(target_ptr + offsets, mask=mask, other=0).to(tl.int64)
            mask = mask & (target != ignore_index)
            if weight_ptr is not None:
                mask = mask & (target >= 0) & (target < n_classes)
                parts += tl.load(weight_ptr + target, mask=mask, other=0.0).to(acc)
            else:
                parts += mask.to(acc)
        else:
            parts += mask.to(acc)
    scale = tl.full((), 1.0, acc)
    if MEAN:
        scale = 1.0 / tl.sum(parts, axis=0)
    tl.store(out_ptr, tl.sum(total, axis=0) * scale)
    tl.store(scale_ptr, scale)


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def _cross_entropy_bwd_kernel(
    dloss_ptr,  # upstream gradient, shape (n_rows,), or one number with stride_dloss = 0
    x_ptr,  # logits, shape (n_rows / n_inner, n_classes, n_inner)
    target_ptr,  # class indices (n_rows / n_inner, n_inner), or probabilities shaped as x
    weight_ptr,  # class weights, shape (n_classes,), or None for 1
    stats_ptr,  # m, log s and a of each row, shape (3 or 4, n_rows); in the dtype computed in
    scale_ptr,  # factor of every row, one number; None for 1
    dx_ptr,  # out: gradient of the logits, shaped as x; None where it is not wanted
    dt_ptr,  # out: gradient of the probabilities, shaped as x; None where it is not wanted
    n_rows,
    n_inner,
    n_classes,
    stride_dloss,
    stride_x,  # of n, c and s; so are the other strides
    stride_t,
    stride_dx,
    stride_dt,
    ignore_index,
    label_smoothing: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    SOFT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx_c = dloss * (a * p_c - b_c) * dz/dx,  dt_c = dloss * (1 - e) * w_c * (lse - z_c)"""
    acc: tl.constexpr = stats_ptr.dtype.element_ty
    cap, scale = tl.full((), softcap, acc), tl.full((), logit_scale, acc)
    smoothing = tl.full((), label_smoothing, acc)
    keep = 1.0 - smoothing
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    row_mask = rows < n_rows
    x_rows = _row_offsets(rows, n_inner, stride_x)
    t_rows = _row_offsets(rows, n_inner, stride_t)
    dx_rows = _row_offsets(rows, n_inner, stride_dx)
    dt_rows = _row_offsets(rows, n_inner, stride_dt)
    valid = row_mask
    if not SOFT:
        target = tl.load(target_ptr + t_rows, mask=row_mask, other=0).to(tl.int64)
        valid = row_mask & (target != ignore_index)
    stats_rows = stats_ptr + rows
    m = tl.load(stats_rows, mask=valid, other=0.0)
    log_s = tl.load(stats_rows + n_rows, mask=valid, other=0.0)
    a = tl.load(stats_rows + 2 * tl.cast(n_rows, tl.int64), mask=valid, other=0.0)
    factor = tl.load(dloss_ptr + rows * stride_dloss, mask=valid, other=0.0).to(acc)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr)
    if not SOFT:
        inside = (target >= 0) & (target < n_classes)
        factor = tl.where(inside, factor, float("nan"))
        b_y = tl.zeros((BLOCK_N,), acc) + keep
        if weight_ptr is not None:
            w_y = tl.load(weight_ptr + target, mask=valid & inside, other=0.0)
            b_y *= w_y.to(acc)

    for start in range(0, n_classes, BLOCK_C):
        cols = (start + tl.arange(0, BLOCK_C)).to(tl.int64)  # (BLOCK_C,)
        col_mask = cols < n_classes
        mask = valid[:, None] & col_mask[None, :]
        out_mask = row_mask[:, None] & col_mask[None, :]
        x_offsets = x_rows[:, None] + cols[None, :] * stride_x[1]
        x = tl.load(x_ptr + x_offsets, mask=mask, other=float("-inf")).to(acc)
        z = _scores(x, mask, scale, cap, SCALED, CAPPED)  # (BLOCK_N, BLOCK_C)
        log_p = z - m[:, None] - log_s[:, None]
        if dx_ptr is not None:
            # b is taken off in float32, before the rounding to a half-precision dx: for a confident
            # prediction p rounds to 1 and the whole gradient would be lost.
            dz = a[:, None] * tl.exp(log_p)
            if SOFT or SMOOTHED:
                t_offsets = t_rows[:, None] + cols[None, :] * stride_t[1]
                dz -= _dense_target(
                    target_ptr, t_offsets, weight_ptr, cols, mask, n_classes, keep, smoothing, acc,
                    SOFT, SMOOTHED,
                )  # fmt: skip
            if not SOFT:
                dz = tl.where(cols[None, :] == target[:, None], dz - b_y[:, None], dz)
            dx = dz * factor[:, None]
            if SCALED:
                dx = dx * scale
            if CAPPED:
                dx = dx * (1.0 - (z / cap) * (z / cap))
            dx_offsets = dx_rows[:, None] + cols[None, :] * stride_dx[1]
            tl.store(dx_ptr + dx_offsets, tl.where(valid[:, None], dx, 0.0), mask=out_mask)
        if dt_ptr is not None:
            dt = -factor[:, None] * keep * log_p
            if weight_ptr is not None:
                dt *= tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(acc)[None, :]
            dt_offsets = dt_rows[:, None] + cols[None, :] * stride_dt[1]
            tl.store(dt_ptr + dt_offsets, dt, mask=out_mask)


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
    (3 or 4, rows), the m, log s and a of each row; scale, the factor of every row in the mean or
    sum, one number, None for "none"; extras, if wanted, the loss and the lse of each row (N, *S)
    and, one int64, how many rows have their largest logit at their target.

    Bytes: reads x once (and the probabilities once); writes 16 bytes a row. That is the least for
    a forward alone. With "mean" or "sum" a second launch of one program reads the rows' losses and
    targets.
    """
    x3, target3, soft = layout.inner(x), _rows_of_target(x, target), target.shape == x.shape
    n_rows, n_inner, n_classes = x3.shape[0] * x3.shape[2], x3.shape[2], x3.shape[1]
    wide = x.dtype == torch.float64 or (soft and target.dtype == torch.float64)
    acc = torch.float64 if wide else torch.float32
    stats = torch.empty((4 if want_extras else 3, n_rows), dtype=acc, device=x.device)
    reduced = reduction != "none"
    loss = torch.empty(n_rows, dtype=acc if reduced else loss_dtype, device=x.device)
    tile = tuning.cross_entropy(n_rows, n_classes, x.dtype, x3.stride(1), n_inner)
    if n_rows > 0:
        _cross_entropy_fwd_kernel[tile.rows_grid(n_rows)](
            x3,
            target3,
            weight,
            loss,
            stats,
            n_rows,
            n_inner,
            n_classes,
            layout.strides(x3),
            _target_strides(target3, soft),
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            logit_scale,
            SOFT=soft,
            SMOOTHED=label_smoothing > 0,
            Z_LOSS=z_loss != 0,
            CAPPED=softcap != 0,
            SCALED=logit_scale != 1,
            CORRECT=want_extras,
            BLOCK_N=tile.BLOCK_N,
            BLOCK_C=tile.BLOCK_C,
            num_warps=tile.num_warps,
        )
    shape = x.shape[:1] + x.shape[2:]
    extras = None
    if want_extras:
        correct = stats[3].sum(dtype=torch.int64)
        extras = (loss.clone().view(shape), (stats[0] + stats[1]).view(shape), correct)
    if not reduced:
        return loss.view(shape), stats, None, extras
    out = torch.empty((), dtype=loss_dtype, device=x.device)
    scale = torch.empty((), dtype=acc, device=x.device)
    _cross_entropy_reduce_kernel[(1,)](
        loss,
        None if soft else target3,
        weight,
        out,
        scale,
        n_rows,
        n_inner,
        n_classes,
        _target_strides(target3, soft),
        ignore_index,
        MEAN=reduction == "mean",
        BLOCK=tuning.scan(n_rows),
    )
    return out, stats, scale, extras


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
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients (dx, dtarget) of the loss, each None where it is not wanted.

    dloss is the upstream gradient, (N, *S) with any strides or one number; stats and scale are what
    `cross_entropy_fwd` returned. dx is in x's dtype and memory format, or in x's own memory if
    `inplace`; dtarget, of probabilities, in their dtype and memory format.

    Bytes: reads x once (and the probabilities once), writes dx once (and dtarget once). With the
    forward 2 reads and 1 write of the logits; the least possible is 1 read and 1 write, by forming
    the gradient in the forward.
    """
    soft = target.shape == x.shape
    dx = None if not want_dx else x if inplace else torch.empty_like(x)
    dtarget = torch.empty_like(target) if want_dtarget else None
    if x.numel() == 0:
        return dx, dtarget
    x3, target3 = layout.inner(x), _rows_of_target(x, target)
    # Of a layout that no view collapses, the gradient is written contiguous and copied.
    dx3 = None if dx is None else layout.inner(dx)
    dt3 = None if dtarget is None else layout.inner(dtarget)
    n_rows, n_inner, n_classes = x3.shape[0] * x3.shape[2], x3.shape[2], x3.shape[1]
    tile = tuning.cross_entropy(n_rows, n_classes, x.dtype, x3.stride(1), n_inner)
    dloss = dloss.reshape(-1)
    _cross_entropy_bwd_kernel[tile.rows_grid(n_rows)](
        dloss,
        x3,
        target3,
        weight,
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
        label_smoothing,
        softcap,
        logit_scale,
        SOFT=soft,
        SMOOTHED=label_smoothing > 0,
        CAPPED=softcap != 0,
        SCALED=logit_scale != 1,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_C=tile.BLOCK_C,
        num_warps=tile.num_warps,
    )
    layout.copy_back(dx, dx3)
    layout.copy_back(dtarget, dt3)
    return dx, dtarget


def _rows_of_target(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Probabilities as (N, C, S), class indices as (N, S); a view wherever one exists."""
    if target.shape == x.shape:
        return layout.inner(target)
    return target.unsqueeze(1) if target.dim() == 1 else target.flatten(1)


def _target_strides(target: torch.Tensor, soft: bool) -> tuple[int, int, int]:
    if soft:
        return target.stride(0), target.stride(1), target.stride(2)
    return target.stride(0), 0, target.stride(1)
