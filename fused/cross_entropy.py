"""Cross-entropy: the checked function, its backward pass and its module."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fused import backend
from fused.cross_entropy_arguments import (
    Options,
    check,
    check_inplace,
    in_dtype_of,
    loss_dtype_of,
    may_be_overwritten,
    options_of,
)
from fused.eager import cross_entropy as eager
from fused.eager.cross_entropy_small import (
    REDUCTIONS,
    TORCH_LOSS,
    cross_entropy_small,
    is_small,
)
from fused.module_repr import with_options
from fused.operators import cross_entropy as operators
from fused.second_order import cross_entropy_gradients
from fused.transforms import (
    as_leaf,
    is_composed,
    is_made_of_others,
    is_recorded,
    is_symbolic,
    is_transformed,
    may_be_overridden,
    refuse_script,
    saves_elsewhere,
)


class CrossEntropyOutput(NamedTuple):
    """What `cross_entropy_with_stats` returns; only the loss has a gradient."""

    loss: Tensor  # as `cross_entropy` returns it
    row_loss: Tensor  # loss of each row, before the reduction, shaped as class indices
    lse: Tensor  # log-sum-exp of each row's logits, shaped as class indices; 0 where ignored
    correct: Tensor  # 0-d int64: rows, not ignored, whose largest logit is the target's
    prediction: Tensor  # int64: class of each row's largest logit, shaped so too; -1 where ignored


_of_fields: Any = CrossEntropyOutput.__new__


# Takes one iterable, too, as torch.return_types do, of which Tensor.__torch_function__ makes the
# result where tensors are of a subclass.
@functools.wraps(_of_fields)
def _of_fields_or_iterable(cls: type[CrossEntropyOutput], *fields: Any, **named: Any) -> Any:
    if len(fields) == 1 and not named:
        return cls._make(*fields)
    return _of_fields(cls, *fields, **named)


CrossEntropyOutput.__new__ = _of_fields_or_iterable  # type: ignore[assignment, method-assign]


class _Overwritten(torch.autograd.Function):
    """Logits in whose memory their gradient stands: later uses of them have no gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError(
            "cross_entropy: expected no use of logits after a call with inplace=True, which wrote "
            "their gradient over them"
        )


