"""Cross-entropy of logits whose classes are split over processes; no logit leaves its process."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused import backend
from fused.cross_entropy import cross_entropy
from fused.cross_entropy_arguments import (
    check,
    check_inplace,
    loss_dtype_of,
    may_be_overwritten,
    options_of,
)
from fused.operators import vocab_parallel_cross_entropy as operators
from fused.transforms import (
    is_composed,
    is_recorded,
    may_be_overridden,
    refuse_transforms,
    saves_elsewhere,
)

_LAYOUT = 10368889  # odd, and no width is near it


class VocabParallelCrossEntropyFunction(torch.autograd.Function):
    """dlogits = dloss * (softmax - onehot) of the own classes, from the sums over all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        group: Any,
        n_shards: int,
        shard: tuple[int, int],
        layout: int,
        options: Any,
        loss_dtype: torch.dtype,
        inplace: bool,
    ) -> Tensor:
        kernels = backend.implementation("vocab_parallel_cross_entropy", input)
        arguments = (n_shards, *shard, layout, *options, loss_dtype)
        loss, stats, scale = operators.forward(kernels, input, target, group, *arguments)
        ctx.save_for_backward(input, target, stats, scale)
        ctx.kernels, ctx.shard, ctx.options, ctx.inplace = kernels, shard, options, inplace
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if is_composed(dloss):
            raise RuntimeError(
                "vocab_parallel_cross_entropy: expected create_graph=False and "
                "is_grads_batched=False: its gradient is computed once, and differentiating it "
                "would take the logits of the other processes"
            )
        input, target, stats, scale = ctx.saved_tensors
        o = ctx.options
        numbers = (o.ignore_index, o.label_smoothing, o.softcap, o.logit_scale)
        dx = ctx.kernels.shard_bwd(
            dloss, input, target, ctx.shard, stats, scale, *numbers, ctx.inplace
        )
        if ctx.inplace:  # no graph that saved the logits may run from here on, this one included
            increment_version(input)
        return (dx, *(None,) * 8)


