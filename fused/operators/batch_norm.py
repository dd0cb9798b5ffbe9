"""Batch normalisation for torch.compile: opaque operators that change none of their arguments.

The running statistics of a training step come back as new tensors and are copied into the buffers
by the graph. The signs for the backward of relu with a residual are an output whichever
implementation serves the graph, as it may be another one than when it was compiled.
"""

from typing import Any, cast

import torch
from torch import Tensor

from fused import backend
from fused.eager import batch_norm as eager
from fused.eager.batch_norm_native import computed_in, root_of_bessel
from fused.eager.batch_norm_small import (
    batch_norm_small,
    batch_norm_small_bwd,
    is_small,
)
from fused.operators import (
    implementation,
    laid_out_as,
    library,
    register,
    register_gradient,
)
from fused.second_order import batch_norm_gradients
from fused.transforms import is_composed

_TENSORS = "Tensor input, Tensor? weight, Tensor? bias, Tensor? residual"
library.define(
    f"batch_norm_fwd({_TENSORS}, Tensor? running_mean, Tensor? running_var, Tensor? tracked, "
    "float? momentum, float eps, int correction, str? activation, bool skip_nonfinite, "
    "bool keep) "
    "-> (Tensor y, Tensor mean, Tensor rstd, Tensor signs, Tensor running_mean, Tensor running_var)"
)
library.define(
    f"batch_norm_eval({_TENSORS}, Tensor mean, Tensor var, float eps, str? activation, bool keep) "
    "-> (Tensor y, Tensor mean, Tensor rstd, Tensor signs)"
)
library.define(
    "batch_norm_bwd(Tensor dy, Tensor input, Tensor? weight, Tensor? bias, Tensor? kept, "
    "Tensor mean, Tensor rstd, float eps, int correction, str? activation, bool batch_statistics, "
    "bool may_be_small, bool want_dresidual) "
    "-> (Tensor dx, Tensor dgamma, Tensor dbeta, Tensor dresidual)"
)


def call(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    keep: bool,
    batch_statistics: bool,
    momentum: float | None,
    eps: float,
    correction: int,
    activation: str | None,
    skip_nonfinite: bool,
) -> Tensor:
    """y; the running statistics are updated in place."""
    if not batch_statistics:
        return torch.ops.fused.batch_norm_eval(
            input, weight, bias, residual, running_mean, running_var, eps, activation, keep
        )[0]
    y, _, _, _, new_mean, new_var = torch.ops.fused.batch_norm_fwd(
        input, weight, bias, residual, running_mean, running_var,
        tracked if momentum is None else None, momentum, eps, correction, activation,
        skip_nonfinite, keep,
    )  # fmt: skip
    update_buffers(running_mean, running_var, tracked, new_mean, new_var)
    return y


def update_buffers(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    new_mean: Tensor,
    new_var: Tensor,
) -> None:
    if running_mean is not None and running_var is not None:
        running_mean.copy_(new_mean.detach())
        running_var.copy_(new_var.detach())
    if tracked is not None:
        tracked.add_(1)


