"""Gradients by torch's own operations, which every backward gives the same way where asked."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused.eager.batch_norm import batch_norm_composed
from fused.eager.batch_norm_native import computed_in
from fused.eager.cross_entropy import cross_entropy_composed


def differentiable_gradients(
    compute: Callable[..., Tensor],
    upstream: Tensor,
    tensors: Sequence[Tensor | None],
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of each tensor that is there and wanted, and still requires one: it may have
    been frozen since. Where autograd is recording (with create_graph=True) it can be differentiated
    again.

    `compute(*tensors)` is the output, by operations that torch differentiates.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Other names for them: what one was computed from another, and the hooks that they have,
        # are for whoever asked for these gradients, and not to be gone through here as well.
        names = [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]
        output = compute(*names)
    asked = [
        t if want and t is not None and t.requires_grad else None
        for t, want in zip(names, wants, strict=True)
    ]
    leaves = [t for t in asked if t is not None]
    found = iter(
        torch.autograd.grad(output, leaves, upstream, create_graph=again) if leaves else ()
    )
    return [None if t is None else next(found) for t in asked]


def cross_entropy_gradients(
    dloss: Tensor, tensors: Sequence[Tensor | None], options: Sequence[Any], wants: Sequence[bool]
) -> list[Tensor | None]:
    """Of input, target and weight; the options are `cross_entropy_composed`'s."""

    def loss(*tensors: Tensor | None) -> Tensor:
        arguments: Any = (*tensors, *options, dloss.dtype, False)
        return cross_entropy_composed(*arguments)[0]

    return differentiable_gradients(loss, dloss, tensors, wants)


def batch_norm_gradients(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    kept_residual: bool,
    frozen: tuple[Tensor | None, Tensor | None],
    eps: float,
    correction: int,
    activation: str | None,
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """Of input, weight, bias and residual; frozen are mean and rstd where they are not the batch's,
    and kept is what the forward keeps for the activation: the residual, or as `_pulled_back`.

    The bias counts where the activation is computed again; elsewhere only its dtype does.
    """
    residual, shift = kept, bias
    knows_dz = activation is None or not kept_residual
    if knows_dz:
        residual = shift = None
        dy, activation = _pulled_back(dy, kept, input, activation), None

    def output(*tensors: Tensor | None) -> Tensor:
        arguments: Any = (*tensors, *frozen, eps, correction, activation)
        return batch_norm_composed(*arguments)[0]

    gradients = differentiable_gradients(output, dy, (input, weight, shift, residual), wants)
    if wants[2] and knows_dz:
        assert bias is not None
        rows = [d for d in range(dy.dim()) if d != 1]
        gradients[2] = dy.to(computed_in(input)).sum(rows).to(bias.dtype)
    if wants[3] and knows_dz:
        gradients[3] = dy
    return gradients


def _pulled_back(dy: Tensor, kept: Tensor | None, input: Tensor, activation: str | None) -> Tensor:
    """dz, which can be differentiated again, from y or the signs of z. As torch's, that of relu has
    a derivative in z, 0."""
    if kept is None:
        return dy
    if activation == "tanh":
        return dy * (1 - kept * kept)
    if kept.dtype == torch.uint8:
        from fused.kernels.batch_norm_layout import unpack_signs  # with kernels, when needed

        kept = unpack_signs(kept, input).to(input.dtype) + input.clamp(0, 0)
    dz: Tensor = torch.ops.aten.threshold_backward(dy, kept, 0)
    return dz
