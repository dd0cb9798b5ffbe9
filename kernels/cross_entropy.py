"""Softmax cross-entropy, rows of logits x (N, C) against class indices y (N,).

    m_i    = max_c x_ic                s_i = sum_c exp(x_ic - m_i)
    loss_i = log s_i - (x_i,y_i - m_i)                             0 where y_i is ignored
    dx_ic  = dloss_i * (exp(x_ic - m_i - log s_i) - [c = y_i])     0 where y_i is ignored

m and log s are kept apart: of logits near 3e4 their sum, the log-sum-exp, has an error of up to
1e-3 in float32, and loss and gradient would inherit it.

The mean divides by the number of rows that are not ignored. Everything is computed in float32
(float64 for float64 logits). A target outside [0, C) that is not `ignore_index` is never used as an
address: its loss and gradient are NaN.
"""

import torch
import triton
import triton.language as tl

from fused.kernels import tuning


@triton.jit
def _safe_shift(m):
    # exp(-inf - -inf) is NaN where exp(-inf) = 0 is meant: a maximum of -inf shifts by 0 instead.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def _cross_entropy_fwd_kernel(
    x_ptr,  # logits, shape (n_rows, n_classes)
    target_ptr,  # class indices, shape (n_rows,)
    loss_ptr,  # out: loss of each row, shape (n_rows,)
    stats_ptr,  # out: m and log s of each row, shape (2, n_rows); its dtype is the one computed in
    n_rows,
    n_classes,
    stride_x_n,
    stride_x_c,
    stride_target,
    ignore_index,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """m = max_c x_c, s = sum_c exp(x_c - m), both running; loss = log s - (x_y - m)"""
    acc: tl.constexpr = stats_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    row_mask = rows < n_rows
    target = tl.load(target_ptr + rows * stride_target, mask=row_mask, other=0).to(tl.int64)
    valid = row_mask & (target != ignore_index)

    m = tl.full((BLOCK_N,), float("-inf"), acc)
    s = tl.zeros((BLOCK_N,), acc)
    for start in range(0, n_classes, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
        mask = valid[:, None] & (cols < n_classes)[None, :]
        offsets = rows[:, None] * stride_x_n + cols.to(tl.int64)[None, :] * stride_x_c
        x = tl.load(x_ptr + offsets, mask=mask, other=float("-inf")).to(acc)  # (BLOCK_N, BLOCK_C)
        m_new = tl.maximum(m, tl.max(x, axis=1))
        shift = _safe_shift(m_new)
        s = s * tl.exp(m - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        m = m_new
    m = _safe_shift(m)
    log_s = tl.log(s)

    inside = valid & (target >= 0) & (target < n_classes)
    x_y = tl.load(
        x_ptr + rows * stride_x_n + target * stride_x_c, mask=inside, other=float("nan")
    ).to(acc)
    tl.store(loss_ptr + rows, tl.where(valid, log_s - (x_y - m), 0.0), mask=row_mask)
    tl.store(stats_ptr + rows, m, mask=row_mask)
    tl.store(stats_ptr + n_rows + rows, log_s, mask=row_mask)


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def _cross_entropy_reduce_kernel(
    loss_ptr,  # loss of each row, shape (n_rows,)
    target_ptr,  # class indices, shape (n_rows,)
    out_ptr,  # out: the sum or the mean, one number
    scale_ptr,  # out: what the mean multiplies a row by (1 for the sum), one number
    n_rows,
    stride_target,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = scale * sum_i loss_i, added up by one program in a fixed order"""
    acc: tl.constexpr = loss_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), acc)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n_rows, BLOCK):
        rows = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        mask = rows < n_rows
        total += tl.load(loss_ptr + rows, mask=mask, other=0.0)
        target = tl.load(target_ptr + rows * stride_target, mask=mask, other=0).to(tl.int64)
        count += (mask & (target != ignore_index)).to(tl.int32)
    scale = 1.0 / tl.sum(count, axis=0).to(acc) if MEAN else tl.full((), 1.0, acc)
    tl.store(out_ptr, tl.sum(total, axis=0) * scale)
    tl.store(scale_ptr, scale)


@triton.jit(do_not_specialize=["n_rows", "ignore_index"])
def _cross_entropy_bwd_kernel(
    dloss_ptr,  # upstream gradient, shape (n_rows,), or one number with stride_dloss = 0
    x_ptr,  # logits, shape (n_rows, n_classes)
    target_ptr,  # class indices, shape (n_rows,)
    stats_ptr,  # m and log s of each row, shape (2, n_rows); its dtype is the one computed in
    scale_ptr,  # factor of every row, one number; None for 1
    dx_ptr,  # out: gradient of the logits, shape (n_rows, n_classes), contiguous
    n_rows,
    n_classes,
    stride_dloss,
    stride_x_n,
    stride_x_c,
    stride_target,
    ignore_index,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx_c = dloss * scale * (exp(x_c - m - log s) - [c = y])"""
    acc: tl.constexpr = stats_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    row_mask = rows < n_rows
    target = tl.load(target_ptr + rows * stride_target, mask=row_mask, other=0).to(tl.int64)
    valid = row_mask & (target != ignore_index)
    m = tl.load(stats_ptr + rows, mask=valid, other=0.0)
    log_s = tl.load(stats_ptr + n_rows + rows, mask=valid, other=0.0)
    factor = tl.load(dloss_ptr + rows * stride_dloss, mask=valid, other=0.0).to(acc)
    if scale_ptr is not None:
        factor *= tl.load(scale_ptr)
    factor = tl.where((target >= 0) & (target < n_classes), factor, float("nan"))

    for start in range(0, n_classes, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)  # (BLOCK_C,)
        col_mask = (cols < n_classes)[None, :]
        mask = valid[:, None] & col_mask
        offsets = rows[:, None] * stride_x_n + cols.to(tl.int64)[None, :] * stride_x_c
        x = tl.load(x_ptr + offsets, mask=mask, other=float("-inf")).to(acc)  # (BLOCK_N, BLOCK_C)
        # The 1 is taken off in float32, before the rounding to a half-precision dx: for a confident
        # prediction p rounds to 1 and the whole gradient would be lost.
        p = tl.exp(x - m[:, None] - log_s[:, None])
        dx = tl.where(cols[None, :] == target[:, None], p - 1.0, p) * factor[:, None]
        dx_offsets = rows[:, None] * n_classes + cols[None, :]
        tl.store(
            dx_ptr + dx_offsets,
            tl.where(valid[:, None], dx, 0.0),
            mask=row_mask[:, None] & col_mask,
        )


def cross_entropy_fwd(
    x: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The loss of logits x (N, C) and class indices target (N,), and what its backward needs.

    Returns (loss, stats, scale): loss as `reduction` says, in x's dtype; stats (2, N), the m and
    log s of each row; scale, the factor of every row in the mean or sum, one number, None for
    "none".

    Bytes: reads x once; writes 12 N (float32). That is the least for a forward alone. With "mean"
    or "sum" a second launch of one program reads 4 N bytes of losses and the targets.
    """
    n_rows, n_classes = x.shape
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = torch.empty((2, n_rows), dtype=acc, device=x.device)
    loss_dtype = x.dtype if reduction == "none" else acc
    loss = torch.empty(n_rows, dtype=loss_dtype, device=x.device)
    tile = tuning.cross_entropy(n_rows, n_classes, x.dtype)
    if n_rows > 0:
        _cross_entropy_fwd_kernel[tile.rows_grid(n_rows)](
            x,
            target,
            loss,
            stats,
            n_rows,
            n_classes,
            x.stride(0),
            x.stride(1),
            target.stride(0),
            ignore_index,
            BLOCK_N=tile.BLOCK_N,
            BLOCK_C=tile.BLOCK_C,
            num_warps=tile.num_warps,
        )
    if reduction == "none":
        return loss, stats, None
    out = torch.empty((), dtype=x.dtype, device=x.device)
    scale = torch.empty((), dtype=acc, device=x.device)
    _cross_entropy_reduce_kernel[(1,)](
        loss,
        target,
        out,
        scale,
        n_rows,
        target.stride(0),
        ignore_index,
        MEAN=reduction == "mean",
        BLOCK=tuning.scan(n_rows),
    )
    return out, stats, scale


def cross_entropy_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    stats: torch.Tensor,
    scale: torch.Tensor | None,
    ignore_index: int,
) -> torch.Tensor:
    """The gradient dx (N, C) of the loss, in x's dtype, contiguous.

    dloss is the upstream gradient, (N,) with any stride or one number; stats and scale are what
    `cross_entropy_fwd` returned.

    Bytes: reads x once, writes dx once. With the forward 2 reads and 1 write of the logits; the
    least possible is 1 read and 1 write, by forming the gradient in the forward.
    """
    n_rows, n_classes = x.shape
    dx = torch.empty((n_rows, n_classes), dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx
    tile = tuning.cross_entropy(n_rows, n_classes, x.dtype)
    _cross_entropy_bwd_kernel[tile.rows_grid(n_rows)](
        dloss,
        x,
        target,
        stats,
        scale,
        dx,
        n_rows,
        n_classes,
        dloss.stride(0) if dloss.dim() else 0,
        x.stride(0),
        x.stride(1),
        target.stride(0),
        ignore_index,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_C=tile.BLOCK_C,
        num_warps=tile.num_warps,
    )
    return dx
