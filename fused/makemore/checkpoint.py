"""A run on disk: everything that resuming needs, in one file that is never half written."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused.makemore.errors import InputError
from fused.makemore.model import Model, Settings, parameter_shapes
from fused.mlp_train import MLPParameters

_FORMAT = "fused-makemore checkpoint"
_VERSION = 1
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
        """Writes to a temporary file, then renames it: a crash leaves the checkpoint before."""
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
        with temporary.open("wb") as file:
            torch.save(content, file)
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
    if content["version"] != _VERSION:
        raise InputError(
            f"{path} has version {content['version']}, this program reads version {_VERSION}"
        )
    try:
        settings = Settings(**content["settings"])
        parameters = MLPParameters(**{k: v.to(device) for k, v in content["parameters"].items()})
        model = Model(parameters, content["mean"].to(device), content["var"].to(device))
        checkpoint = Checkpoint(
            settings,
            content["engine"],
            content["data"],
            content["sha256"],
            content["vocabulary"],
            model,
            content["losses"],
            content["generator"],
        )
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged: it lacks a part of a checkpoint") from None
    _check_sizes(checkpoint, path)
    return checkpoint


def _check_sizes(checkpoint: Checkpoint, path: Path) -> None:
    shapes = parameter_shapes(checkpoint.settings, len(checkpoint.vocabulary))
    for (name, tensor), shape in zip(
        checkpoint.model.parameters._asdict().items(), shapes, strict=True
    ):
        if tensor.shape != shape:
            raise InputError(
                f"{path}: expected {name} of shape {shape}, as its settings say, "
                f"got {tuple(tensor.shape)}"
            )
