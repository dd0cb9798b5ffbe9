"""Vocabulary-parallel cross-entropy: its forward over a process group, and its operators.

The collective is inside of the operator for the forward, which knows its group by name.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused.eager.cross_entropy_rows import computed_in
from fused.operators import implementation, library, process_group, register, register_gradient

library.define(
    "vocab_parallel_cross_entropy_fwd(Tensor input, Tensor target, str group, int n_shards, "
    "SymInt first, SymInt n_all, SymInt layout, int ignore_index, str reduction, "
    "float label_smoothing, float z_loss, float softcap, float logit_scale, ScalarType loss_dtype) "
    "-> (Tensor loss, Tensor stats, Tensor scale)"
)
library.define(
    "vocab_parallel_cross_entropy_bwd(Tensor dloss, Tensor input, Tensor target, Tensor stats, "
    "Tensor scale, SymInt first, SymInt n_all, int ignore_index, float label_smoothing, "
    "float softcap, float logit_scale) -> Tensor"
)


def forward(
    kernels: Any,
    input: Tensor,
    target: Tensor,
    group: Any,
    n_shards: int,
    first: int,
    n_all: int,
    layout: int,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, stats, scale), the same in every process: what each has of its own, then merged."""
    own = kernels.shard_fwd(
        input, target, (first, n_all), layout, ignore_index, label_smoothing, softcap, logit_scale
    )
    # The second is what the first was called before torch 2.13.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    shards = torch.empty(n_shards * own.numel(), dtype=own.dtype, device=own.device)
    gather(shards, own, group=group)
    shards = shards.view(n_shards, -1)
    merged: tuple[Tensor, Tensor, Tensor | None] = kernels.merged(
        shards, input, target, n_all, layout, ignore_index, reduction, z_loss, loss_dtype
    )
    return merged


def call(input: Tensor, target: Tensor, group: Any, *arguments: Any) -> Tensor:
    """The loss; the arguments are `forward`'s."""
    group = group or dist.group.WORLD
    loss: Tensor = torch.ops.fused.vocab_parallel_cross_entropy_fwd(
        input, target, group.group_name, *arguments
    )[0]
    return loss


def _fwd_operator(
    input: Tensor, target: Tensor, group: str, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = implementation("vocab_parallel_cross_entropy", input)
    loss, stats, scale = forward(kernels, input, target, process_group(group), *arguments)
    return loss, stats, stats.new_empty(0) if scale is None else scale


def _fwd_fake(
    input: Tensor,
    target: Tensor,
    group: str,
    n_shards: int,
    first: int,
    n_all: int,
    layout: int,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    loss_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    none = reduction == "none"
    loss = input.new_empty(target.shape if none else (), dtype=loss_dtype)
    stats = input.new_empty((3, target.numel()), dtype=computed_in(input, target))
    return loss, stats, stats.new_empty(0 if none else ())


def _bwd_operator(
    dloss: Tensor,
    input: Tensor,
    target: Tensor,
    stats: Tensor,
    scale: Tensor,
    first: int,
    n_all: int,
    *numbers: Any,
) -> Tensor:
    kernels = implementation("vocab_parallel_cross_entropy", input)
    factor = scale if scale.dim() == 0 else None
    dx: Tensor = kernels.shard_bwd(
        dloss, input, target, (first, n_all), stats, factor, *numbers, inplace=False
    )
    return dx


def _bwd_fake(dloss: Tensor, input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, _, _, first, n_all, _, ignore_index, _, smoothing, _, softcap, scale, _ = inputs
    ctx.save_for_backward(input, target, *output[1:])
    ctx.numbers = (first, n_all, ignore_index, smoothing, softcap, scale)


def _operator_backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx = torch.ops.fused.vocab_parallel_cross_entropy_bwd(dloss, *ctx.saved_tensors, *ctx.numbers)
    return (dx, *(None,) * 13)


register("vocab_parallel_cross_entropy_fwd", _fwd_operator, _fwd_fake)
register_gradient("vocab_parallel_cross_entropy_bwd", _bwd_operator, _bwd_fake)
torch.library.register_autograd(
    "fused::vocab_parallel_cross_entropy_fwd",
    _operator_backward,
    setup_context=_setup_context,
    lib=library,
)
