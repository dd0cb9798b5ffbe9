"""Cross-entropy: the checked function, its backward pass and its module."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from fused import backend
from fused.eager import cross_entropy as eager
from fused.operators import cross_entropy as operators

_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)
_REDUCTIONS = ("none", "mean", "sum")


class CrossEntropyOutput(NamedTuple):
    """What `cross_entropy_with_stats` returns; only the loss has a gradient."""

    loss: Tensor  # as `cross_entropy` returns it
    row_loss: Tensor  # loss of each row, before the reduction, shaped as class indices
    lse: Tensor  # log-sum-exp of each row's logits, shaped as class indices; 0 where ignored
    correct: Tensor  # 0-d int64: rows, not ignored, whose largest logit is the target's


class _Options(NamedTuple):
    """The numbers of a call, in the order in which the implementations take them."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float

    def of_backward(self) -> tuple[int, float, float, float, float]:
        return (self.ignore_index, *self[2:])


class CrossEntropyFunction(torch.autograd.Function):
    """dlogits = dloss * (softmax - onehot), over n for the mean, from the logits alone."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: _Options,
        loss_dtype: torch.dtype,
        inplace: bool,
        want_extras: bool,
    ) -> tuple[Tensor, ...]:
        kernels = backend.implementation("cross_entropy", input)
        loss, stats, scale, extras = kernels.cross_entropy_fwd(
            input, target, weight, *options, loss_dtype, want_extras
        )
        ctx.kernels, ctx.options = kernels, options
        ctx.inplace = inplace
        if inplace:
            # The memory is the gradient's from here on: no graph that saved the logits may run.
            increment_version(input)
        ctx.save_for_backward(input, target, weight, stats, scale)
        if extras is None:
            return (loss,)
        ctx.mark_non_differentiable(*extras)
        return (loss, *extras)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight, stats, scale = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated
            gradients = _composed_gradients(dloss, input, target, weight, ctx.options, wants)
            return (*gradients, None, None, None, None)
        dweight = None
        if wants[2]:  # before the logits' memory is written to
            dweight = eager.cross_entropy_dweight(dloss, input, target, weight, *ctx.options)
        dx, dtarget = ctx.kernels.cross_entropy_bwd(
            dloss, input, target, weight, stats, scale, *ctx.options.of_backward(),
            wants[0], wants[1], ctx.inplace,
        )  # fmt: skip
        if ctx.inplace:
            increment_version(input)
        return (dx, dtarget, dweight, None, None, None, None)


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
) -> Tensor:
    """Softmax cross-entropy of logits: torch's `F.cross_entropy`, with what large models want.

    With z_c the logits after `logit_scale` and `softcap`, lse = log sum_c exp(z_c), p = softmax(z),
    and for a class index y

        loss = -w_y * log p_y                      dz_c = w_y * (p_c - [c = y])

    times the upstream gradient, and over the sum of the rows' w_y for the mean. Target
    probabilities t, and label smoothing e, make it

        b_c  = w_c * ((1 - e) * t_c + e / C)
        loss = -sum_c b_c * log p_c                dz_c = p_c * sum_k b_k - b_c
                                                   dt_c = -(1 - e) * w_c * log p_c

    The logits are not written to unless `inplace` says so. Everything is computed in float32
    (float64 for float64); no float atomics: two runs on one device are equal to the last bit.
    First and second derivatives, `torch.func`, `torch.compile(fullgraph=True)` and CUDA graphs
    work; derivatives of higher order, functional ones, and those of `weight` take torch's own
    operations instead of the kernels.

    Args:
        input: logits, shape (C,), (N, C) or (N, C, d1, ..., dk), float16, bfloat16, float32 or
            float64, any strides.
        target: class indices in [0, C), int64, int32 or uint8, shape (), (N,) or (N, d1, ..., dk);
            or probabilities, floating point, shaped as input.
        weight: weight w of each class, shape (C,), in input's dtype for class indices. It has a
            gradient only for probabilities, as torch's has.
        ignore_index: rows with this class index have loss 0 and gradient 0 and do not count in the
            mean.
        reduction: "mean", "sum", or "none" for the losses of the rows.
        label_smoothing: e in [0, 1], the share of the target that is spread over all classes.
        z_loss: coefficient of lse^2, which is added to the loss of each row that is not ignored,
            and reduced with it: dz_c gains 2 * z_loss * lse * p_c.
        softcap: z = softcap * tanh(logit_scale * input / softcap): dinput is dz times
            1 - (z / softcap)^2. None for no cap.
        logit_scale: factor of the logits, one over a temperature, applied before the cap: dinput is
            dz times logit_scale.
        inplace: lets the backward write the gradient over the logits, which saves memory of their
            size. The logits must not be used after the call; where autograd would, it raises. No
            effect where input needs no gradient, nor under torch.compile, which plans memory
            itself.

    Returns:
        The loss: a 0-d tensor, or for "none" the shape of class indices. Its dtype is input's, and
        for probabilities the one that input, target and weight promote to; float32 for half
        precision under autocast. A mean over no rows is NaN.

    Raises:
        ValueError: batch sizes that differ, or an unknown reduction.
        RuntimeError: other shapes, dtypes or devices that do not fit, options out of their range,
            or an `inplace` that autograd forbids.
        NotImplementedError: an input that is not floating point.
        IndexError: a class index outside [0, C), on the CPU. On a GPU looking would stall the
            device: there such a row has loss and gradient NaN.

    The formulas are derived in docs/derivations.md. The z-loss is that of PaLM (Chowdhery et al.,
    2022), the cap that of Gemma 2 (2024).
    """
    options = _options(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale)
    return _run(input, target, weight, options, inplace, False)[0]


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
) -> CrossEntropyOutput:
    """`cross_entropy`, and what the same pass over the logits knows besides.

    Takes and raises what `cross_entropy` does. Returns (loss, row_loss, lse, correct); the last
    three carry no gradient. `correct` over the number of rows that are not ignored is the accuracy;
    of several largest logits the first counts. For probabilities the target's largest counts.
    """
    options = _options(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale)
    return CrossEntropyOutput(*_run(input, target, weight, options, inplace, True))


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`, computed by `fused.cross_entropy`.

    Takes what torch's takes, in the same order, and `z_loss`, `softcap`, `logit_scale` and
    `inplace` of `fused.cross_entropy`.
    """

    # On the class, so that a module of torch's becomes one of ours by its class alone.
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    inplace: bool = False

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
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.logit_scale = z_loss, softcap, logit_scale
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
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
        )


