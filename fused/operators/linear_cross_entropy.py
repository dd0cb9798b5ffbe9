"""Linear layer and cross-entropy for torch.compile: opaque operators."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fused import backend
from fused.eager import cross_entropy as eager
from fused.eager import linear_cross_entropy as chunked
from fused.eager.linear_cross_entropy import Problem
from fused.operators import (
    implementation,
    laid_out_as,
    library,
    register,
    register_gradient,
)
from fused.operators.cross_entropy import stats_for_kernels

_PROBLEM = (
    "Tensor x, Tensor w, Tensor? b, Tensor target, Tensor? weight, int ignore_index, "
    "str reduction, float label_smoothing, float z_loss, float softcap, float logit_scale, "
    "ScalarType loss_dtype, int budget"
)
_WANTS = "bool want_dx, bool want_dw, bool want_db"
library.define(
    f"linear_cross_entropy_fwd({_PROBLEM}, {_WANTS}, bool want_extras, "
    "ScalarType? summed_in=None) -> (Tensor loss, "
    "Tensor row_loss, Tensor lse, Tensor correct, Tensor prediction, Tensor stats, Tensor scale, "
    "Tensor dx, Tensor dw, Tensor db)"
)
# The factor of the gradients, as it came. It ties them to the tensors that they are gradients of,
# which they are not computed from: a derivative of theirs would take them for constants.
library.define(
    "linear_cross_entropy_once(Tensor factor, Tensor? x, Tensor? w, Tensor? b) -> Tensor factor"
)
library.define(
    f"linear_cross_entropy_bwd(Tensor dloss, Tensor stats, {_PROBLEM}, {_WANTS}) "
    "-> (Tensor dx, Tensor dw, Tensor db)"
)


def call(p: Problem, wants: tuple[bool, ...], want_extras: bool) -> tuple[Tensor, ...]:
    """(loss,), or the fields of CrossEntropyOutput."""
    # Of a number of rows that only the graph's run will tell, the operator and its fake would not
    # agree. Other recorders do not look again whether a graph still fits.
    summed_in = None
    if wants[1] and p.reduction != "none" and torch.compiler.is_compiling():
        summed_in = chunked.dw_dtype(p.x, p.w, p.reduction, p.budget)
    loss, *outputs = torch.ops.fused.linear_cross_entropy_fwd(*p, *wants, want_extras, summed_in)
    return (loss, *(t.detach() for t in outputs[:4])) if want_extras else (loss,)


def _of(*arguments: Any) -> tuple[Problem, tuple[bool, bool, bool], bool, torch.dtype | None]:
    """The operator's arguments; its schema leaves defaults away."""
    summed_in = arguments[17] if len(arguments) > 17 else None
    return Problem(*arguments[:13]), arguments[13:16], arguments[16], summed_in


def _fwd_operator(*arguments: Any) -> tuple[Tensor, ...]:
    p, wants, want_extras, summed_in = _of(*arguments)
    kernels: Any = implementation("cross_entropy", *p[:5])
    if p.reduction == "none" and kernels is eager and backend.kernels_could_serve(p.x):
        kernels = SimpleNamespace(cross_entropy_fwd=_fwd_with_stats)
    done = chunked.linear_cross_entropy_fwd(kernels, p, wants, want_extras, summed_in)
    nothing = p.x.new_empty(0, dtype=p.computed_in)
    # Gradients leave unscaled: the upstream gradient may be a loss scale that they need.
    g = done.gradients
    gradients = (None, None, None) if g is None else (g.dx, g.dw, g.db)
    if g is not None and g.dx is not None:
        gradients = (laid_out_as(g.dx, p.x), g.dw, g.db)
    return (
        done.loss,
        *(done.extras or (nothing.new_empty(0) for _ in range(4))),
        _stats_like(p, want_extras).fill_(0.0) if done.stats is None else done.stats,
        torch.ones_like(nothing.sum()) if done.scale is None else done.scale,
        *(nothing.new_empty(0) if t is None else t for t in gradients),
    )