def _fwd_operator(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    kernels = implementation("batch_norm", input, weight, bias, residual)
    tracked, momentum, eps, correction, activation, skip_nonfinite, keep = arguments
    # Changed in place by what follows, but no argument is: the graph has buffers and counts itself.
    new_mean, new_var, counter = (
        None if t is None else t.clone() for t in (running_mean, running_var, tracked)
    )
    small = None
    if _may_be_small(momentum, skip_nonfinite) and is_small(input) and kernels is eager:
        small = batch_norm_small(
            input, weight, bias, residual, new_mean, new_var, counter, momentum, eps, correction,
            activation,
        )  # fmt: skip
    if small is not None:
        kept, (y, mean, rstd) = small[0], small
        if correction:
            rstd = rstd * root_of_bessel(input.shape[0])
    else:
        y, mean, rstd, kept = kernels.batch_norm_fwd(
            input, weight, bias, residual, new_mean, new_var, counter, *arguments[1:]
        )
    new = (mean.new_empty(0) if t is None else t for t in (new_mean, new_var))
    signs = kept_signs(input, residual, activation, keep, kept)
    return laid_out_as(y, input), mean, rstd, signs, *new


def fwd_fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    mean = of_channels(input)
    *_, activation, _, keep = arguments
    signs = _empty_signs(input, residual, activation, keep)
    new = (torch.empty_like(mean.new_empty(0) if t is None else t)
           for t in (running_mean, running_var))  # fmt: skip
    return torch.empty_like(input), mean, torch.empty_like(mean), signs, *new


def _eval_operator(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    kernels = implementation("batch_norm", input, weight, bias, residual)
    y, mean, rstd, kept = kernels.batch_norm_eval(input, weight, bias, residual, *rest)
    *_, activation, keep = rest
    signs = kept_signs(input, residual, activation, keep, kept)
    return laid_out_as(y, input), mean, rstd, signs


def _eval_fake(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *_, activation, keep = rest
    signs = _empty_signs(input, residual, activation, keep)
    return torch.empty_like(input), of_channels(input), of_channels(input), signs


def _empty_signs(
    input: Tensor, residual: Tensor | None, activation: str | None, keep: bool
) -> Tensor:
    taken = _takes_signs(residual, activation, keep)
    shape = _layout().signs_shape(input) if taken else (0,)
    return input.new_empty(shape, dtype=torch.uint8)


def kept_signs(
    input: Tensor, residual: Tensor | None, activation: str | None, keep: bool, kept: Tensor | None
) -> Tensor:
    """What an implementation kept as signs: it may have kept y."""
    if not _takes_signs(residual, activation, keep) or input.numel() == 0:
        return _empty_signs(input, residual, activation, keep)
    assert kept is not None
    return kept if kept.dtype == torch.uint8 else _layout().pack_signs(kept, input)


def as_kept_by(kernels: Any, kept: Tensor | None, input: Tensor) -> Tensor | None:
    """What another implementation may have kept, or `kept_signs`, as this one keeps it."""
    if kept is not None and kept.dtype == torch.uint8 and kernels is eager:
        return cast(Tensor, _layout().unpack_signs(kept, input))
    return kept


def _may_be_small(momentum: float | None, skip_nonfinite: bool) -> bool:
    """Whether eager mode may leave a training step to PyTorch's own operations."""
    return momentum is not None and not skip_nonfinite


def _layout() -> Any:
    """Of signs; imported when it is needed, as all of fused.kernels is."""
    from fused.kernels import batch_norm_layout

    return batch_norm_layout


def _takes_signs(residual: Tensor | None, activation: str | None, keep: bool) -> bool:
    return keep and activation == "relu" and residual is not None


def _bwd_operator(
    dy: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, kept: Tensor | None,
    mean: Tensor, rstd: Tensor, eps: float, correction: int, activation: str | None,
    batch_statistics: bool, may_be_small: bool, want_dresidual: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    kernels = implementation("batch_norm", input, weight, bias, dy)
    kept = as_kept_by(kernels, kept, input)
    dresidual: Tensor | None
    small = None
    if may_be_small and is_small(input) and kernels is eager:
        small = batch_norm_small_bwd(dy, input, weight, bias, kept, eps, correction, activation)
    if small is not None:
        dx, dgamma, dbeta, dz = small
        dresidual = dz if want_dresidual else None
    else:
        dx, dgamma, dbeta, dresidual = kernels.batch_norm_bwd(
            dy, input, weight, bias, kept, mean, rstd, correction, activation, batch_statistics,
            want_dresidual,
        )  # fmt: skip
    if dresidual is None:
        return laid_out_as(dx, input), dgamma, dbeta, dgamma.new_empty(0)
    return laid_out_as(dx, input), dgamma, dbeta, laid_out_as(dresidual, input)


def _bwd_fake(
    dy: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    mean, want_dresidual = of_channels(input), arguments[-1]
    dgamma, dbeta = (torch.empty_like(mean if t is None else t) for t in (weight, bias))
    dresidual = torch.empty_like(input) if want_dresidual else dgamma.new_empty(0)
    return torch.empty_like(input), dgamma, dbeta, dresidual


def of_dtype_alone(bias: Tensor | None) -> Tensor | None:
    """For a backward that computes nothing from the bias, which may be changed before it is run."""
    if bias is None:
        return None
    # Not empty_like: a compiled backward would do it again, of the bias.
    return torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)


def of_channels(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=computed_in(input))


def _setup_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    momentum, eps, correction, activation, skip_nonfinite, _ = inputs[7:]
    set_up(ctx, inputs, output, eps, correction, activation)
    ctx.batch_statistics, ctx.may_be_small = True, _may_be_small(momentum, skip_nonfinite)


def _setup_eval(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    set_up(ctx, inputs, output, eps=0.0, correction=0, activation=inputs[7])
    ctx.batch_statistics = ctx.may_be_small = False


def set_up(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: tuple[Tensor, ...],
    eps: float,
    correction: int,
    activation: str | None,
    *more: Tensor,
) -> None:
    """Saves what the backward takes, `more` besides."""
    input, weight, bias, residual, *rest = inputs
    y, mean, rstd, signs, *_ = output
    what = backend.implementation("batch_norm", input).keeps(activation, input, residual)
    if _takes_signs(residual, activation, keep=True):
        what = "signs"
    kept = {"signs": signs, "output": y, "residual": residual, None: None}[what]
    if activation is None:
        bias = of_dtype_alone(bias)
    ctx.save_for_backward(input, weight, bias, kept, mean, rstd, *more)
    ctx.kept_residual = kept is residual
    ctx.eps, ctx.correction, ctx.activation, ctx.rest = eps, correction, activation, len(rest)


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    tensors, wants = ctx.saved_tensors, ctx.needs_input_grad[:4]
    if is_composed(dy):
        input, weight, bias, kept, mean, rstd = tensors
        frozen = (None, None) if ctx.batch_statistics else (mean, rstd)
        gradients = batch_norm_gradients(
            dy, input, weight, bias, kept, ctx.kept_residual, frozen, ctx.eps, ctx.correction,
            ctx.activation, wants,
        )  # fmt: skip
        return (*gradients, *(None,) * ctx.rest)
    want_dz = wants[3] and ctx.activation is not None  # without an activation dz is dy
    dx, dgamma, dbeta, dz = torch.ops.fused.batch_norm_bwd(
        dy, *tensors, ctx.eps, ctx.correction, ctx.activation, ctx.batch_statistics,
        ctx.may_be_small, want_dz,
    )  # fmt: skip
    return (
        dx,
        dgamma if wants[1] else None,
        dbeta if wants[2] else None,
        (dz if want_dz else dy) if wants[3] else None,
        *(None,) * ctx.rest,
    )


register("batch_norm_fwd", _fwd_operator, fwd_fake)
register("batch_norm_eval", _eval_operator, _eval_fake)
register_gradient("batch_norm_bwd", _bwd_operator, _bwd_fake)
for _name, _context in (("batch_norm_fwd", _setup_fwd), ("batch_norm_eval", _setup_eval)):
    torch.library.register_autograd(
        f"fused::{_name}", _backward, setup_context=_context, lib=library
    )
