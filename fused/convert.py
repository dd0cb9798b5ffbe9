"""Swap torch.nn modules of an existing model for ours, in place."""

from torch import nn

from fused.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fused.cross_entropy import CrossEntropyLoss
from fused.linear_cross_entropy import LinearCrossEntropyLoss
from fused.sync_batch_norm import SyncBatchNorm

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.CrossEntropyLoss: CrossEntropyLoss,
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # from torch 2.13 on
    _OURS[nn.LinearCrossEntropyLoss] = LinearCrossEntropyLoss
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
}
_BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
_FORWARDS = {norm.forward for norm in _BATCH_NORMS}


def convert(model: nn.Module, activations: bool = True) -> list[str]:
    """Makes the batch norms and cross-entropy losses of `model` ours, in place.

    The modules stay the same objects: parameters, buffers, hooks, training mode and memory format
    are kept, and `state_dict` keeps its names. Subclasses of torch's modules are left alone, for
    what they override is not known, and so is a `LinearCrossEntropyLoss` with `options`.

    Args:
        model: any module; itself included.
        activations: whether a Tanh, ReLU, GELU (with the error function) or SiLU that follows a
            batch norm in a plain `nn.Sequential` is computed by the batch norm, and an
            `nn.Identity` takes its place. Pairs with a hook on what is between them or with a
            `forward` of their own, and batch norms or sequences that occur in several places, are
            left as they are. What reads a batch norm's output by its place in the sequence then
            finds the activation's. What knows only torch's batch norm drops the activation: convert
            with `activations=False` before `torch.nn.utils.fusion.fuse_conv_bn_eval`, and take
            `SyncBatchNorm` of fused, not of torch, for `convert_sync_batchnorm`. (What asks for
            torch's very types, as `torch.ao.quantization.fuse_modules`, comes before converting.)

    Returns:
        What was changed, a line each: "features.1: BatchNorm2d with relu from features.2".
    """
    changes = {}
    for name, module in model.named_modules():
        ours = _OURS.get(type(module))
        # Torch's linear loss divides its work as `options` say, for which ours has no place.
        if ours is not None and getattr(module, "options", None) is None:
            module.__class__ = ours
            changes[name] = f"{name or 'the model itself'}: {ours.__name__}"
    if activations:
        for name, sequence in list(model.named_modules()):
            if type(sequence) is nn.Sequential:
                changes |= _absorb_activations(model, name, sequence)
    return list(changes.values())


def _absorb_activations(model: nn.Module, name: str, sequence: nn.Sequential) -> dict[str, str]:
    """Moves the activations of one sequence into its batch norms; returns their lines."""
    prefix = f"{name}." if name else ""
    found = {}
    # By place: named_children has no second place of a module, so that what it stands between
    # would look adjacent.
    children = list(sequence._modules.items())
    for (first, norm), (second, activation) in zip(children, children[1:], strict=False):
        kind = _ACTIVATIONS.get(type(activation))
        if kind is None or not isinstance(norm, _BATCH_NORMS) or norm.activation is not None:
            continue
        if isinstance(activation, nn.GELU) and activation.approximate != "none":
            continue
        if activation._forward_pre_hooks or _hooked(activation) or _hooked(norm):
            continue
        if "forward" in vars(norm) or "forward" in vars(activation):  # not what its class computes
            continue
        if type(norm).forward not in _FORWARDS:  # a subclass of ours
            continue
        if _occurrences(model, norm) > 1:  # so has a norm of a sequence that has several
            continue
        norm.activation = kind
        setattr(sequence, second, nn.Identity().train(activation.training))
        line = f"{prefix}{first}: {type(norm).__name__} with {kind} from {prefix}{second}"
        found[prefix + first] = line
    return found


def _hooked(module: nn.Module) -> bool:
    """Whether somebody looks at the module's output or at its gradient."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _occurrences(model: nn.Module, module: nn.Module) -> int:
    everywhere = model.named_modules(remove_duplicate=False)
    return sum(candidate is module for _, candidate in everywhere)
