"""What cross-entropy may be given: its options, the dtype of its loss, and what is refused."""

import math
import operator
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.transforms import same_shape

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)
_REDUCTIONS = ("none", "mean", "sum")


class Options(NamedTuple):
    """The numbers of a call, in the order in which the implementations take them."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float

    def of_backward(self) -> tuple[int, float, float, float, float]:
        return (self.ignore_index, *self[2:])


def options_of(
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> Options:
    if not isinstance(reduction, str):
        raise ValueError(
            f"cross_entropy: expected reduction to be 'none', 'mean' or 'sum', got {reduction!r}"
        )
    if reduction == "elementwise_mean":  # as torch still takes it
        warnings.warn('reduction="elementwise_mean" is now called "mean"', stacklevel=3)
        reduction = "mean"
    label_smoothing = _number("label_smoothing", label_smoothing)
    z_loss, logit_scale = _number("z_loss", z_loss), _number("logit_scale", logit_scale)
    softcap = None if softcap is None else _number("softcap", softcap)
    for name, number in (("z_loss", z_loss), ("logit_scale", logit_scale)):
        if not -math.inf < number < math.inf:
            raise RuntimeError(f"cross_entropy: expected {name} to be finite, got {number}")
    if softcap is not None and not softcap > 0:  # NaN is not, either
        raise RuntimeError(f"cross_entropy: expected softcap above 0, or None, got {softcap}")
    smoothing = max(0.0, label_smoothing)  # torch takes a negative one, and NaN, for none
    cap = 0.0 if softcap is None or softcap == math.inf else softcap
    return Options(_index_of(ignore_index), reduction, smoothing, z_loss, cap, logit_scale)


def _number(name: str, number: Any) -> float:
    """What torch takes for a float, as one: a tensor only where it is a number without gradient."""
    if type(number) is float:
        return number
    is_tensor = isinstance(number, Tensor)
    if is_tensor and number.requires_grad:
        raise TypeError(
            f"cross_entropy: expected {name} to be a number, which has no gradient, got a Tensor "
            "that requires one; multiply the logits by a scale that is learned, before the call"
        )
    if is_tensor and number.dim() == 0 or hasattr(number, "__float__") and not is_tensor:
        return float(number)
    raise TypeError(f"cross_entropy: expected {name} to be a number, got {number!r}")


def _index_of(ignore_index: Any) -> int:
    """What torch takes for an int, as one. To Python False is an int, too: class 0."""
    try:
        if not isinstance(ignore_index, bool):
            index = operator.index(ignore_index)
            if -(2**63) <= index < 2**63:
                return index
            raise ValueError(
                "cross_entropy: expected ignore_index to be an int of 64 bits, such as -100, "
                f"got {ignore_index!r}"
            )
    except TypeError:
        pass
    raise TypeError(
        f"cross_entropy: expected ignore_index to be an int, such as -100, got {ignore_index!r}"
    )


def in_dtype_of(loss_dtype: torch.dtype, input: Tensor, target: Tensor) -> Tensor:
    """`target`, in float64 where probabilities have class weights of float64 alone: it is by input
    and target that the implementations decide what they compute in."""
    if loss_dtype == torch.float64 and torch.float64 not in (input.dtype, target.dtype):
        return target.double()
    return target


def loss_dtype_of(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    if dtype.itemsize == 2 and under_autocast(input):
        return torch.float32  # autocast computes losses in float32
    return dtype


def under_autocast(input: Tensor) -> bool:
    # torch raises for devices that have no autocast, as meta.
    return not input.is_meta and torch.is_autocast_enabled(input.device.type)


def check(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> None:
    """Refuses what torch refuses, with the same kind of error."""
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if not (isinstance(tensor, Tensor) or (tensor is None and name == "weight")):
            raise TypeError(
                f"cross_entropy: expected {name} to be a Tensor, got {type(tensor).__name__}"
            )
    if options.reduction not in _REDUCTIONS:
        raise ValueError(
            f"cross_entropy: expected reduction to be one of {', '.join(_REDUCTIONS)}, "
            f"got {options.reduction!r}"
        )
    if input.dtype not in DTYPES:
        raise NotImplementedError(
            f"cross_entropy: expected floating-point input of 16, 32 or 64 bits, got {input.dtype}"
        )
    if input.dim() == 0:
        kind = IndexError if target.shape == () and target.is_floating_point() else RuntimeError
        raise kind("cross_entropy: expected input of shape (C,) or (N, C, ...), got ()")
    if options.label_smoothing > 1:
        raise RuntimeError(
            "cross_entropy: expected label_smoothing between 0 and 1, "
            f"got {options.label_smoothing}"
        )
    if same_shape(target, input.shape):
        _check_probabilities(target, options)
    else:
        _check_indices(input, target, options.label_smoothing)
    classes = input.shape[0 if input.dim() == 1 else 1]
    if weight is not None:
        _check_weight(weight, classes, input, target)
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                f"cross_entropy: expected {name} on {input.device}, where input is, "
                f"got {tensor.device}"
            )


def _check_probabilities(target: Tensor, options: Options) -> None:
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


def _check_indices(input: Tensor, target: Tensor, label_smoothing: float) -> None:
    fits_dtype = target.dtype in _INDEX_DTYPES
    if input.dim() == 1:
        expected = torch.Size(())
        # As in torch, one index may have an axis, but not where the classes are smoothed over.
        fits = target.shape == expected or (target.shape == (1,) and label_smoothing == 0)
        sizes_differ = fits_dtype and target.dim() < 2 and target.shape != (1,)
    else:
        expected = input.shape[:1] + input.shape[2:]
        fits = same_shape(target, expected)
        sizes_differ = not fits and target.shape[:1] != expected[:1]
    if not fits:
        message = (
            f"cross_entropy: expected target of shape {tuple(expected)} (class indices) or "
            f"{tuple(input.shape)} (probabilities) for input of shape {tuple(input.shape)}, "
            f"got {tuple(target.shape)}"
        )
        raise ValueError(message) if sizes_differ else RuntimeError(message)
    if not fits_dtype:
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
    mixed = weight.dtype in DTYPES and torch.float64 not in (weight.dtype, input.dtype)
    if weight.dtype != input.dtype and not (mixed and under_autocast(input)):
        raise RuntimeError(
            f"cross_entropy: expected weight of dtype {input.dtype}, as input, got {weight.dtype}"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "cross_entropy: expected a weight that needs no gradient for class indices, as torch "
            "does; detach it, or give the target as probabilities"
        )


def check_inplace(input: Tensor) -> None:
    for tensor in (input, input._base):
        if tensor is not None and tensor.is_leaf and tensor.requires_grad:
            raise RuntimeError(
                "cross_entropy: expected inplace=False for a leaf that requires grad, or a view of "
                "one: its gradient would take its own memory"
            )
    reach = 0
    for stride, size in sorted(zip(input.stride(), input.shape, strict=True)):
        if size > 1 and stride <= reach and input.numel():
            raise RuntimeError(
                "cross_entropy: expected inplace=False for an input whose elements share places in "
                "memory, such as an expanded one"
            )
        reach += (size - 1) * stride


def may_be_overwritten(input: Tensor) -> bool:
    """Whether autograd lets a view be changed: not one of several that one function made (`unbind`,
    `chunk`, what a module with a full backward hook returns), whose others it would lose."""
    if not input._is_view():
        return True
    autograd = torch._C._autograd
    return autograd._get_creation_meta(input) == autograd.CreationMeta.DEFAULT
