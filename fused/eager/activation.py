"""Activations and their derivatives in plain PyTorch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def tanh_(z: Tensor) -> Tensor:
    """tanh(z) = 1 / (1 + 2 / (e^(2z) - 1)), over z; exact to 2e-7 of itself, also next to 0.

    torch's own takes one and a half times as long on a CPU.
    """
    return z.mul_(2).expm1_().reciprocal_().mul_(2).add_(1).reciprocal_()


def tanh_by_sigmoid_(z: Tensor) -> Tensor:
    """tanh(z) = 1 - 2 / (1 + e^(2z)), over z; exact to 2e-7 of 1, in less than half the time.

    For z that are differences of larger numbers, and next to 0 no better known than that.
    """
    return torch.sub(z.new_ones(()), z.mul_(-2).sigmoid_(), alpha=2, out=z)


NEW: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": tanh_by_sigmoid_,
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_.default,
    "silu": torch.ops.aten.silu_.default,
}


def activation_backward(activation: str, dy: Tensor, z: Tensor, dz: Tensor) -> None:
    """Writes dy * f'(z) to dz; for tanh z is y = f(z), for relu it may be."""
    aten = torch.ops.aten
    if activation == "tanh":
        aten.tanh_backward.grad_input(dy, z, grad_input=dz)
    elif activation == "relu":
        aten.threshold_backward.grad_input(dy, z, 0, grad_input=dz)
    elif activation == "gelu":
        aten.gelu_backward.grad_input(dy, z, grad_input=dz)
    else:
        aten.silu_backward.grad_input(dy, z, grad_input=dz)
