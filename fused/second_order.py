"""Gradients by torch's own operations, which every backward gives the same way where asked."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    compute: Callable[..., Tensor],
    upstream: Tensor,
    tensors: Sequence[Tensor | None],
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of each tensor that is there and wanted; where autograd is recording (with
    create_graph=True) it can be differentiated again.

    `compute(*tensors)` is the output, by operations that torch differentiates.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Other names for them: what one was computed from another, and the hooks that they have,
        # are for whoever asked for these gradients, and not to be gone through here as well.
        names = [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]
        output = compute(*names)
    asked = [t if want else None for t, want in zip(names, wants, strict=True)]
    leaves = [t for t in asked if t is not None]
    found = iter(
        torch.autograd.grad(output, leaves, upstream, create_graph=again) if leaves else ()
    )
    return [None if t is None else next(found) for t in asked]
