"""Gradients for create_graph=True, which every operation's backward gives the same way."""

from collections.abc import Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    output: Tensor, upstream: Tensor, tensors: Sequence[Tensor | None], wants: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of each tensor that is there and wanted, which can be differentiated again.

    `output` comes of the tensors by operations that torch differentiates.
    """
    asked = [t if want else None for t, want in zip(tensors, wants, strict=True)]
    leaves = [t for t in asked if t is not None]
    found = iter(torch.autograd.grad(output, leaves, upstream, create_graph=True) if leaves else ())
    return [None if t is None else next(found) for t in asked]
