"""What looks at the operations of a call, and so decides which may be called."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter, type(None))
_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether only torch's own operations will do, because torch.func, forward-mode
    differentiation, or a tensor made of others handles each of them."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(map(is_made_of_others, tensors))
    )


def is_made_of_others(tensor: Tensor | None) -> bool:
    """As a DTensor is, which has no memory that a kernel could read."""
    kind = type(tensor)
    return kind not in _PLAIN and hasattr(kind, "__tensor_flatten__")


def refuse_transforms(name: str, instead: str, *tensors: Tensor | None) -> None:
    """Of what talks to other processes, whose part of a transformed call nobody would take.

    `instead` takes DTensors."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name}: expected no transform of torch.func among several processes: it is "
            "differentiated by autograd, once"
        )
    for tensor in filter(is_made_of_others, tensors):
        raise TypeError(
            f"{name}: expected plain tensors, this process's own, got a {type(tensor).__name__}; "
            f"of a DTensor take to_local(), or {instead}, which takes it as it is"
        )


def is_recorded() -> bool:
    """Whether operations are written down to run later, or run on tensors without memory: by
    torch.compile, torch.export, make_fx, torch.jit.trace and in FakeTensorMode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        and any(torch._C._get_dispatch_mode(mode) is not None for mode in _MODES)
    )


def unless_false(condition: bool) -> bool:
    """A condition on sizes, true where only a recorded graph's run will tell: of how many rows a
    mask selected."""
    if not _has_symbols():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # slow to import

    return guard_or_true(condition)


def same_shape(tensor: Tensor, shape: torch.Size) -> bool:
    """Whether tensor has that shape; where only a recorded graph's run will tell, the graph checks
    that it has."""
    if tensor.dim() != len(shape):
        return False
    if not _has_symbols():
        return tensor.shape == shape
    for size, expected in zip(tensor.shape, shape, strict=True):
        if not unless_false(size == expected):
            return False
        torch._check(size == expected)
    return True


def _has_symbols() -> bool:
    """Whether sizes may be unknown: not in torch.jit.trace, whose sizes are tensors."""
    if torch.compiler.is_compiling():
        return True
    return is_recorded() and torch._C._get_tracing_state() is None


def outlives_the_call() -> bool:
    """Whether what `is_recorded` may be differentiated though nothing asks for that now.

    torch.compile looks again at every call.
    """
    return torch.compiler.is_exporting() or not torch.compiler.is_compiling()


def saves_elsewhere() -> bool:
    """Whether hooks take what autograd saves (torch.utils.checkpoint, save_on_cpu). Then nothing of
    the logits' size may be kept besides, and the backward may get the saved tensors in other
    memory."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def is_composed(upstream: Tensor) -> bool:
    """Whether a backward pass is made of operations that torch knows: if it is to be differentiated
    (create_graph=True), or upstream is many gradients at once (is_grads_batched=True, and
    torch.func.vmap over torch.autograd.grad)."""
    return (
        torch.is_grad_enabled()
        or torch._C._functorch.is_legacy_batchedtensor(upstream)
        or torch._C._functorch.is_functorch_wrapped_tensor(upstream)
    )


def may_be_overridden() -> bool:
    """Whether `__torch_function__` of an argument, or a TorchFunctionMode, is asked for a call's
    result. Not by torch.compile, which cannot follow that: it asks for the operations within."""
    return not torch.compiler.is_compiling()


def is_symbolic(input: Any) -> bool:
    """Whether torch.fx.symbolic_trace calls a module: input then has no shape to look at."""
    return isinstance(input, torch.fx.Proxy)


def as_leaf(module: nn.Module, *inputs: Any) -> Any:
    """The node of a symbolic graph that calls `module`, as it would call one of torch's."""
    everywhere = nn.modules.module
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
    ):
        raise NotImplementedError(
            f"torch.fx: expected no hooks on a fused.{type(module).__name__}: tracing ran them, "
            "and the graph would again; remove them, or take a Tracer to whose is_leaf_module "
            "it is a leaf"
        )
    tracer = inputs[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, {})


def refuse_script(module: nn.Module) -> NoReturn:
    """What `torch.jit.script` calls first, as `module.__prepare_scriptable__()`."""
    raise NotImplementedError(
        f"torch.jit.script: fused.{type(module).__name__} cannot be scripted; "
        "torch.compile, torch.export and torch.jit.trace take it"
    )
