"""Registrations with torch.library, one file an operation: what torch.compile calls.

Operators are opaque to the compiler and run whatever implementation serves the tensor, so that a
compiled graph gives the bits of eager mode; but the compiler lays upstream gradients out as it
expected them, and sums over other strides may be added up in another order. The override of
`fused.backend.use` is looked at when the graph runs, forward and backward each. What an
implementation does not return is an empty tensor.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from fused import backend

library = torch.library.Library("fused", "FRAGMENT")


def register(name: str, operator: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Says what an operator that `library` defines computes, and the shapes of what it returns."""
    library.impl(name, operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused::{name}", fake, lib=library)


def register_gradient(name: str, operator: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """`register` of what computes gradients. They are differentiated by other means; where this one
    was recorded and is to be, autograd would take them for constants."""
    register(name, operator, fake)
    operation = name.rpartition("_")[0]

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(
            f"{operation}: expected no derivative of a gradient (create_graph=True) where the call "
            "is part of a graph, of torch.compile, torch.export or make_fx: call it outside of one"
        )

    torch.library.register_autograd(f"fused::{name}", refuse, lib=library)


def laid_out_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` with the strides of torch.empty_like(like), as the fake implementations promise."""
    promised = torch.empty_like(like, dtype=tensor.dtype)
    return tensor if tensor.stride() == promised.stride() else promised.copy_(tensor)


def implementation(operation: str, *tensors: torch.Tensor | None) -> ModuleType:
    """What serves an operator with these arguments, by the first of them.

    Raises RuntimeError in forward-mode differentiation, of which operators know nothing: their
    results would be without a tangent, as constants are. (Within torch.func.jvp in any case: there
    they do not see which of their arguments have one.)
    """
    if forward_ad._current_level >= 0 and (
        eager_transforms.JVP_NESTING > 0
        or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    ):
        raise RuntimeError(
            f"{operation}: expected no forward-mode derivative (jvp) of a recorded graph, as "
            "torch.compile, torch.export, make_fx and torch.jit.trace make them: differentiate the "
            "function that was recorded"
        )
    assert tensors[0] is not None
    return backend.implementation(operation, tensors[0])


def process_group(name: Any) -> Any:
    """The group that operators know by its name (a str, to which torch 2.13 gives its own type)."""
    # Not above: there are builds of torch without it.
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)
