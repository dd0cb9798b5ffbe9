"""A run or a sweep on disk: all that resuming needs, in one file that is never half written."""

import contextlib
import io
import math
import os
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused.makemore.engines import ENGINES, METHODS
from fused.makemore.errors import InputError
from fused.makemore.model import Model, Settings, parameter_shapes
from fused.mlp_train import MLPParameters

_FORMAT, _SWEEP_FORMAT = "fused-makemore checkpoint", "fused-makemore sweep"
_VERSION = 1
_KINDS: dict[str, Any] = {
    "version": int,
    "settings": dict,
    "engine": str,
    "data": (str, type(None)),
    "sha256": str,
    "vocabulary": str,
    "parameters": dict,
    "losses": Tensor,
}
_RUN_KINDS = {**_KINDS, "mean": Tensor, "var": Tensor, "generator": Tensor}
_SWEEP_KINDS = {**_KINDS, "lr": list, "seeds": list, "generators": Tensor}
FILE, SWEEP_FILE = "checkpoint.pt", "sweep.pt"


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

    def save(self, folder: Path) -> None:
        """Writes to a temporary file, then renames it: a crash leaves the checkpoint before.

        Raises OSError where it cannot be written.
        """
        content = {
            **_common(self, _FORMAT),
            "mean": self.model.mean.cpu(),
            "var": self.model.var.cpu(),
            "generator": self.generator,
        }
        _write(content, folder / FILE)

    @property
    def parameters(self) -> MLPParameters:
        return self.model.parameters


@dataclass(frozen=True)
class SweepCheckpoint:
    """The state of a sweep's M networks, of L learning rates and S seeds, M = L * S."""

    settings: Settings  # without what is varied
    engine: str
    data: str | None  # --data, None for the packaged names
    sha256: str  # of the data
    vocabulary: str
    parameters: MLPParameters  # (M, ...); of networks that diverged not finite
    losses: Tensor  # (M, steps so far), float32, on the CPU
    lr: list[float]  # L
    seeds: list[int]  # S
    generators: Tensor  # (S, bytes), states of the generators that draw the minibatches

    @property
    def step(self) -> int:
        return self.losses.shape[1]

    def save(self, folder: Path) -> None:
        """As a run's. Raises OSError where it cannot be written."""
        content = {
            **_common(self, _SWEEP_FORMAT),
            "lr": self.lr,
            "seeds": self.seeds,
            "generators": self.generators,
        }
        _write(content, folder / SWEEP_FILE)


def _common(checkpoint: Checkpoint | SweepCheckpoint, format: str) -> dict[str, Any]:
    return {
        "format": format,
        "version": _VERSION,
        "settings": checkpoint.settings.asdict(),
        "engine": checkpoint.engine,
        "data": checkpoint.data,
        "sha256": checkpoint.sha256,
        "vocabulary": checkpoint.vocabulary,
        "parameters": {k: v.cpu() for k, v in checkpoint.parameters._asdict().items()},
        "losses": checkpoint.losses,
    }


