"""Cross-entropy: the checked function, its backward pass and its module."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fused import backend

_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)
_REDUCTIONS = ("none", "mean", "sum")


class CrossEntropyFunction(torch.autograd.Function):
    """dlogits = dloss * (softmax - onehot), over n for the mean, from the logits alone."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str
    ) -> torch.Tensor:
        kernels = backend.implementation("cross_entropy", input)
        loss, stats, scale = kernels.cross_entropy_fwd(input, target, ignore_index, reduction)
        ctx.save_for_backward(input, target, stats, scale)
        ctx.kernels, ctx.ignore_index = kernels, ignore_index
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, target, stats, scale = ctx.saved_tensors
        dlogits = ctx.kernels.cross_entropy_bwd(
            dloss, input, target, stats, scale, ctx.ignore_index
        )
        return dlogits, None, None, None


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Softmax cross-entropy of logits against class indices, as torch's `F.cross_entropy`.

    The backward pass is the closed form: (softmax(input) - onehot(target)) / n for the mean over
    n rows, times the upstream gradient. The logits are never written to.

    Args:
        input: logits, shape (N, C), float16, bfloat16, float32 or float64, any strides.
        target: class indices in [0, C), shape (N,), int64, int32 or uint8, on input's device.
        ignore_index: rows with this target have loss 0 and gradient 0 and do not count in the mean.
        reduction: "mean", "sum", or "none" for the losses of the rows.

    Returns:
        The loss in input's dtype, a 0-d tensor, or shape (N,) for "none". It is computed in
        float32 (float64 for float64). The mean over no rows is NaN.

    Raises:
        ValueError: shapes that do not fit, or an unknown reduction.
        TypeError: an input that is not floating point, or a target that is no index.
        IndexError: a target outside [0, C), on the CPU. On a GPU looking would stall the device:
            there such a row has loss and gradient NaN.

    The formula is derived in docs/derivations.md.
    """
    _check(input, target, reduction)
    return CrossEntropyFunction.apply(input, target, ignore_index, reduction)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss`, computed by `fused.cross_entropy`.

    Args:
        ignore_index: rows with this target have loss 0 and gradient 0 and do not count in the mean.
        reduction: "mean", "sum" or "none".
    """

    def __init__(self, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(
            input, target, ignore_index=self.ignore_index, reduction=self.reduction
        )


def _check(input: torch.Tensor, target: torch.Tensor, reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"cross_entropy: expected reduction to be one of {', '.join(_REDUCTIONS)}, "
            f"got {reduction!r}"
        )
    if input.dim() != 2:
        raise ValueError(f"cross_entropy: expected input of shape (N, C), got {tuple(input.shape)}")
    if target.dim() != 1 or target.shape[0] != input.shape[0]:
        raise ValueError(
            f"cross_entropy: expected target of shape ({input.shape[0]},) for input of shape "
            f"{tuple(input.shape)}, got {tuple(target.shape)}"
        )
    if not input.is_floating_point():
        raise TypeError(f"cross_entropy: expected floating-point input, got {input.dtype}")
    if target.dtype not in _INDEX_DTYPES:
        raise TypeError(
            f"cross_entropy: expected target of dtype int64, int32 or uint8, got {target.dtype}"
        )
    if target.device != input.device:
        raise ValueError(
            f"cross_entropy: expected target on {input.device}, where input is, got {target.device}"
        )