def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    group: Any = None,
    *,
    widths: Sequence[int] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
) -> Tensor:
    """`cross_entropy` of class indices, where each process has the logits of some of the classes.

    The loss of tensor parallelism: a linear layer's weight is split by its outputs, over the
    processes of `group`, and so are the logits. In the order of the ranks the slices make up all
    classes; what F.cross_entropy gives for their concatenation is returned in every process, and
    its gradient for the own slice. With k the slices, over whose own classes each process sums,

        m_k = max_c z_c        s_k = sum_c exp(z_c - m_k)        z_y where the class y is its own
        m = max_k m_k          s = sum_k s_k * exp(m_k - m)      lse = m + log s
        loss = lse - z_y       dz_c = exp(z_c - m) / s - [c = y]

    Options as in `cross_entropy`, whose kernels these are. The forward reads the slice once and
    gathers 16 bytes a row from every process (32 for float64): one collective, an all-gather,
    merged in the order of the ranks, so that all processes get the same bits. The backward reads
    the slice and writes the gradient, each once, without a collective: 2 reads and 1 write of the
    slice, the least where a slice does not stay on chip while the processes meet. No host
    synchronisation on a GPU. Where there is one process, it is `cross_entropy`.

    The upstream gradient is taken to be the same in every process, as it is where every process
    goes on with the loss in the same way; gradients are not summed over processes. Second
    derivatives would take the other processes' logits: `create_graph=True` raises, and so do
    functional derivatives (`torch.func`). `torch.compile(fullgraph=True)` gives the bits of eager
    mode.

    Args:
        input: this process's slice of the logits, shape (N, C_k) or (N, C_k, d1, ..., dk), float16,
            bfloat16, float32 or float64, any strides. C_k may be 0.
        target: class indices in [0, C), C the number of all classes, int64, int32 or uint8, shape
            (N,) or (N, d1, ..., dk); the same in every process.
        group: the process group, of which this process is one; None for all processes.
        widths: C_k of every process, in the order of the ranks. None if they are all equal.
        ignore_index: rows with this class index have loss 0 and gradient 0 and do not count in the
            mean.
        reduction: "mean", "sum", or "none" for the losses of the rows.
        label_smoothing: share of the target that is spread over all C classes.
        z_loss: coefficient of lse^2, which is added to the loss of each row.
        softcap: z = softcap * tanh(logit_scale * input / softcap); None for no cap.
        logit_scale: factor of the logits, applied before the cap.
        inplace: lets the gradient be written over the logits, which must not be used after the
            call; where autograd would, it raises. No effect where `cross_entropy`'s has none.

    Returns:
        The loss: a 0-d tensor, or for "none" the shape of target, in input's dtype; float32 for
        half precision under autocast. A mean over no rows is NaN.

    Raises:
        ValueError: as `cross_entropy`; `widths` that do not fit this process; and, on the CPU,
            slices of unequal width without `widths`, or `widths` that are not the same in every
            process. On a GPU looking would stall the device: there the loss is NaN.
        RuntimeError: as `cross_entropy`; a target of probabilities; a process outside the group; a
            transform of torch.func.
        TypeError: as `cross_entropy`; a DTensor, which `cross_entropy` takes.
        NotImplementedError: an input that is not floating point.
        IndexError: a class index outside [0, C), on the CPU. On a GPU such a row has loss and
            gradient NaN.

    The method is that of Megatron-LM (Shoeybi et al., 2019), which takes three collectives.
    """
    if has_torch_function_variadic(input, target) and may_be_overridden():
        return handle_torch_function(
            vocab_parallel_cross_entropy, (input, target), input, target, group=group,
            widths=widths, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            logit_scale=logit_scale, inplace=inplace,
        )  # fmt: skip
    options = options_of(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale)
    _check(input, target, options)
    n_shards, rank = 1, 0
    if dist.is_available() and dist.is_initialized():
        n_shards, rank = dist.get_world_size(group), dist.get_rank(group)
    if n_shards > 1:
        refuse_transforms("vocab_parallel_cross_entropy", "fused.cross_entropy", input, target)
    shard, layout = _shard(input.shape[1], rank, n_shards, widths)
    if n_shards == 1:
        return cross_entropy(
            input, target, None, *options[:3], z_loss=z_loss, softcap=softcap,
            logit_scale=logit_scale, inplace=inplace,
        )  # fmt: skip
    loss_dtype = loss_dtype_of(input, target, None)
    if is_recorded():
        return operators.call(input, target, group, n_shards, *shard, layout, *options, loss_dtype)
    inplace = inplace and input.requires_grad and torch.is_grad_enabled()
    if inplace:
        check_inplace(input)
        inplace = may_be_overwritten(input) and not saves_elsewhere()
    loss: Tensor = VocabParallelCrossEntropyFunction.apply(
        input, target, group, n_shards, shard, layout, options, loss_dtype, inplace
    )
    return loss


def _check(input: Tensor, target: Tensor, options: Any) -> None:
    if input.dim() < 2:
        raise RuntimeError(
            "vocab_parallel_cross_entropy: expected input of shape (N, C) or (N, C, ...), "
            f"got {tuple(input.shape)}"
        )
    if target.is_floating_point():
        raise RuntimeError(
            "vocab_parallel_cross_entropy: expected target of dtype int64, int32 or uint8 (class "
            f"indices), got {target.dtype}"
        )
    check(input, target, None, options)


def _shard(
    width: int, rank: int, n_shards: int, widths: Sequence[int] | None
) -> tuple[tuple[int, int], int]:
    """((the first class of this process, the number of all classes), a number for all widths)

    The last is below 2^24, so that a float32 takes it to the other processes, which are to have the
    same.
    """
    if rank < 0:
        raise RuntimeError(
            "vocab_parallel_cross_entropy: expected a group that this process is one of"
        )
    if widths is None:
        return (rank * width, n_shards * width), width * _layout([1] * n_shards) % 2**24
    if len(widths) != n_shards or widths[rank] != width:
        raise ValueError(
            f"vocab_parallel_cross_entropy: expected widths of {n_shards} processes, "
            f"{width} at place {rank}, got {list(widths)}"
        )
    return (sum(widths[:rank]), sum(widths)), _layout(widths)


def _layout(widths: Sequence[int]) -> int:
    layout = 0
    for width in widths:
        layout = (layout * _LAYOUT + width) % 2**24
    return layout