def _write(content: dict[str, Any], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    serialized = io.BytesIO()
    torch.save(content, serialized)  # in a file it would hide what the system says
    try:
        with temporary.open("wb") as file:
            file.write(serialized.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        # Of a full disk, say, it names no file.
        raise OSError(error.errno, error.strerror, str(temporary)) from None
    temporary.replace(path)


def load(path: Path, device: torch.device) -> Checkpoint:
    """Reads a checkpoint file, or the one in a run folder. Raises InputError if it is not ours."""
    return _load(path, FILE, _FORMAT, _checkpoint, device)


def load_sweep(path: Path, device: torch.device) -> SweepCheckpoint:
    """Reads a sweep's checkpoint, or the one in its folder. Raises InputError if it is not ours."""
    return _load(path, SWEEP_FILE, _SWEEP_FORMAT, _sweep_checkpoint, device)


_Loaded = TypeVar("_Loaded", Checkpoint, SweepCheckpoint)


def _load(
    path: Path,
    file: str,
    format: str,
    parse: Callable[[dict[str, Any], torch.device], _Loaded],
    device: torch.device,
) -> _Loaded:
    if path.is_dir():
        path = path / file
    kind = format.removeprefix("fused-makemore ")
    foreign = InputError(f"{path} is not a {kind} of fused-makemore")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}{_other(path)}") from None
    except Exception:  # whatever the unpickler makes of bytes that are no checkpoint
        raise foreign from None
    if not isinstance(content, dict) or content.get("format") != format:
        raise foreign
    version = content.get("version")
    if isinstance(version, int) and version != _VERSION:
        raise InputError(f"{path} has version {version}, this program reads version {_VERSION}")
    try:
        return parse(content, device)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def generator(state: Tensor) -> torch.Generator:
    """One that goes on from there. Raises RuntimeError where it is no state of a generator."""
    generator = torch.Generator()
    generator.set_state(state.clone())  # of a view, PyTorch reads the storage from its beginning
    return generator


def _other(path: Path) -> str:
    """What is there of the other command."""
    command, file = ("sweep", SWEEP_FILE) if path.name == FILE else ("train", FILE)
    if not (path.parent / file).exists():
        return ""
    return f"; {file} is there, which is for fused-makemore {command} --resume"


def _checkpoint(content: dict[str, Any], device: torch.device) -> Checkpoint:
    """Raises TypeError, ValueError, AttributeError or RuntimeError where it cannot be a run's."""
    settings, parameters = _checked(content, _RUN_KINDS, ENGINES)
    generator(content["generator"])
    shapes = [
        *parameter_shapes(settings, len(content["vocabulary"])),
        (1, settings.hidden),
        (1, settings.hidden),
        (content["losses"].numel(),),
    ]
    names = [*parameters._fields, "mean", "var", "losses"]
    tensors = [*parameters, content["mean"], content["var"], content["losses"]]
    for name, tensor, shape in zip(names, tensors, shapes, strict=True):
        _check_tensor(name, tensor, shape)
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


def _sweep_checkpoint(content: dict[str, Any], device: torch.device) -> SweepCheckpoint:
    """Raises TypeError, ValueError, AttributeError or RuntimeError where it cannot be a sweep's."""
    settings, parameters = _checked(content, _SWEEP_KINDS, METHODS)
    lr, seeds, generators = content["lr"], content["seeds"], content["generators"]
    for name, values in (("lr", lr), ("seed", seeds)):
        if not values:
            raise ValueError(f"it has no {name}")
        for value in values:
            _check_setting(name, value)
        if len(set(values)) < len(values):
            raise ValueError(f"it has a {name} twice")
    for state in generators:
        generator(state)
    if len(generators) != len(seeds):
        raise ValueError(f"it has {len(generators)} generators for {len(seeds)} seeds")
    models, losses = len(lr) * len(seeds), content["losses"]
    shapes = parameter_shapes(settings, len(content["vocabulary"]))
    for name, tensor, shape in zip(parameters._fields, parameters, shapes, strict=True):
        _check_tensor(name, tensor, (models, *shape))
    _check_tensor("losses", losses, (models, losses.numel() // models))
    return SweepCheckpoint(
        settings,
        content["engine"],
        content["data"],
        content["sha256"],
        content["vocabulary"],
        MLPParameters(*(p.to(device) for p in parameters)),
        losses,
        lr,
        seeds,
        generators,
    )


def _checked(
    content: dict[str, Any], kinds: dict[str, Any], engines: Container[str]
) -> tuple[Settings, MLPParameters]:
    """What every checkpoint has. Raises TypeError or ValueError where one cannot be ours."""
    for name, kind in kinds.items():
        if name not in content or not isinstance(content[name], kind):
            raise TypeError(f"it has no {name}")
    if content["engine"] not in engines:
        raise ValueError(f"there is no engine {content['engine']!r}")
    settings = Settings(**content["settings"])
    for name, value in settings.asdict().items():
        _check_setting(name, value)
    return settings, MLPParameters(**content["parameters"])


def _check_setting(name: str, value: Any) -> None:
    least = 0 if name in ("lr", "final_lr", "seed") else 1
    kind = type(getattr(Settings(), name))
    end = math.inf if kind is float else 2**63
    if type(value) is not kind or not least <= value < end:
        raise ValueError(f"its {name} is {value!r}")


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype != torch.float32:
        raise ValueError(
            f"expected {name} of shape {shape}, as its settings say, in float32, "
            f"got {tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
        )
