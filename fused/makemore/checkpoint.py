"""A run on disk: everything that resuming needs, in one file that is never half written."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused.makemore.engines import ENGINES
from fused.makemore.errors import InputError
from fused.makemore.model import Model, Settings, parameter_shapes
from fused.mlp_train import MLPParameters

_FORMAT = "fused-makemore checkpoint"
_VERSION = 1
_KINDS: dict[str, Any] = {
    "version": int,
    "settings": dict,
    "engine": str,
    "data": (str, type(None)),
    "sha256": str,
    "vocabulary": str,
    "parameters": dict,
    "mean": Tensor,
    "var": Tensor,
    "losses": Tensor,
    "generator": Tensor,
}
FILE = "checkpoint.pt"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `len(losses)` steps."""

    settings: Settings
    engine: str
    data: str | None  # --data, None for the packaged names
    sha256: str  # of the data
    vocabulary: str
    model: Model  # parameters, and statistics calibrated on the training set
    losses: Tensor  # (steps so far,), float32, on the CPU
    generator: Tensor  # state of the generator that draws the minibatches

    @property
    def step(self) -> int:
        return len(self.losses)

    def save(self, folder: Path) -> Path:
        """Writes to a temporary file, then renames it: a crash leaves the checkpoint before.

        Raises OSError where it cannot be written.
        """
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": self.settings.asdict(),
            "engine": self.engine,
            "data": self.data,
            "sha256": self.sha256,
            "vocabulary": self.vocabulary,
            "parameters": {k: v.cpu() for k, v in self.model.parameters._asdict().items()},
            "mean": self.model.mean.cpu(),
            "var": self.model.var.cpu(),
            "losses": self.losses,
            "generator": self.generator,
        }
        path = folder / FILE
        temporary = path.with_suffix(".tmp")
        serialized = io.BytesIO()
        torch.save(content, serialized)  # in a file it would hide what the system says
        with temporary.open("wb") as file:
            file.write(serialized.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return path


def load(path: Path, device: torch.device) -> Checkpoint:
    """Reads a checkpoint file, or the one in a run folder. Raises InputError if it is not ours."""
    if path.is_dir():
        path = path / FILE
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # whatever the unpickler makes of bytes that are no checkpoint
        raise InputError(f"{path} is not a checkpoint of fused-makemore") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(f"{path} is not a checkpoint of fused-makemore")
    version = content.get("version")
    if isinstance(version, int) and version != _VERSION:
        raise InputError(f"{path} has version {version}, this program reads version {_VERSION}")
    try:
        return _checkpoint(content, device)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def _checkpoint(content: dict[str, Any], device: torch.device) -> Checkpoint:
    """Raises TypeError, ValueError, AttributeError or RuntimeError where it cannot be a run's."""
    for name, kind in _KINDS.items():
        if name not in content or not isinstance(content[name], kind):
            raise TypeError(f"it has no {name}")
    if content["engine"] not in ENGINES:
        raise ValueError(f"there is no engine {content['engine']!r}")
    settings = _settings(content["settings"])
    torch.Generator().set_state(content["generator"])
    parameters = MLPParameters(**content["parameters"])
    names = [*parameters._fields, "mean", "var", "losses"]
    shapes = parameter_shapes(settings, len(content["vocabulary"]))
    shapes += [(1, settings.hidden), (1, settings.hidden), (content["losses"].numel(),)]
    tensors = [*parameters, content["mean"], content["var"], content["losses"]]
    for name, tensor, shape in zip(names, tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise ValueError(
                f"expected {name} of shape {shape}, as its settings say, in float32, "
                f"got {tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
    mean, var = content["mean"].to(device), content["var"].to(device)
    return Checkpoint(
        settings,
        content["engine"],
        content["data"],
        content["sha256"],
        content["vocabulary"],
        Model(MLPParameters(*(p.to(device) for p in parameters)), mean, var),
        content["losses"],
        content["generator"],
    )


def _settings(saved: dict[str, Any]) -> Settings:
    """Raises TypeError or ValueError where they cannot be a run's."""
    settings = Settings(**saved)
    for name, default in Settings().asdict().items():
        value = getattr(settings, name)
        least = 0 if name in ("lr", "final_lr", "seed") else 1
        if type(value) is not type(default) or value < least:
            raise ValueError(f"its {name} is {value!r}")
    return settings