class CrossEntropyFunction(torch.autograd.Function):
    """dlogits = dloss * (softmax - onehot), over n for the mean, from the logits alone."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: Options,
        loss_dtype: torch.dtype,
        want_extras: bool,
        inplace: bool,
        early: bool,
    ) -> tuple[Tensor, ...]:
        kernels = backend.implementation("cross_entropy", input)
        ctx.dx = stats = scale = None
        if early:
            if inplace:
                _mark_overwritten(input)
                input = input.detach()
            loss, extras, dx = kernels.cross_entropy_fwd_bwd(
                input, target, weight, *options, loss_dtype, want_extras, inplace
            )
            if not inplace:
                ctx.dx = dx
        else:
            loss, stats, scale, extras = kernels.cross_entropy_fwd(
                input, target, weight, *options, loss_dtype, want_extras
            )
        ctx.kernels, ctx.options = kernels, options
        ctx.inplace, ctx.early = inplace, early
        if inplace:
            # The memory is the gradient's from here on: no graph that saved the logits may run.
            increment_version(input)
        ctx.save_for_backward(input, target, weight, stats, scale)
        if loss._is_view():  # of the rows: autograd would forbid to change it in place
            loss = torch.ops.aten._unsafe_view(loss, loss.shape)
        if extras is None:
            return (loss,)
        ctx.mark_non_differentiable(*extras)
        return (loss, *extras)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if is_composed(dloss):
            gradients = _composed_gradients(ctx, dloss)
        elif ctx.early:
            gradients = [_early_gradient(ctx, dloss), None, None]
        else:
            gradients = _gradients(ctx, dloss)
        return (*gradients, None, None, None, None, None)


def _retains_grad(input: Tensor) -> bool:
    """`retain_grad()` would move to a node that `_mark_overwritten` adds, and that never runs."""
    return input.retains_grad or (input._base is not None and input._base.retains_grad)


def _mark_overwritten(input: Tensor) -> None:
    """Tells autograd, unless input is a part of a larger tensor: its other parts are as before."""
    whole = input if input._base is None else input._base
    if whole.numel() == input.numel():
        with torch.enable_grad():
            _Overwritten.apply(whole)


def _early_gradient(ctx: Any, dloss: Tensor) -> Tensor:
    """The gradient that the forward formed, times the upstream one."""
    dx: Tensor
    if ctx.inplace:
        dx = ctx.saved_tensors[0]
    elif ctx.dx is not None:
        # Given away: whoever receives it may write to it, and need not copy it.
        dx, ctx.dx = ctx.dx, None
    else:  # a second backward through a retained graph
        input, target, weight, _, _ = ctx.saved_tensors
        dx = ctx.kernels.cross_entropy_fwd_bwd(
            input, target, weight, *ctx.options, dloss.dtype, False, False
        )[-1]
    dx = ctx.kernels.cross_entropy_scale(dx, dloss)
    if ctx.inplace:
        increment_version(dx)
    return dx


def _gradients(ctx: Any, dloss: Tensor) -> list[Tensor | None]:
    """The gradients of input, target and weight, as far as they are wanted."""
    input, target, weight, stats, scale = ctx.saved_tensors
    want_dx, want_dtarget, want_dweight = ctx.needs_input_grad[:3]
    dweight = None
    if want_dweight:  # before the logits' memory is written to
        dweight = eager.cross_entropy_dweight(dloss, input, target, weight, *ctx.options)
    dx, dtarget = ctx.kernels.cross_entropy_bwd(
        dloss, input, target, weight, stats, scale, *ctx.options.of_backward(),
        want_dx, want_dtarget, ctx.inplace,
    )  # fmt: skip
    if ctx.inplace:
        increment_version(input)
    return [dx, dtarget, dweight]


def _composed_gradients(ctx: Any, dloss: Tensor) -> list[Tensor | None]:
    """Gradients of input, target and weight that can be differentiated again."""
    if ctx.early and ctx.inplace:
        raise RuntimeError(
            "cross_entropy: expected inplace=False for create_graph=True and for "
            "is_grads_batched=True: the gradient stands where the logits were"
        )
    input, target, weight, _, _ = ctx.saved_tensors
    wants = ctx.needs_input_grad[:3]
    return cross_entropy_gradients(dloss, (input, target, weight), ctx.options, wants)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    grad_in_forward: bool = True,
) -> Tensor:
    """Softmax cross-entropy of logits: torch's `F.cross_entropy`, with what large models want.

    With z_c the logits after `logit_scale` and `softcap`, lse = log sum_c exp(z_c), p = softmax(z),
    and for a class index y

        loss = -w_y * log p_y                      dz_c = w_y * (p_c - [c = y])

    times the upstream gradient, and over the sum of the rows' w_y for the mean, of probabilities
    over their number. Target probabilities t, and label smoothing e, make it

        b_c  = w_c * ((1 - e) * t_c + e / C)
        loss = -sum_c b_c * log p_c                dz_c = p_c * sum_k b_k - b_c
                                                   dt_c = -(1 - e) * w_c * log p_c

    The logits are not written to unless `inplace` says so. Everything is computed in float32
    (float64 for float64); no float atomics: two runs on one device are equal to the last bit.
    First and second derivatives, `torch.func`, `torch.compile(fullgraph=True)` and CUDA graphs
    work; derivatives of higher order, functional ones, and those of `weight` take torch's own
    operations instead of the kernels. To torch.compile the options are constants: a scale that
    changes from step to step is multiplied before the call.

    Args:
        input: logits, shape (C,), (N, C) or (N, C, d1, ..., dk), float16, bfloat16, float32 or
            float64, any strides.
        target: class indices in [0, C), int64, int32 or uint8, shape (), (N,) or (N, d1, ..., dk);
            or probabilities, floating point, shaped as input.
        weight: weight w of each class, shape (C,), in input's dtype for class indices. It has a
            gradient only for probabilities, as torch's has.
        ignore_index: rows with this class index have loss 0 and gradient 0 and do not count in the
            mean. What is in them does not matter; but where torch's own operations serve (small
            calls on the CPU, derivatives of higher order and functional ones), a row with an inf or
            NaN has torch's gradient, NaN.
        reduction: "mean", "sum", or "none" for the losses of the rows.
        label_smoothing: e in [0, 1], the share of the target that is spread over all classes.
        z_loss: coefficient of lse^2, which is added to the loss of each row that is not ignored,
            and reduced with it: dz_c gains 2 * z_loss * lse * p_c.
        softcap: z = softcap * tanh(logit_scale * input / softcap): dinput is dz times
            1 - (z / softcap)^2. None for no cap.
        logit_scale: factor of the logits, one over a temperature, applied before the cap: dinput is
            dz times logit_scale.
        inplace: lets the gradient be written over the logits, which saves memory of their size. The
            logits must not be used after the call; where autograd would, it raises. (Of a part of a
            larger tensor, such as a slice, it knows of uses before the call alone; and a second
            part of the same tensor, changed in place too, it takes for a misuse of the first.)
            Hooks on them are registered before it. No effect where input needs no gradient, where
            its `.grad` is retained (`retain_grad()`), where it is a view that autograd lets nobody
            change (of `unbind`, `chunk`, a custom Function, a module with full backward hooks),
            where hooks have what autograd saves (checkpointing, save_on_cpu), nor under
            torch.compile, which plans memory itself.
        grad_in_forward: forms the gradient of a mean or sum in the forward, while the logits are at
            hand: they are read once, dinput is written once, and a backward whose upstream gradient
            is 1 has nothing left to do. Another one costs a second read and write of dinput, and a
            second rounding of a half-precision one (none if it is a power of two). False forms it
            in the backward, as for "none": the logits are read twice, whatever comes from upstream.
            Better where that is known not to be 1: a loss scale, or a weighted sum of losses. It is
            always formed in the backward for float16, in which gradients would underflow before a
            loss scale arrives, where target or weight wants a gradient too, and where hooks take
            what autograd saves, as nothing of the logits' size is to be kept there. torch.compile
            forms it in the backward either way, and rounds as eager mode does. Take False where a
            CUDA graph of the backward alone is replayed more than once a forward: each replay would
            scale again.

    Returns:
        The loss: a 0-d tensor, or for "none" the shape of class indices. Its dtype is input's, and
        for probabilities the one that input, target and weight promote to; float32 for half
        precision under autocast. A mean over no rows, or over class indices whose total weight is
        0, is NaN.

    Raises:
        ValueError: batch sizes that differ, or an unknown reduction.
        RuntimeError: other shapes, dtypes or devices that do not fit, options out of their range,
            or an `inplace` that autograd forbids.
        TypeError: an `ignore_index` that is no int, or a bool; options that are no numbers.
        NotImplementedError: an input of another dtype.
        IndexError: a class index outside [0, C), on the CPU. On a GPU looking would stall the
            device: there such a row has loss and gradient NaN.

    The formulas are derived in docs/derivations.md. The z-loss is that of PaLM (Chowdhery et al.,
    2022), the cap that of Gemma 2 (2024).
    """
    if has_torch_function_variadic(input, target, weight) and may_be_overridden():
        return handle_torch_function(
            cross_entropy, (input, target, weight), input, target, weight=weight,
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            z_loss=z_loss, softcap=softcap, logit_scale=logit_scale, inplace=inplace,
            grad_in_forward=grad_in_forward,
        )  # fmt: skip
    # A Tensor's comparison is a Tensor, not True: `options_of` refuses a scale that is learned.
    usual = (label_smoothing == z_loss == 0) is True and (logit_scale == 1) is True
    if not usual and is_compiling():  # where numbers may be symbols
        numbers = ((label_smoothing, 0), (z_loss, 0), (logit_scale, 1))
        usual = all(type(n) in (int, float) and bool(n == u) for n, u in numbers)
    plain = usual and weight is None and softcap is None and not inplace
    if plain:
        loss = _small(input, target, ignore_index, reduction)
        if loss is not None:
            return loss
    options = options_of(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale)
    return _run(input, target, weight, options, inplace, grad_in_forward, False, plain)[0]


def cross_entropy_with_stats(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace: bool = False,
    grad_in_forward: bool = True,
) -> CrossEntropyOutput:
    """`cross_entropy`, and what the same pass over the logits knows besides.

    Takes and raises what `cross_entropy` does. Returns (loss, row_loss, lse, correct, prediction);
    only the loss has a gradient. `correct` over the number of rows that are not ignored is the
    accuracy; of several largest logits the first counts. For probabilities the target's largest
    counts. Logits are here what the loss is of: scaled and capped. Beside a NaN the prediction is
    some class.
    """
    if has_torch_function_variadic(input, target, weight) and may_be_overridden():
        return handle_torch_function(
            cross_entropy_with_stats, (input, target, weight), input, target, weight=weight,
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            z_loss=z_loss, softcap=softcap, logit_scale=logit_scale, inplace=inplace,
            grad_in_forward=grad_in_forward,
        )  # fmt: skip
    options = options_of(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale)
    outputs = _run(input, target, weight, options, inplace, grad_in_forward, True, False)
    return CrossEntropyOutput(*outputs)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`, computed by `fused.cross_entropy`.

    Takes what torch's takes, in the same order, and `z_loss`, `softcap`, `logit_scale`, `inplace`
    and `grad_in_forward` of `fused.cross_entropy`.
    """

    # On the class, so that a module of torch's becomes one of ours by its class alone.
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    inplace: bool = False
    grad_in_forward: bool = True
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        inplace: bool = False,
        grad_in_forward: bool = True,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.logit_scale = z_loss, softcap, logit_scale
        self.inplace, self.grad_in_forward = inplace, grad_in_forward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if is_symbolic(input):
            return as_leaf(self, input, target)
        return cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            inplace=self.inplace,
            grad_in_forward=self.grad_in_forward,
        )

    def extra_repr(self) -> str:
        return with_options(
            super().extra_repr(), self, ignore_index=-100, reduction="mean", label_smoothing=0.0,
            z_loss=0.0, softcap=None, logit_scale=1.0, inplace=False, grad_in_forward=True,
        )  # fmt: skip