def _options(
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> _Options:
    smoothing = max(label_smoothing, 0.0)  # torch takes a negative one for none
    return _Options(ignore_index, reduction, smoothing, z_loss, softcap or 0.0, logit_scale)


def _run(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: _Options,
    inplace: bool,
    want_extras: bool,
) -> tuple[Tensor, ...]:
    """Checks, chooses, computes: (loss,), or (loss, row_loss, lse, correct)."""
    _check(input, target, weight, options)
    loss_dtype = _loss_dtype(input, target, weight)
    no_batch = input.dim() == 1
    if no_batch:
        input = input.unsqueeze(0)
        target = target.reshape(input.shape if target.is_floating_point() else 1)
    if torch.compiler.is_compiling():
        outputs = operators.call(input, target, weight, *options, loss_dtype, want_extras)
    elif torch._C._are_functorch_transforms_active():
        outputs = eager.cross_entropy_composed(
            input, target, weight, *options, loss_dtype, want_extras
        )
    else:
        inplace = inplace and input.requires_grad and torch.is_grad_enabled()
        if inplace:
            _check_inplace(input)
        outputs = CrossEntropyFunction.apply(
            input, target, weight, options, loss_dtype, inplace, want_extras
        )
    if no_batch:
        outputs = tuple(t.squeeze(0) if t.dim() else t for t in outputs)
    return outputs


def _loss_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    if dtype.itemsize == 2 and _under_autocast(input):
        return torch.float32  # autocast computes losses in float32
    return dtype


def _under_autocast(input: Tensor) -> bool:
    # torch raises for devices that have no autocast, as meta.
    return not input.is_meta and torch.is_autocast_enabled(input.device.type)


def _check(input: Tensor, target: Tensor, weight: Tensor | None, options: _Options) -> None:
    """Refuses what torch refuses, with the same kind of error."""
    if options.reduction not in _REDUCTIONS:
        raise ValueError(
            f"cross_entropy: expected reduction to be one of {', '.join(_REDUCTIONS)}, "
            f"got {options.reduction!r}"
        )
    if not input.is_floating_point():
        raise NotImplementedError(
            f"cross_entropy: expected floating-point input, got {input.dtype}"
        )
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: expected input of shape (C,) or (N, C, ...), got ()")
    if target.shape == input.shape:
        _check_probabilities(target, options)
    else:
        _check_indices(input, target)
    classes = input.shape[0 if input.dim() == 1 else 1]
    if weight is not None:
        _check_weight(weight, classes, input, target)
    if options.label_smoothing > 1:
        raise RuntimeError(
            "cross_entropy: expected label_smoothing between 0 and 1, "
            f"got {options.label_smoothing}"
        )
    if options.softcap < 0:
        raise RuntimeError(
            f"cross_entropy: expected softcap above 0, or None, got {options.softcap}"
        )
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                f"cross_entropy: expected {name} on {input.device}, where input is, "
                f"got {tensor.device}"
            )