def _fwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    p, wants, want_extras, summed_in = _of(*arguments)
    rows = (p.x.shape[0], *p.w.shape[1:-1])
    none = p.reduction == "none"
    wide = p.x.new_empty((), dtype=p.computed_in)
    extras = [wide.new_empty(0) for _ in range(4)]
    if want_extras:
        extras[0] = wide.new_empty(rows, dtype=p.loss_dtype if none else None)
        extras[1] = wide.new_empty(rows)
        extras[2] = wide.new_empty((), dtype=torch.int64)
        extras[3] = wide.new_empty(rows, dtype=torch.int64)
    gradients: list[Tensor | None] = [None, None, None]
    if not none and any(wants):
        made = chunked.Gradients(p, wants, p.x, summed_in)
        gradients = [made.dx, made.dw, made.db]
    return (
        p.x.new_empty(rows if none else (), dtype=p.loss_dtype),
        *extras,
        _stats_like(p, want_extras),
        torch.empty_like(wide),
        *(wide.new_empty(0) if t is None else t for t in gradients),
    )


def _fwd_with_stats(
    x: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any
) -> tuple[Any, ...]:
    loss, _, scale, extras = eager.cross_entropy_fwd(x, target, weight, *arguments)
    _, _, *numbers, _, want_extras = arguments
    return loss, stats_for_kernels(x, target, weight, (*numbers,), want_extras), scale, extras


def _stats_like(p: Problem, want_extras: bool) -> Tensor:
    rows = p.w.shape[1:-1].numel() * p.x.shape[0]
    shape = (4 if want_extras else 3, rows) if p.reduction == "none" else (0,)
    return p.x.new_empty(shape, dtype=p.computed_in)


def _bwd_operator(dloss: Tensor, stats: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    p, wants = Problem(*arguments[:13]), arguments[13:]
    kernels = implementation("cross_entropy", *p[:5], dloss)
    kept = None if kernels is eager else stats
    found = chunked.linear_cross_entropy_bwd(kernels, dloss, p, kept, wants)
    return tuple(
        p.x.new_empty(0) if t is None or like is None else laid_out_as(t, like)
        for t, like in zip(found, p[:3], strict=True)
    )


def _bwd_fake(dloss: Tensor, stats: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    pairs = zip(arguments[:3], arguments[13:], strict=True)
    return tuple(
        arguments[0].new_empty(0) if t is None or not want else torch.empty_like(t)
        for t, want in pairs
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.numbers, ctx.formed = inputs[5:13], inputs[13:16]
    ctx.save_for_backward(*inputs[:5], *output[5:])


def _operator_backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, stats, scale, dx, dw, db = ctx.saved_tensors
    wants = ctx.needs_input_grad[:3]
    problem = Problem(*tensors, *ctx.numbers)
    found: Any
    if problem.reduction == "none":
        found = torch.ops.fused.linear_cross_entropy_bwd(dloss, stats, *problem, *wants)
    else:
        if any(want and not formed for want, formed in zip(wants, ctx.formed, strict=True)):
            # Recorded of tensors that wanted none.
            again = torch.ops.fused.linear_cross_entropy_fwd(*problem, *wants, False)
            scale, dx, dw, db = again[-4:]
        wanted = [t if want else None for t, want in zip(tensors[:3], wants, strict=True)]
        factor = torch.ops.fused.linear_cross_entropy_once(dloss.to(scale.dtype) * scale, *wanted)
        triples = zip((dx, dw, db), tensors[:3], wants, strict=True)
        found = [
            _scaled(g.to(scale.dtype), factor).to(t.dtype).view(t.shape) if want else None
            for g, t, want in triples
        ]
    none = (None,) * 15
    return (*(g if want else None for g, want in zip(found, wants, strict=True)), *none)


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """As cross_entropy_scale: what is 0 stays so where the factor is inf or NaN."""
    return torch.where(gradient == 0, gradient, gradient * factor)


def _once_operator(factor: Tensor, *_: Tensor | None) -> Tensor:
    return factor.clone()  # an operator may not return what it was given


def _once_fake(factor: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(factor)


register("linear_cross_entropy_fwd", _fwd_operator, _fwd_fake)
register_gradient("linear_cross_entropy_bwd", _bwd_operator, _bwd_fake)
register_gradient("linear_cross_entropy_once", _once_operator, _once_fake)
torch.library.register_autograd(
    "fused::linear_cross_entropy_fwd",
    _operator_backward,
    setup_context=_setup_context,
    lib=library,
)