def _run(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    inplace: bool,
    grad_in_forward: bool,
    want_extras: bool,
    plain: bool,
) -> tuple[Tensor, ...]:
    """Checks, chooses, computes: (loss,), or the fields of CrossEntropyOutput.

    `plain` says that `_small` may serve the call.
    """
    if weight is not None and input.dim() > 2 and weight.shape == (1, input.shape[1]):
        weight = weight.squeeze(0)  # as torch, which counts its elements there
    check(input, target, weight, options)
    loss_dtype = loss_dtype_of(input, target, weight)
    target = in_dtype_of(loss_dtype, input, target)
    no_batch = input.dim() == 1
    if input.shape[0 if no_batch else 1] == 0:
        return _of_no_classes(input, target, weight, options, loss_dtype, want_extras)
    if no_batch:
        input = input.unsqueeze(0)
        target = target.reshape(input.shape if target.is_floating_point() else 1)
    if is_transformed(input, target, weight):
        outputs = eager.cross_entropy_composed(
            input, target, weight, *options, loss_dtype, want_extras
        )
    else:
        early = (
            grad_in_forward
            and options.reduction != "none"
            and input.dtype != torch.float16
            and not target.requires_grad
            and not (weight is not None and weight.requires_grad)
        )
        if is_recorded():
            outputs = operators.call(
                input, target, weight, *options, loss_dtype, want_extras, early, plain
            )
        else:
            wants_gradient = input.requires_grad and torch.is_grad_enabled()
            if inplace and wants_gradient:
                check_inplace(input)
            formed_now = wants_gradient and not saves_elsewhere()
            inplace, early = inplace and formed_now, early and formed_now
            if inplace and (not may_be_overwritten(input) or early and _retains_grad(input)):
                inplace = False
            outputs = CrossEntropyFunction.apply(
                input, target, weight, options, loss_dtype, want_extras, inplace, early
            )
    if no_batch:
        outputs = tuple(t.squeeze(0) if t.dim() else t for t in outputs)
    return outputs