def _check_probabilities(target: Tensor, options: _Options) -> None:
    if not target.is_floating_point():
        raise RuntimeError(
            "cross_entropy: expected a floating-point target, as it has the shape of input and so "
            f"holds probabilities, got {target.dtype}"
        )
    if options.ignore_index >= 0:
        raise RuntimeError(
            "cross_entropy: expected no ignore_index for a target of probabilities, "
            f"got {options.ignore_index}"
        )


def _check_indices(input: Tensor, target: Tensor) -> None:
    if input.dim() == 1:
        expected = torch.Size(())
        fits = target.shape in (expected, (1,))
    else:
        expected = input.shape[:1] + input.shape[2:]
        fits = target.shape == expected
    if not fits:
        message = (
            f"cross_entropy: expected target of shape {tuple(expected)} (class indices) or "
            f"{tuple(input.shape)} (probabilities) for input of shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
        if input.dim() > 1 and target.dim() > 0 and target.shape[0] != input.shape[0]:
            raise ValueError(message)
        raise RuntimeError(message)
    if target.dtype not in _INDEX_DTYPES:
        raise RuntimeError(
            "cross_entropy: expected target of dtype int64, int32 or uint8 (class indices), "
            f"got {target.dtype}"
        )


def _check_weight(weight: Tensor, classes: int, input: Tensor, target: Tensor) -> None:
    if weight.shape != (classes,):
        raise RuntimeError(
            f"cross_entropy: expected weight of shape ({classes},), one for each class, "
            f"got {tuple(weight.shape)}"
        )
    if target.is_floating_point():
        return
    if weight.dtype != input.dtype and not (
        _under_autocast(input) and torch.float64 not in (weight.dtype, input.dtype)
    ):
        raise RuntimeError(
            f"cross_entropy: expected weight of dtype {input.dtype}, as input, got {weight.dtype}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "cross_entropy: expected a weight that needs no gradient for class indices, as torch "
            "does; detach it, or give the target as probabilities"
        )


def _check_inplace(input: Tensor) -> None:
    if input.is_leaf:
        raise RuntimeError(
            "cross_entropy: expected inplace=False for a leaf that requires grad: its gradient "
            "would take its own memory"
        )
    if any(
        stride == 0 and size > 1 for size, stride in zip(input.shape, input.stride(), strict=True)
    ):
        raise RuntimeError(
            "cross_entropy: expected inplace=False for an expanded input: several of its elements "
            "share one place in memory"
        )


def _composed_gradients(
    dloss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: _Options,
    wants: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of input, target and weight that can be differentiated again."""
    (loss,) = eager.cross_entropy_composed(input, target, weight, *options, dloss.dtype, False)
    tensors = zip((input, target, weight), wants, strict=True)
    wanted = [t for t, want in tensors if want and t is not None]
    found = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=True))
    return [next(found) if want else None for want in wants]
