"""Softmax cross-entropy in plain PyTorch, with the functions of fused.kernels.cross_entropy.

loss_i = -log softmax(x_i)_y_i                             0 where y_i is ignored
dx_ic  = dloss_i * (softmax(x_i)_c - [c = y_i])            0 where y_i is ignored

torch.log_softmax and torch.softmax are native and take one pass each, so nothing is saved between
forward and backward but the arguments.
"""

import torch


def cross_entropy_fwd(
    x: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The loss of logits x (N, C) and class indices target (N,), and what its backward needs.

    Returns (loss, stats, scale): loss as `reduction` says, in x's dtype; stats is None here; scale
    is the factor of every row in the mean or sum, one number, None for "none". A target outside
    [0, C) that is not `ignore_index` raises IndexError on the CPU; elsewhere, where looking would
    stall the device, its loss is NaN.
    """
    logprobs = torch.log_softmax(x, dim=1, dtype=_compute_dtype(x))
    ignored, outside, index = _split_targets(target, x.shape[1], ignore_index)
    try:
        loss = logprobs.gather(1, index).squeeze(1).neg_()
    except (IndexError, RuntimeError):
        _raise_if_outside(target, x.shape[1], ignore_index)
        raise
    if outside is not None:
        loss.masked_fill_(outside, float("nan"))
    loss.masked_fill_(ignored, 0.0)
    if reduction == "none":
        return loss.to(x.dtype), None, None
    total = loss.sum()
    if reduction == "sum":
        return total.to(x.dtype), None, torch.ones_like(total)
    scale = ignored.logical_not().sum().to(total.dtype).reciprocal_()
    return (total * scale).to(x.dtype), None, scale


def cross_entropy_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    stats: torch.Tensor | None,
    scale: torch.Tensor | None,
    ignore_index: int,
) -> torch.Tensor:
    """The gradient dx (N, C) of the loss, in x's dtype.

    dloss is the upstream gradient, (N,) or one number; scale is what `cross_entropy_fwd` returned.
    """
    assert stats is None, "stats belong to the Triton kernels"
    ignored, outside, index = _split_targets(target, x.shape[1], ignore_index)
    dx = torch.softmax(x, dim=1, dtype=_compute_dtype(x))
    dx.scatter_add_(1, index, dx.new_full((1, 1), -1.0).expand_as(index))
    factor = dloss.to(dx.dtype) if scale is None else dloss.to(dx.dtype) * scale
    factor = factor.reshape(-1, 1).expand(dx.shape[0], 1)
    if outside is not None:
        factor = factor.masked_fill(outside.unsqueeze(1), float("nan"))
    return dx.mul_(factor).masked_fill_(ignored.unsqueeze(1), 0.0).to(x.dtype)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _split_targets(
    target: torch.Tensor, n_classes: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Which rows are ignored (N,), which are out of range (N,), and targets to gather by (N, 1).

    On the CPU gather itself refuses what is out of range, so nobody has to look: None.
    """
    ignored = target == ignore_index
    index = target.long().masked_fill(ignored, 0)
    if target.device.type == "cpu":
        return ignored, None, index.unsqueeze(1)
    outside = (index < 0) | (index >= n_classes)
    return ignored, outside, index.masked_fill_(outside, 0).unsqueeze(1)


def _raise_if_outside(target: torch.Tensor, n_classes: int, ignore_index: int) -> None:
    outside = ((target < 0) | (target >= n_classes)) & (target != ignore_index)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise IndexError(
            f"cross_entropy: expected target in [0, {n_classes}) or ignore_index={ignore_index}, "
            f"got {int(target[row])} at row {row}"
        )
