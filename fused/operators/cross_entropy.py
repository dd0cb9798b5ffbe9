"""Cross-entropy for torch.compile: two opaque operators with shapes known in advance.

The gradient is formed in the backward: 2 reads and 1 write of the logits. One formed in the forward
would have to be multiplied by the upstream gradient into new memory, as an operator may not return
what it was given: 2 reads and 2 writes, and a third tensor of their size. Where eager mode forms it
in the forward (`early`), the backward does what eager mode does there and then, in that order, for
the same bits; so it does where eager mode leaves a `plain` call of few logits to PyTorch.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fused import backend
from fused.eager import cross_entropy as eager
from fused.eager.cross_entropy_small import (
    cross_entropy_small,
    cross_entropy_small_bwd,
    is_small,
)
from fused.operators import implementation, library, register, register_gradient
from fused.second_order import cross_entropy_gradients
from fused.transforms import is_composed

_OPTIONS = "float label_smoothing, float z_loss, float softcap, float logit_scale"
library.define(
    "cross_entropy_fwd(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
    f"str reduction, {_OPTIONS}, ScalarType loss_dtype, bool want_extras, bool early, bool plain) "
    "-> (Tensor loss, Tensor stats, Tensor scale, Tensor row_loss, Tensor lse, Tensor correct, "
    "Tensor prediction)"
)
library.define(
    "cross_entropy_bwd(Tensor dloss, Tensor input, Tensor target, Tensor? weight, Tensor stats, "
    f"Tensor scale, int ignore_index, str reduction, {_OPTIONS}, bool early, bool plain, "
    "bool want_dx, bool want_dtarget, bool want_dweight) "
    "-> (Tensor dx, Tensor dtarget, Tensor dweight)"
)


def call(*arguments: Any) -> tuple[Tensor, ...]:
    """(loss,), or the fields of CrossEntropyOutput; the arguments are `cross_entropy_fwd`'s."""
    loss, _, _, *extras = torch.ops.fused.cross_entropy_fwd(*arguments)
    want_extras = arguments[-3]
    return (loss, *(t.detach() for t in extras)) if want_extras else (loss,)


def stats_for_kernels(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    numbers: tuple[float, float, float, float],
    want_extras: bool,
) -> Tensor:
    """What the Triton kernels' backward takes of a forward that they did not serve.

    They may serve the backward all the same, where `fused.backend.use` has ended.
    """
    if backend.kernels_could_serve(input):
        return eager.cross_entropy_stats(input, target, weight, *numbers, want_extras)
    return _stats_like(input, target, want_extras).fill_(0.0)  # nobody will look at them


def _fwd_operator(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    *numbers, loss_dtype, want_extras, _, plain = arguments
    kernels = implementation("cross_entropy", input, target, weight)
    stats = scale = extras = None
    if _is_torchs(plain, input, target):
        with eager.index_errors(target, input.shape[1], ignore_index):
            loss = cross_entropy_small(input, target, ignore_index, reduction).to(loss_dtype)
        if backend.kernels_could_serve(input):
            scale = eager.row_scale(input, target, weight, ignore_index, reduction)
        elif reduction != "none":
            scale = loss.new_ones(())
    else:
        loss, stats, scale, extras = kernels.cross_entropy_fwd(
            input, target, weight, ignore_index, reduction, *numbers, loss_dtype, want_extras
        )
    if stats is None:
        stats = stats_for_kernels(input, target, weight, (*numbers,), want_extras)
    scale = stats.new_empty(0) if scale is None else scale.to(stats.dtype)
    return (loss, stats, scale, *(extras or (stats.new_empty(0) for _ in range(4))))


def _is_torchs(plain: bool, input: Tensor, target: Tensor) -> bool:
    return plain and is_small(input, target) and backend.name_for(input) == "eager"


def _fwd_fake(
    input: Tensor,
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
    early: bool,
    plain: bool,
) -> tuple[Tensor, ...]:
    rows = input.shape[:1] + input.shape[2:]
    loss = input.new_empty(rows if reduction == "none" else (), dtype=loss_dtype)
    stats = _stats_like(input, target, want_extras)
    scale = stats.new_empty(0 if reduction == "none" else ())
    if not want_extras:
        return loss, stats, scale, *(stats.new_empty(0) for _ in range(4))
    row_loss = stats.new_empty(rows, dtype=loss_dtype if reduction == "none" else stats.dtype)
    lse, prediction = stats.new_empty(rows), stats.new_empty(rows, dtype=torch.int64)
    return loss, stats, scale, row_loss, lse, prediction.new_empty(()), prediction


def _bwd_operator(
    dloss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    scale: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    early: bool,
    plain: bool,
    want_dx: bool,
    want_dtarget: bool,
    want_dweight: bool,
) -> tuple[Tensor, ...]:
    kernels = implementation("cross_entropy", input, target, weight, dloss)
    numbers = (label_smoothing, z_loss, softcap, logit_scale)
    dtarget = dweight = None
    if _is_torchs(plain, input, target):
        found = cross_entropy_small_bwd(dloss, input, target, ignore_index, reduction)
        dx = torch.empty_like(input).copy_(found)  # in the strides that were promised
    elif early:
        _, _, dx = kernels.cross_entropy_fwd_bwd(
            input, target, weight, ignore_index, reduction, *numbers, dloss.dtype, False, False
        )
        dx = kernels.cross_entropy_scale(dx, dloss)
    else:
        dx, dtarget = kernels.cross_entropy_bwd(
            dloss,
            input,
            target,
            weight,
            None if kernels is eager else stats,
            scale if scale.dim() == 0 else None,
            ignore_index,
            *numbers,
            want_dx,
            want_dtarget,
            inplace=False,
        )
    if want_dweight and weight is not None:
        dweight = eager.cross_entropy_dweight(
            dloss, input, target, weight, ignore_index, reduction, *numbers
        )
    return (
        stats.new_empty(0) if dx is None else dx,
        stats.new_empty(0) if dtarget is None else dtarget,
        stats.new_empty(0) if dweight is None else dweight,
    )


def _bwd_fake(
    dloss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    scale: Tensor,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    wants = zip((input, target, weight), arguments[-3:], strict=True)
    return tuple(
        torch.empty_like(t) if want and t is not None else stats.new_empty(0) for t, want in wants
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, weight, *options = inputs
    ctx.save_for_backward(input, target, weight, output[1], output[2])
    ctx.options = (*options[:6], *options[-2:])


def _operator_backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    wants, none = ctx.needs_input_grad[:3], (None,) * 10
    if is_composed(dloss):
        tensors, options = ctx.saved_tensors[:3], ctx.options[:6]
        return (*cross_entropy_gradients(dloss, tensors, options, wants), *none)
    gradients = torch.ops.fused.cross_entropy_bwd(dloss, *ctx.saved_tensors, *ctx.options, *wants)
    return (*(g if want else None for g, want in zip(gradients, wants, strict=True)), *none)


def _stats_like(input: Tensor, target: Tensor, want_extras: bool) -> Tensor:
    rows = input.shape[0] * math.prod(input.shape[2:])
    shape = (4 if want_extras else 3, rows)
    return input.new_empty(shape, dtype=eager.computed_in(input, target))


register("cross_entropy_fwd", _fwd_operator, _fwd_fake)
register_gradient("cross_entropy_bwd", _bwd_operator, _bwd_fake)
torch.library.register_autograd(
    "fused::cross_entropy_fwd", _operator_backward, setup_context=_setup_context, lib=library
)
