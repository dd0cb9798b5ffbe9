"""Cross-entropy of classes that are split into shards, each on a process of its own.

    of shard k   m_k = max z_c      s_k = sum exp(z_c - m_k)
                 b_k = sum b_c      d_k = sum b_c * (m_k - z_c)              over its own classes
    of a row     m = max m_k        s = sum_k s_k * exp(m_k - m)         lse = m + log s
                 loss = sum_k (b_k * (log s + m - m_k) + d_k) + z_loss * lse^2
                 a = sum_k b_k + 2 * z_loss * lse

z and b as in cross_entropy.py, whose kernels compute what is of a shard, and whose backward, given
m, s and a, is this one's. A shard without a finite logit has m_k = 0 and s_k = 0. Every process
adds up in the order of the shards, and so gets the same bits.
"""

import torch
import triton
import triton.language as tl

from fused.kernels import tuning
from fused.kernels.activation import exp
from fused.kernels.cross_entropy import (
    TRITON_DTYPE,
    computed_in,
    cross_entropy_bwd,
    cross_entropy_shard,
    rows_of_target,
)
from fused.kernels.cross_entropy_kernels import summed
from fused.kernels.cross_entropy_tile import row_offsets, safe_shift
from fused.kernels.device import on_its_device


@triton.jit(do_not_specialize=["n_rows", "n_shards", "n_all", "layout", "ignore_index"])
def _vocab_parallel_merge_kernel(
    shards_ptr,  # m, s, b and d of each row, n_all, layout; shape (n_shards, 4 * n_rows + 2)
    target_ptr,  # class indices, shape (n_rows / n_inner, n_inner)
    loss_ptr,  # out: loss of each row, shape (n_rows,), or None
    sums_ptr,  # out: each program's sum of losses, and its number of rows that are not ignored;
    #            shape (2, programs), or None
    stats_ptr,  # out: m, s and a of each row, shape (3, n_rows)
    n_rows,
    n_inner,
    n_shards,
    n_all,
    layout,
    stride_t,  # of n, c and s
    ignore_index,
    z_loss: tl.float64,
    Z_LOSS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss = sum_k (b_k * (log s + m - m_k) + d_k) + z_loss * lse^2, of BLOCK rows"""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    row_mask = rows < n_rows
    n = tl.cast(n_rows, tl.int64)
    y = tl.load(target_ptr + row_offsets(rows, n_inner, stride_t), mask=row_mask, other=0)
    y = y.to(tl.int64)
    valid = row_mask & (y != ignore_index)
    off = tl.zeros((BLOCK,), ACC)  # above 0 where the processes disagree
    m = tl.full((BLOCK,), float("-inf"), ACC)
    for k in range(n_shards):
        shard_ptr = shards_ptr + k * (4 * n + 2)
        m_k = tl.load(shard_ptr + rows, mask=valid, other=0.0)
        s_k = tl.load(shard_ptr + n + rows, mask=valid, other=0.0)
        m = tl.maximum(m, tl.where(s_k == 0.0, float("-inf"), m_k))
        off += tl.abs(tl.load(shard_ptr + 4 * n) - tl.cast(n_all, ACC))
        off += tl.abs(tl.load(shard_ptr + 4 * n + 1) - tl.cast(layout, ACC))
    wrong = valid & ((y < 0) | (y >= n_all) | (off > 0.0))
    m = safe_shift(m)
    s = tl.zeros((BLOCK,), ACC)
    b = tl.zeros((BLOCK,), ACC)
    loss = tl.zeros((BLOCK,), ACC)
    shard_rows = shards_ptr + rows
    for _ in range(n_shards):
        m_k = tl.load(shard_rows, mask=valid, other=0.0)
        s_k = tl.load(shard_rows + n, mask=valid, other=0.0)
        b_k = tl.load(shard_rows + 2 * n, mask=valid, other=0.0)
        d_k = tl.load(shard_rows + 3 * n, mask=valid, other=0.0)
        s += tl.where(s_k == 0.0, 0.0, s_k * exp(m_k - m))
        b += b_k
        loss += b_k * (m - m_k) + d_k
        shard_rows += 4 * n + 2
    log_s = tl.log(tl.where(valid, s, 1.0))
    loss += b * log_s
    a = b
    if Z_LOSS:
        coefficient = tl.full((), z_loss, ACC)
        lse = m + log_s
        loss += coefficient * lse * lse
        a += 2.0 * coefficient * lse
    loss = tl.where(wrong, float("nan"), tl.where(valid, loss, 0.0))
    if loss_ptr is not None:
        tl.store(loss_ptr + rows, loss, mask=row_mask)
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0), tl.sum(loss, axis=0))
        counts_ptr = sums_ptr + tl.num_programs(0)
        tl.store(counts_ptr + tl.program_id(0), tl.sum(valid.to(ACC), axis=0))
    tl.store(stats_ptr + rows, m, mask=row_mask)
    tl.store(stats_ptr + n + rows, tl.where(valid, s, 1.0), mask=row_mask)
    tl.store(stats_ptr + 2 * n + rows, tl.where(wrong, float("nan"), a), mask=row_mask)


@triton.jit(do_not_specialize=["n"])
def _vocab_parallel_reduce_kernel(
    sums_ptr,  # sums of losses and numbers of rows, shape (2, n)
    loss_ptr,  # out: their sum or mean, one number
    scale_ptr,  # out: what the mean multiplies a row by, one number; 1 for the sum
    n,
    MEAN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scale = 1 / count for the mean,  loss = scale * sum; by one program in a fixed order"""
    scale = tl.full((), 1.0, ACC)
    if MEAN:
        scale = 1.0 / summed(sums_ptr + n, n, ACC, BLOCK)
    tl.store(loss_ptr, scale * summed(sums_ptr, n, ACC, BLOCK))
    tl.store(scale_ptr, scale)


def shard_fwd(
    x: torch.Tensor,
    target: torch.Tensor,
    shard: tuple[int, int],
    layout: int,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
) -> torch.Tensor:
    """What the other processes need of this one's logits x (N, C, *S): a shard of the classes.

    shard is (the first of these classes, the number of all); target (N, *S) counts from the first
    of all. Returns m, s, b and d of each row, then the number of all classes, and `layout`, which
    stands for the widths of all shards: (4 * rows + 2,).

    Bytes: reads x once, the least possible; writes 16 bytes a row. Three launches.
    """
    acc, n_rows = computed_in(x, target), target.numel()
    own = torch.full((4 * n_rows + 2,), shard[1], dtype=acc, device=x.device)
    own[-1:].fill_(layout)
    stats = own[:-2].view(4, n_rows)
    cross_entropy_shard(
        x, target, shard, ignore_index, label_smoothing, softcap, logit_scale, stats
    )
    return own


@on_its_device
def merged(
    shards: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    n_all: int,
    layout: int,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    loss_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The loss, of what `shard_fwd` returned in each process: shards (processes, 4 * rows + 2).

    Returns (loss, stats, scale) as `cross_entropy_fwd` does, stats (3, rows) those of all classes;
    of x only shape and dtype count. Loss and a are NaN where the target is none of n_all classes,
    and everywhere if a process has another n_all or `layout`.

    Bytes: none of x's size; reads 24 bytes a row and process, writes 12 a row, 16 for "none". Two
    launches; one for "none".
    """
    acc, n_rows = shards.dtype, target.numel()
    reduced, target2 = reduction != "none", rows_of_target(x, target)
    plan = tuning.merge(n_rows)

    def new(*shape: int, dtype: torch.dtype = acc) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    stats = new(3, n_rows)
    sums = new(2, plan.n_programs) if reduced else None
    loss = new(dtype=loss_dtype) if reduced else new(*target.shape, dtype=loss_dtype)
    if n_rows > 0:
        _vocab_parallel_merge_kernel[(plan.n_programs,)](
            shards,
            target2,
            None if reduced else loss,
            sums,
            stats,
            n_rows,
            target2.shape[1],
            shards.shape[0],
            n_all,
            layout,
            (target2.stride(0), 0, target2.stride(1)),
            ignore_index,
            z_loss,
            Z_LOSS=z_loss != 0,
            ACC=TRITON_DTYPE[acc],
            BLOCK=plan.BLOCK,
            num_warps=plan.num_warps,
            enable_fp_fusion=False,
        )
    if not reduced:
        return loss, stats, None
    scale = new()
    _vocab_parallel_reduce_kernel[(1,)](
        sums,
        loss,
        scale,
        plan.n_programs,
        MEAN=reduction == "mean",
        ACC=TRITON_DTYPE[acc],
        BLOCK=tuning.scan(plan.n_programs),
        enable_fp_fusion=False,
    )
    return loss, stats, scale


def shard_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    shard: tuple[int, int],
    stats: torch.Tensor,
    scale: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    logit_scale: float,
    inplace: bool,
) -> torch.Tensor:
    """The gradient of the logits x, from the stats and scale of `merged`: `cross_entropy_bwd`'s.

    Bytes: reads x once and writes the gradient once. One launch.
    """
    numbers = (ignore_index, label_smoothing, 0.0, softcap, logit_scale)
    dx, _ = cross_entropy_bwd(
        dloss, x, target, None, stats, scale, *numbers, True, False, inplace, shard
    )
    assert dx is not None
    return dx
