"""Linear layer and cross-entropy in one: the checked functions, the backward pass, the module."""

import contextlib
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _WeightedLoss
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused import backend
from fused.cross_entropy import CrossEntropyOutput
from fused.cross_entropy_arguments import (
    check,
    in_dtype_of,
    loss_dtype_of,
    options_of,
    under_autocast,
)
from fused.eager import cross_entropy as eager
from fused.eager import linear_cross_entropy as chunked
from fused.eager.linear_cross_entropy import Problem
from fused.module_repr import with_options
from fused.operators import linear_cross_entropy as operators
from fused.second_order import differentiable_gradients
from fused.transforms import (
    as_leaf,
    is_composed,
    is_recorded,
    is_symbolic,
    is_transformed,
    may_be_overridden,
    outlives_the_call,
    refuse_script,
    same_shape,
    saves_elsewhere,
)

# What a chunk of logits may take. On a GPU its rows are what keeps the products efficient: 2048 of
# 128k words in half precision; on a CPU it is to stay near the caches.
_BUDGETS = {"cuda": 512 << 20, "cpu": 32 << 20}


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Gradients of input, weight and bias, formed with the loss for "mean" and "sum"."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        numbers: tuple[Any, ...],
        wants: tuple[bool, bool, bool],
        want_extras: bool,
    ) -> tuple[Tensor, ...]:
        problem = Problem(x, w, b, target, weight, *numbers)
        kernels = backend.implementation("cross_entropy", x)
        with _without_autocast(x):
            done = chunked.linear_cross_entropy_fwd(kernels, problem, wants, want_extras)
        ctx.kernels, ctx.numbers = kernels, numbers
        # Not `done` itself: with its outputs a node of the graph would hold itself alive.
        ctx.gradients, ctx.scale = done.gradients, done.scale
        ctx.save_for_backward(x, w, b, target, weight, done.stats)
        if done.extras is None:
            return (done.loss,)
        ctx.mark_non_differentiable(*done.extras)
        return (done.loss, *done.extras)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, stats = ctx.saved_tensors
        problem = Problem(*tensors, *ctx.numbers)
        wants, kernels = ctx.needs_input_grad[:3], ctx.kernels
        if is_composed(dloss):

            def loss(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
                return _composed(problem._replace(x=x, w=w, b=b), False)[0]

            gradients = differentiable_gradients(loss, dloss, problem[:3], wants)
        elif problem.reduction == "none":
            gradients = chunked.linear_cross_entropy_bwd(kernels, dloss, problem, stats, wants)
        else:
            formed, scale = ctx.gradients, ctx.scale
            ctx.gradients = None  # handed over: autograd may keep it as .grad
            if formed is None:  # not formed, or this is a second backward through a retained graph
                done = chunked.linear_cross_entropy_fwd(kernels, problem, wants, False)
                formed, scale = done.gradients, done.scale
            factor = dloss.to(problem.computed_in)
            factor = factor if scale is None else factor * scale
            gradients = formed.scaled(kernels, factor, problem)
        return (*gradients, None, None, None, None, None)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of `F.linear(input, linear_weight, linear_bias)`, without holding the logits.

    Torch's `F.linear_cross_entropy`, with the extras of `fused.cross_entropy`. With z = x W^T + b
    and dz the gradient that `fused.cross_entropy` derives,

        dx = dz W        dW = dz^T x        db = sum over rows of dz

    The rows are worked on in chunks whose logits take one buffer, in turn as z and as dz. For
    "mean" and "sum" the gradients are formed in the forward: three matrix products, as without
    fusion. For "none" the backward computes the logits a second time. Over several chunks dW is
    summed in float32; so are dW and dx of float16 for "mean" and "sum", which could overflow before
    they are divided by the number of rows. Only what requires a gradient is computed: under
    `torch.no_grad()` the logits alone. Rows with `ignore_index` are left out of the products on the
    CPU; on a GPU their number is not known without stalling it, so they are kept and their
    gradients are 0.

    Derivatives of higher order, functional ones (`torch.func`), and calls whose target
    probabilities or class weights require a gradient hold the logits as torch does. A second
    backward through a retained graph computes the gradients again; under checkpointing and
    save_on_cpu the first one does, for a product more, and the forward keeps none. Of a compiled
    call there are no derivatives of higher order: asking for one raises RuntimeError. (Where x, W
    or b is computed within the compiled function torch.compile does not notice, nor does it with
    the pair, and leaves a part out.)

    Args:
        input: x, shape (D,) or (N, D), float16, bfloat16, float32 or float64.
        linear_weight: W, shape (C, D), or (C, d1, ..., dk, D) for a loss of k dimensions.
        target: class indices, shape (), (N,) or (N, d1, ..., dk), int64, int32 or uint8; or
            probabilities, floating point, (C,), (N, C) or (N, C, d1, ..., dk).
        linear_bias: b, shape (C,) or (C, d1, ..., dk), or None for 0.
        weight: weight of each class, shape (C,).
        reduction: "mean", "sum", or "none" for the losses of the rows.
        ignore_index: rows with this class index have loss 0 and gradient 0 and do not count in the
            mean; None for -100. Not for probabilities.
        label_smoothing, z_loss, softcap, logit_scale: as in `fused.cross_entropy`.
        memory_budget_bytes: what the logits of a chunk may take, an int: None for 512 MiB on a
            GPU, 32 MiB on a CPU. The chunks are as few as it allows, and of one size, at least one
            row. A pass that forms dW of half precision takes up to 4 bytes more for each number of
            W: its sum in float32, or logits beyond the budget where all rows fit into both
            together, as one chunk needs no such sum. Besides there are the gradients, dx of float16
            in float32 as well; on a CPU 4 MB in which the closed form computes, and float16 is
            copied to float32 for the products.

    Returns:
        The loss: a 0-d tensor, or for "none" the shape of class indices; its dtype is that of
        `fused.cross_entropy`. Under autocast the products are in autocast's dtype.

    Raises:
        What `F.linear_cross_entropy` and `fused.cross_entropy` raise; TypeError for a memory budget
        that is no int, ValueError for one that is not positive.
    """
    tensors = (input, linear_weight, target, linear_bias, weight)
    if has_torch_function_variadic(*tensors) and may_be_overridden():
        return handle_torch_function(
            linear_cross_entropy, tensors, input, linear_weight, target, linear_bias=linear_bias,
            weight=weight, reduction=reduction, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            logit_scale=logit_scale, memory_budget_bytes=memory_budget_bytes,
        )  # fmt: skip
    arguments = (*tensors, reduction, ignore_index)
    numbers = (label_smoothing, z_loss, softcap, logit_scale)
    return _run(*arguments, *numbers, memory_budget_bytes, False)[0]


def linear_cross_entropy_with_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget_bytes: int | None = None,
) -> CrossEntropyOutput:
    """`linear_cross_entropy`, and what the same pass knows besides: see
    `fused.cross_entropy_with_stats`.
    """
    tensors = (input, linear_weight, target, linear_bias, weight)
    if has_torch_function_variadic(*tensors) and may_be_overridden():
        return handle_torch_function(
            linear_cross_entropy_with_stats, tensors, input, linear_weight, target,
            linear_bias=linear_bias, weight=weight, reduction=reduction, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
            logit_scale=logit_scale, memory_budget_bytes=memory_budget_bytes,
        )  # fmt: skip
    arguments = (*tensors, reduction, ignore_index)
    numbers = (label_smoothing, z_loss, softcap, logit_scale)
    return CrossEntropyOutput(*_run(*arguments, *numbers, memory_budget_bytes, True))


# torch has the module from 2.13 on; before, ours has the same parameters and buffers.
_Twin: Any = getattr(nn, "LinearCrossEntropyLoss", _WeightedLoss)


class LinearCrossEntropyLoss(_Twin):
    """`torch.nn.LinearCrossEntropyLoss`, computed by `fused.linear_cross_entropy`.

    Takes what torch's takes (but for `options`), and `z_loss`, `softcap`, `logit_scale` and
    `memory_budget_bytes` of `fused.linear_cross_entropy`. The layer is `self.linear`.
    """

    # On the class, so that a module of torch's becomes one of ours by its class alone.
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    memory_budget_bytes: int | None = None
    options: None = None
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        memory_budget_bytes: int | None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"LinearCrossEntropyLoss: expected weight of shape ({num_classes},), one for each "
                f"class, got {tuple(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(
                "LinearCrossEntropyLoss: expected label_smoothing between 0 and 1, "
                f"got {label_smoothing}"
            )
        _WeightedLoss.__init__(self, weight, None, None, reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.z_loss, self.softcap, self.logit_scale = z_loss, softcap, logit_scale
        self.memory_budget_bytes = memory_budget_bytes
        columns = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, columns, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if is_symbolic(input):
            return as_leaf(self, input, target)
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            memory_budget_bytes=self.memory_budget_bytes,
        )

    def extra_repr(self) -> str:
        torchs = super().extra_repr()
        return with_options(
            torchs, self, z_loss=0.0, softcap=None, logit_scale=1.0, memory_budget_bytes=None
        )


def _run(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    memory_budget_bytes: int | None,
    want_extras: bool,
) -> tuple[Tensor, ...]:
    """Checks, chooses, computes: (loss,), or the fields of CrossEntropyOutput."""
    _check(input, linear_weight, target, linear_bias)
    budget = _budget(memory_budget_bytes, input.device)
    if under_autocast(input):
        input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
    rows_shape = (*input.shape[:-1], *linear_weight.shape[:-1])
    # It stands in for the logits: no memory, but their shape, dtype and device.
    logits = input.detach().new_empty(()).expand(rows_shape)
    soft = same_shape(target, logits.shape)
    if soft and ignore_index is not None:
        raise RuntimeError(
            "linear_cross_entropy: expected no ignore_index for a target of probabilities, "
            f"got {ignore_index}"
        )
    options = options_of(
        -100 if ignore_index is None else ignore_index,
        reduction,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
    )
    check(logits, target, weight, options)
    loss_dtype = loss_dtype_of(logits, target, weight)
    target = in_dtype_of(loss_dtype, input, target)
    no_batch = input.dim() == 1
    if no_batch:
        input = input.unsqueeze(0)
        target = target.reshape(logits.unsqueeze(0).shape if soft else 1)
    numbers: tuple[Any, ...] = (*options, loss_dtype, budget)
    tensors = (input, linear_weight, linear_bias, target, weight)
    recorded = is_recorded()
    # ctx.needs_input_grad would not know of no_grad.
    enabled = torch.is_grad_enabled() or (recorded and outlives_the_call())
    wants = tuple(t is not None and t.requires_grad and enabled for t in tensors[:3])
    if is_transformed(*tensors) or _wants_more(target, weight):
        outputs = _composed(Problem(*tensors, *numbers), want_extras)
    elif recorded:
        outputs = operators.call(Problem(*tensors, *numbers), wants, want_extras)
    else:
        if saves_elsewhere():
            wants = (False, False, False)
        outputs = LinearCrossEntropyFunction.apply(*tensors, numbers, wants, want_extras)
    if no_batch:
        outputs = tuple(t.squeeze(0) if t.dim() else t for t in outputs)
    return outputs


def _budget(asked: int | None, device: torch.device) -> int:
    if asked is None:
        return _BUDGETS.get(device.type, _BUDGETS["cpu"])
    try:
        budget = operator.index(asked)
    except TypeError:
        raise TypeError(
            "linear_cross_entropy: expected memory_budget_bytes to be an int, a number of bytes, "
            f"or None, got {asked!r}"
        ) from None
    if budget <= 0:
        raise ValueError(
            f"linear_cross_entropy: expected memory_budget_bytes above 0, or None, got {asked}"
        )
    return budget


def _check(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None
) -> None:
    """Refuses what torch refuses before there are logits; `cross_entropy` checks the rest."""
    named = {"input": input, "linear_weight": linear_weight, "target": target}
    for name, given in named.items():
        if not isinstance(given, Tensor):
            raise TypeError(
                f"linear_cross_entropy: expected {name} to be a Tensor, got {type(given).__name__}"
            )
    if input.dim() not in (1, 2):
        raise RuntimeError(
            "linear_cross_entropy: expected input of shape (D,) or (N, D), "
            f"got {tuple(input.shape)}"
        )
    if linear_weight.dim() < 2:
        raise RuntimeError(
            "linear_cross_entropy: expected linear_weight of shape (C, D) or (C, d1, ..., dk, D), "
            f"got {tuple(linear_weight.shape)}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "linear_cross_entropy: expected as many features in input and linear_weight (their "
            f"last sizes), got {input.shape[-1]} and {linear_weight.shape[-1]}"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            "linear_cross_entropy: expected linear_bias of shape "
            f"{tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"linear_cross_entropy: expected input of shape (N, {input.shape[0]}), a batch, for "
            f"linear_weight of shape {tuple(linear_weight.shape)}, got {tuple(input.shape)}"
        )
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise RuntimeError(
                f"linear_cross_entropy: expected {name} on {input.device}, where input is, "
                f"got {tensor.device}"
            )
        if tensor.dtype != input.dtype and not under_autocast(input):
            raise RuntimeError(
                f"linear_cross_entropy: expected {name} of dtype {input.dtype}, as input, "
                f"got {tensor.dtype}"
            )


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What autocast makes of the arguments of F.linear: all but float64 in its dtype."""
    assert tensors[0] is not None
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _without_autocast(x: Tensor) -> Any:
    if not under_autocast(x):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _wants_more(target: Tensor, weight: Tensor | None) -> bool:
    """Whether target probabilities or class weights require a gradient."""
    more = target.requires_grad or (weight is not None and weight.requires_grad)
    return more and torch.is_grad_enabled()


def _composed(p: Problem, want_extras: bool) -> tuple[Tensor, ...]:
    """The same from operations that torch can differentiate any number of times."""
    b = None if p.b is None else p.b.reshape(-1)
    flat_w = p.w.flatten(0, -2)  # Dynamo before 2.11 fails on a NamedTuple's property
    logits = F.linear(p.x, flat_w, b).view(p.x.shape[0], *p.w.shape[:-1])
    return eager.cross_entropy_composed(logits, *p[3:12], want_extras)