def _of_no_classes(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    loss_dtype: torch.dtype,
    want_extras: bool,
) -> tuple[Tensor, ...]:
    """Torch's answer, where there is nothing to compute: all class indices are ignored."""
    soft = target.is_floating_point()

    def loss(reduction: str) -> Tensor:
        out: Tensor = TORCH_LOSS(
            input, target if soft else target.long(), weight, REDUCTIONS[reduction],
            options.ignore_index, options.label_smoothing,
        )  # fmt: skip
        return out.to(loss_dtype)

    if not want_extras:
        return (loss(options.reduction),)
    row_loss = loss("none").detach()
    lse = torch.full_like(row_loss, -math.inf if soft else 0.0)
    prediction = torch.full_like(row_loss, -1, dtype=torch.int64)
    return loss(options.reduction), row_loss, lse, prediction.new_zeros(()), prediction


def _small(input: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor | None:
    """A plain call by torch's own function, in float32, for autograd to differentiate.

    None for a call that it would not serve, or not sooner: it is for few logits on the CPU, of
    which every line here takes a hundredth of the time.
    """
    if (
        is_compiling()
        or not (type(input) is Tensor or isinstance(input, Tensor) and not is_made_of_others(input))
        or not isinstance(target, Tensor)
        or not is_small(input, target)
        or not isinstance(reduction, str)
        or reduction not in REDUCTIONS
        or backend.name_for(input) != "eager"
    ):
        return None
    try:
        loss = cross_entropy_small(input, target, ignore_index, reduction)
    except Exception as error:  # torch refuses the same; this says it better
        check(input, target, None, options_of(ignore_index, reduction, 0.0, 0.0, None, 1.0))
        if eager.is_of_an_index(error) and not is_transformed(input):  # then nobody may look
            eager.raise_if_outside(target, input.shape[min(1, input.dim() - 1)], ignore_index)
        raise
    dtype = input.dtype
    if dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return loss
    return loss.to(dtype)
