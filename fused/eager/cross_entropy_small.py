"""Plain cross-entropy of few logits on the CPU by PyTorch's own function, in float32: its several
passes stay in the cache, and it takes fewer calls.
"""

from typing import Any

import torch
from torch import Tensor, float32, int64  # as attributes of torch, 1% of a small call

SMALL = 2**19  # elements; of as many ours takes as long
# What F.cross_entropy calls: its Python takes a fifteenth of a small call's time.
TORCH_LOSS: Any = torch._C._nn.cross_entropy_loss  # its stub has the reduction as a str
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # computed in float32


def is_small(x: Tensor, target: Tensor) -> bool:
    return x.is_cpu and x.numel() <= SMALL and target.dtype == int64 and x.dtype in _DTYPES


def cross_entropy_small(x: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The loss, float32, of logits x and class indices, for autograd to differentiate."""
    x = x if x.dtype == float32 else x.float()
    loss: Tensor = TORCH_LOSS(x, target, None, REDUCTIONS[reduction], ignore_index, 0.0)
    return loss


def cross_entropy_small_bwd(
    dloss: Tensor, x: Tensor, target: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """dx of x (N, C, *S), to the last bit as autograd finds it, where autograd may not be used."""
    logp = torch.log_softmax(x.float(), dim=1)
    index = target.unsqueeze(1)
    ignored = index == ignore_index
    dlogp_y = -dloss.float()
    if reduction == "mean":
        dlogp_y = dlogp_y / ignored.logical_not().sum()
    if reduction == "none":
        dlogp_y = dlogp_y.unsqueeze(1)
    dlogp_y = torch.where(ignored, 0.0, dlogp_y)
    dlogp = torch.zeros_like(logp).scatter_(1, index.masked_fill(ignored, 0), dlogp_y)
    dx: Tensor = torch.ops.aten._log_softmax_backward_data(dlogp, logp, 1, logp.dtype)
    return dx.to(x.dtype)
