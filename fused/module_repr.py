"""What a module prints of itself besides what torch's prints."""

from typing import Any

from torch import nn


def with_options(torchs: str, module: nn.Module, **usual: Any) -> str:
    """Torch's `extra_repr` of `module`, and its options that are not the usual ones."""
    options = {name: getattr(module, name) for name in usual}
    changed = [f"{name}={value!r}" for name, value in options.items() if value != usual[name]]
    return ", ".join(filter(None, [torchs, *changed]))
