"""SyncBatchNorm: its forward and backward over a process group, and its operators.

The collectives are inside of the operators, which know their group by name; otherwise they are as
those of fused.operators.batch_norm.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused.eager.batch_norm import update_running
from fused.operators import (
    implementation,
    laid_out_as,
    library,
    process_group,
    register,
    register_gradient,
)
from fused.operators.batch_norm import (
    as_kept_by,
    fwd_fake,
    kept_signs,
    of_channels,
    set_up,
    update_buffers,
)

library.define(
    "sync_batch_norm_fwd(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? running_mean, Tensor? running_var, Tensor? tracked, str group, bool keep, "
    "float? momentum, float eps, int correction, str? activation, bool skip_nonfinite) "
    "-> (Tensor y, Tensor mean, Tensor rstd, Tensor signs, Tensor running_mean, "
    "Tensor running_var, Tensor count)"
)
library.define(
    "sync_batch_norm_bwd(Tensor dy, Tensor input, Tensor? weight, Tensor? bias, Tensor? kept, "
    "Tensor mean, Tensor rstd, Tensor count, str group, int correction, str? activation, "
    "bool want_dresidual) -> (Tensor dx, Tensor sums, Tensor dresidual)"
)


def forward(
    kernels: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    group: Any,
    keep: bool,
    momentum: float | None,
    eps: float,
    correction: int,
    activation: str | None,
    skip_nonfinite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(y, mean, rstd, kept) of `batch_norm_fwd`, and the number of all processes' rows."""
    mean, m2 = kernels.batch_norm_moments(input)
    mean, m2, count = _merged(mean, m2, input.numel() // max(1, input.shape[1]), group)
    if count.is_cpu and count == 1:  # elsewhere nobody may look
        raise ValueError(
            "SyncBatchNorm: expected more than 1 value per channel in training, got 1 in all "
            "processes together; one value has no variance"
        )
    # Of fewer rows than two there is nothing to keep: no number comes out.
    skip = skip_nonfinite or count < 2
    update_running(running_mean, running_var, tracked, momentum, mean, m2 / (count - 1), skip)
    var = m2 / (count - correction)
    y, mean, rstd, kept = kernels.batch_norm_eval(
        input, weight, bias, residual, mean, var, eps, activation, keep
    )
    return y, mean, rstd, kept, count


def backward(
    kernels: Any,
    group: Any,
    correction: int,
    activation: str | None,
    want_dresidual: bool,
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx; dgamma and dbeta (2, C) of this process's rows; and dresidual, None if not wanted."""
    tensors = (input, weight, bias, kept, mean, rstd)
    own, dresidual = kernels.batch_norm_sums(dy, *tensors, activation, want_dresidual)
    total = own.clone()
    dist.all_reduce(total, group=group)
    # dresidual is dz, but for its rounding, whose sums may be others.
    if dresidual is not None and (activation == "relu" or dresidual.dtype == mean.dtype):
        dy, activation = dresidual, None
    return (
        kernels.batch_norm_dx(dy, *tensors, total, count, correction, activation),
        own,
        dresidual,
    )


def _merged(mean: Tensor, m2: Tensor, rows: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, m2, count) of all processes' rows, from this one's; the same bits in each."""
    own = torch.cat((mean, m2.to(mean.dtype), mean.new_full((1,), rows)))
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    channels = mean.numel()
    means, m2s, counts = torch.stack(everyone).split((channels, channels, 1), dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    return mean, m2s.sum(0) + (counts * (means - mean).square()).sum(0), count


def call(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    group: Any,
    keep: bool,
    momentum: float | None,
    *options: Any,
) -> Tensor:
    """y; the running statistics are updated in place. The arguments are `forward`'s."""
    group = group or dist.group.WORLD
    y, _, _, _, new_mean, new_var, _ = torch.ops.fused.sync_batch_norm_fwd(
        input, weight, bias, residual, running_mean, running_var,
        tracked if momentum is None else None, group.group_name, keep, momentum, *options,
    )  # fmt: skip
    update_buffers(running_mean, running_var, tracked, new_mean, new_var)
    return y


def _fwd_operator(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    group: str,
    keep: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    kernels = implementation("batch_norm", input)
    # Changed in place by what follows, but no argument is: the graph has buffers and counts itself.
    new_mean, new_var, counter = (
        None if t is None else t.clone() for t in (running_mean, running_var, tracked)
    )
    y, mean, rstd, kept, count = forward(
        kernels, input, weight, bias, residual, new_mean, new_var, counter, process_group(group),
        keep, *options,
    )  # fmt: skip
    *_, activation, _ = options
    signs = kept_signs(input, residual, activation, keep, kept)
    new = (mean.new_empty(0) if t is None else t for t in (new_mean, new_var))
    return laid_out_as(y, input), mean, rstd, signs, *new, count


def _fwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, _tracked, _group, keep, momentum, eps, correction, activation, skip = arguments
    # As batch_norm_fwd's, and the count.
    outputs = fwd_fake(*tensors, None, momentum, eps, correction, activation, skip, keep)
    return *outputs, outputs[1].new_empty(())


def _bwd_operator(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor,
    group: str,
    correction: int,
    activation: str | None,
    want_dresidual: bool,
) -> tuple[Tensor, ...]:
    kernels = implementation("batch_norm", input)
    kept = as_kept_by(kernels, kept, input)
    dx, sums, dresidual = backward(
        kernels, process_group(group), correction, activation, want_dresidual,
        dy, input, weight, bias, kept, mean, rstd, count,
    )  # fmt: skip
    dresidual = sums.new_empty(0) if dresidual is None else laid_out_as(dresidual, input)
    return laid_out_as(dx, input), sums, dresidual


def _bwd_fake(dy: Tensor, input: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    vector, want_dresidual = of_channels(input), arguments[-1]
    dresidual = torch.empty_like(input) if want_dresidual else vector.new_empty(0)
    return torch.empty_like(input), vector.new_empty(2, len(vector)), dresidual


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    group, _, _, eps, correction, activation, _ = inputs[7:]
    set_up(ctx, inputs, output, eps, correction, activation, output[-1])
    ctx.group = group


def _operator_backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    tensors, wants = ctx.saved_tensors, ctx.needs_input_grad[:4]
    _, weight, bias, *_ = tensors
    want_dz = wants[3] and ctx.activation is not None  # without an activation dz is dy
    dx, sums, dz = torch.ops.fused.sync_batch_norm_bwd(
        dy, *tensors, ctx.group, ctx.correction, ctx.activation, want_dz
    )
    return (
        dx,
        sums[0].to(weight.dtype) if wants[1] else None,
        sums[1].clone().to(bias.dtype) if wants[2] else None,  # no two of them share memory
        (dz if want_dz else dy) if wants[3] else None,
        *(None,) * ctx.rest,
    )


register("sync_batch_norm_fwd", _fwd_operator, _fwd_fake)
register_gradient("sync_batch_norm_bwd", _bwd_operator, _bwd_fake)
torch.library.register_autograd(
    "fused::sync_batch_norm_fwd", _operator_backward, setup_context=_setup_context, lib=library
)
