"""fused-makemore: check the gradients, train the network, sweep settings, sample names."""

import argparse
import dataclasses
import io
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fused import backend
from fused.makemore.errors import InputError
from fused.makemore.model import Settings, tenth
from fused.makemore.options import SWEEP_LR, SWEEP_SEEDS, parse
from fused.makemore.training import forget

_METRICS, _SWEEP = "metrics.json", "sweep.json"
# What a shell reports of a program that Ctrl-C ended, and of one whose output nobody reads.
_INTERRUPTED, _UNREAD = 130, 141
_NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")  # torch, on a CPU


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    0; 1 for failed checks; 2 for bad input, for what does not fit memory, and for files that cannot
    be written; 130 where Ctrl-C ended it; 141 where the reader of its output went away.
    """
    options = parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names may have letters that a terminal has not
    try:
        status = _COMMANDS[options.command](options)
        print(end="", flush=True)
        return status
    except InputError as error:
        return _refused(str(error))
    except KeyboardInterrupt:  # before training began, or the second one during it
        return _INTERRUPTED
    except BrokenPipeError:
        forget(sys.stdout)
        return _UNREAD
    except OSError as error:
        return _refused(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError:
        return _refused("not enough memory; use smaller sizes")
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(m in str(error) for m in _NO_MEMORY):
            return _refused("not enough memory; use smaller sizes")
        raise


def _refused(why: str) -> int:
    if sys.stderr is not None:  # it may be closed
        try:
            print(f"fused-makemore: {why}", file=sys.stderr, flush=True)
        except OSError:
            forget(sys.stderr)
    return 2


def _settings(options: argparse.Namespace) -> Settings:
    given = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if not isinstance(value, list)}
    lr = given.get("lr")
    if lr is not None and given["final_lr"] is None:
        given["final_lr"] = tenth(lr)
    return dataclasses.replace(
        options.defaults, **{name: value for name, value in given.items() if value is not None}
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch finds no CUDA device; use --device cpu")
    return torch.device(name)


def _check_backend(engine: str, device: torch.device) -> None:
    """Raises InputError where the engine looks at FUSED_BACKEND, and that cannot serve `device`."""
    if engine not in ("auto", "fused"):
        return
    try:
        backend.name_for(torch.empty(0, device=device))
    except (ValueError, RuntimeError) as error:
        raise InputError(f"FUSED_BACKEND: {error}") from None


def _load_data(path: str | None, settings: Settings, device: torch.device) -> Any:
    from fused.makemore import data

    if settings.batch < 2:
        raise InputError("--batch 1: batch norm needs at least 2 examples to have a variance")
    dataset = data.load(path, settings.context, device)
    if len(dataset.train) < settings.batch:
        raise InputError(
            f"{dataset.source} gives {len(dataset.train)} training examples, "
            f"fewer than one minibatch of {settings.batch}; use a smaller --batch"
        )
    return dataset


def _check(options: argparse.Namespace) -> int:
    from fused.makemore import check

    settings, device = _settings(options), _device(options.device)
    _check_backend("fused", device)
    return check.run(_load_data(options.data, settings, device), settings, device)


def _train(options: argparse.Namespace) -> int:
    device = _device(options.device)
    if options.resume is not None:
        return _trained(*_resumed(options, device), device)
    with _started(options, device) as (run, folder):
        return _trained(run, folder, device)


def _trained(run: Any, folder: Path, device: torch.device) -> int:
    from fused.makemore import training

    s, d = run.settings, run.dataset
    print(
        f"{d.source}: {d.words} words, {len(d.train)} / {len(d.val)} / {len(d.test)} examples, "
        f"{len(d.vocabulary)} characters\n"
        f"{sum(p.numel() for p in run.parameters)} parameters, engine {run.engine}, "
        f"device {device.type}, steps {run.step} to {s.steps}, run folder {folder}",
        flush=True,
    )
    outcome = training.train(run, folder)
    if outcome.interrupted:
        print(
            f"\ninterrupted at step {run.step}; continue with: "
            f"fused-makemore train --resume {folder}"
        )
        return _INTERRUPTED
    try:
        _report(run, folder, outcome.steps_per_second, device)
    except KeyboardInterrupt:
        _say_evaluate("train", folder, _METRICS)
        return _INTERRUPTED
    return 0


def _say_evaluate(command: str, folder: Path, last: str) -> None:
    """Unless the file is there that is written last: then it is evaluated."""
    if not (folder / last).exists():
        print(f"\ninterrupted; evaluate it with: fused-makemore {command} --resume {folder}")


@contextmanager
def _started(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[Any, Path]]:
    from fused.makemore import engines, model, training

    settings, engine = _settings(options), options.engine or "auto"
    _check_backend(engine, device)
    dataset = _load_data(options.data, settings, device)
    parameters, generator = model.initial_parameters(settings, len(dataset.vocabulary), device)
    if engine == "auto":
        engine = engines.fastest(parameters, dataset.train.x, settings.batch)
    # What cannot run leaves no folder.
    engines.start(engine, parameters, dataset.train.x, dataset.train.y, settings.batch)
    with _folder(options.out, "runs") as folder:
        _check_empty(folder)
        losses = torch.empty(0)
        run = training.Run(settings, engine, options.data, dataset, parameters, generator, losses)
        yield run, folder


@contextmanager
def _folder(out: str | None, default: str) -> Iterator[Path]:
    """The folder for what the block writes; if it writes nothing, what was made is removed."""
    folder, made = Path(default if out is None else out), []
    try:
        try:
            made += [path for path in (folder, *folder.parents) if not path.exists()]
            if out is None:
                folder = _new_folder(folder)
                made.insert(0, folder)
            else:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"cannot make the folder {error.filename}: {error.strerror}"
            raise InputError(why) from None
        _check_writable(folder)
        yield folder
    finally:
        with suppress(OSError):  # it is not empty
            for path in made:
                path.rmdir()


def _check_writable(folder: Path) -> None:
    """Raises InputError where nothing can be written, now rather than when training is over."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = f"cannot write into the folder {folder}: {error.strerror}"
        raise InputError(why) from None


def _check_empty(folder: Path) -> None:
    """Raises InputError where there is a run or a sweep in it."""
    from fused.makemore import checkpoint

    if (folder / _SWEEP).is_file():
        raise InputError(f"{folder} already holds a sweep; use another --out")
    for command, file in (("train", checkpoint.FILE), ("sweep", checkpoint.SWEEP_FILE)):
        if (folder / file).exists():
            what = "run" if command == "train" else "sweep"
            raise InputError(
                f"{folder} already holds a {what}; continue it with: "
                f"fused-makemore {command} --resume {folder}"
            )


def _new_folder(parent: Path) -> Path:
    """A folder named after the time, then -2, -3, ...: of runs that start together, each has its
    own."""
    parent.mkdir(parents=True, exist_ok=True)
    name, number = time.strftime("%Y-%m-%d-%H%M%S"), 1
    folder = parent / name
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = parent / f"{name}-{number}"


def _resumed(options: argparse.Namespace, device: torch.device) -> tuple[Any, Path]:
    from fused.makemore import checkpoint, training

    path = _resumed_path(options, "run")
    saved = checkpoint.load(path, device)
    _check_backend(saved.engine, device)
    _check_given(options, {**saved.settings.asdict(), "engine": saved.engine}, f"the run in {path}")
    folder = path if path.is_dir() else path.parent
    if saved.step >= saved.settings.steps and (folder / _METRICS).exists():
        raise InputError(f"the run in {path} is complete: {saved.step} steps")
    _check_writable(folder)
    data, dataset = _resumed_data(options, saved, f"the run in {path}", device)
    run = training.Run(
        saved.settings,
        saved.engine,
        data,
        dataset,
        saved.parameters,
        checkpoint.generator(saved.generator),
        saved.losses,
    )
    return run, folder


def _resumed_path(options: argparse.Namespace, what: str) -> Path:
    if options.out is not None:
        raise InputError(f"--out: a resumed {what} stays in its folder")
    return Path(options.resume)


def _check_given(options: argparse.Namespace, saved: dict[str, Any], where: str) -> None:
    """Raises InputError where an option that was given is not what is resumed."""
    for name, value in saved.items():
        given = getattr(options, name, None)
        if given is not None and given != value and (name, given) != ("engine", "auto"):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {_said(given)}: {where} has {flag} {_said(value)}")


def _said(value: Any) -> str:
    """An option's value as it is given."""
    if not isinstance(value, list):
        return str(value)
    if type(value[0]) is int and value == list(range(value[0], value[0] + len(value))):
        return f"{value[0]}:{value[-1] + 1}"
    return ",".join(map(str, value))


def _resumed_data(
    options: argparse.Namespace, saved: Any, where: str, device: torch.device
) -> tuple[str | None, Any]:
    """The option --data, and the data. Raises InputError where they are not what it began with."""
    data = saved.data if options.data is None else options.data
    try:
        dataset = _load_data(data, saved.settings, device)
    except InputError as error:
        if options.data is None and data is not None:
            raise InputError(
                f"{error}; {where} began with it: --data says where it is now"
            ) from None
        raise
    if dataset.sha256 != saved.sha256:
        raise InputError(f"{dataset.source} is not the data that {where} began with")
    return data, dataset


def _report(run: Any, folder: Path, steps_per_second: float | None, device: torch.device) -> None:
    from fused.makemore import plots
    from fused.makemore.model import calibrate

    d, s = run.dataset, run.settings
    model = calibrate(run.parameters, d.train)
    metrics = {
        "train_loss": model.loss(d.train),
        "val_loss": model.loss(d.val),
        "test_loss": model.loss(d.test),
        "steps": s.steps,
        "steps_per_second": steps_per_second,
        "engine": run.engine,
        "seed": s.seed,
        "settings": s.asdict(),
        **_circumstances(d, device),
    }
    plots.loss_curve(run.losses, folder / "loss.png")
    x, y = d.train.x[: s.batch], d.train.y[: s.batch]
    with torch.no_grad():
        probs = torch.softmax(model.logits(x), dim=1)
    dlogits = (probs - torch.nn.functional.one_hot(y, len(d.vocabulary))) / s.batch
    plots.logits_gradient(dlogits, y, d.vocabulary, folder / "dlogits.png")
    (folder / _METRICS).write_text(json.dumps(metrics, indent=2) + "\n")  # the last: it is complete
    if steps_per_second is not None:
        print(f"{steps_per_second:.0f} steps/s")
    print(
        f"train      {metrics['train_loss']:.4f}\n"
        f"validation {metrics['val_loss']:.4f}\n"
        f"test       {metrics['test_loss']:.4f}\n"
    )
    print("\n".join(model.sample(d.vocabulary, s.context, 20, s.seed + 10)))


def _circumstances(dataset: Any, device: torch.device) -> dict[str, Any]:
    d = dataset
    return {
        "device": device.type,
        "device_name": (
            torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        ),
        "data": {"source": d.source, "sha256": d.sha256, "words": d.words},
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numba", "fused-backprop"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _sweep(options: argparse.Namespace) -> int:
    device = _device(options.device)
    if options.resume is not None:
        return _swept(*_resumed_sweep(options, device), device)
    with _started_sweep(options, device) as (models, folder):
        return _swept(models, folder, device)


@contextmanager
def _started_sweep(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[Any, Path]]:
    from fused.makemore import engines, sweep

    settings, engine = _settings(options), options.engine or "auto"
    lr, seeds = options.lr or SWEEP_LR, options.seed or SWEEP_SEEDS
    _check_backend(engine, device)
    dataset = _load_data(options.data, settings, device)
    models = sweep.start(settings, lr, seeds, engine, options.data, dataset)
    x, y = dataset.train.x, dataset.train.y
    engines.start(models.engine, models.parameters, x, y, settings.batch)  # or leaves no folder
    with _folder(options.out, "sweeps") as folder:
        _check_empty(folder)
        yield models, folder


def _resumed_sweep(options: argparse.Namespace, device: torch.device) -> tuple[Any, Path]:
    from fused.makemore import checkpoint, sweep

    path = _resumed_path(options, "sweep")
    folder = path if path.is_dir() else path.parent
    if (folder / _SWEEP).is_file():
        raise InputError(f"the sweep in {path} is complete")
    saved = checkpoint.load_sweep(path, device)
    _check_backend(saved.engine, device)
    common = {k: v for k, v in saved.settings.asdict().items() if k not in sweep.VARIED}
    varied = {"lr": saved.lr, "seed": saved.seeds, "engine": saved.engine}
    _check_given(options, {**common, **varied}, f"the sweep in {path}")
    _check_writable(folder)
    data, dataset = _resumed_data(options, saved, f"the sweep in {path}", device)
    return sweep.resumed(saved, data, dataset), folder


def _swept(models: Any, folder: Path, device: torch.device) -> int:
    from fused.makemore import sweep

    settings, dataset = models.settings, models.dataset
    print(
        f"{dataset.source}: {dataset.words} words, {len(dataset.train)} training examples\n"
        f"{len(models)} networks ({len(models) // len(models.seeds)} learning rates x "
        f"{len(models.seeds)} seeds), engine {models.engine}, device {device.type}, "
        f"steps {models.step} to {settings.steps}, folder {folder}",
        flush=True,
    )
    outcome = sweep.train(models, folder)
    if outcome.interrupted:
        print(
            f"\ninterrupted at step {models.step}; continue with: "
            f"fused-makemore sweep --resume {folder}"
        )
        return _INTERRUPTED
    try:
        return _evaluated(models, folder, outcome.steps_per_second, device)
    except KeyboardInterrupt:
        _say_evaluate("sweep", folder, _SWEEP)
        return _INTERRUPTED


def _evaluated(
    models: Any, folder: Path, steps_per_second: float | None, device: torch.device
) -> int:
    from fused.makemore import checkpoint, plots, sweep

    settings, dataset, rate = models.settings, models.dataset, steps_per_second
    results = models.results()
    if all(r.val_loss is None for r in results):  # the last step's update, which no loss shows
        raise sweep.all_diverged(models, settings.steps, folder)
    content = {
        "steps": settings.steps,
        "models_steps_per_second": None if rate is None else len(models) * rate,
        "engine": models.engine,
        "settings": {k: v for k, v in settings.asdict().items() if k not in sweep.VARIED},
        **_circumstances(dataset, device),
        "results": [dataclasses.asdict(r) for r in results],
    }
    plots.sweep_losses(models.losses, models.lr, folder / "losses.png")
    plots.sweep_validation(results, folder / "validation.png")
    (folder / _SWEEP).write_text(json.dumps(content, indent=2) + "\n")  # the last: it is complete
    (folder / checkpoint.SWEEP_FILE).unlink()
    if rate is not None:
        print(f"{len(models)} networks x {rate:.0f} steps/s\n")
    print(sweep.table(results))
    return 0


def _sample(options: argparse.Namespace) -> int:
    from fused.makemore import checkpoint

    saved = checkpoint.load(Path(options.checkpoint), _device(options.device))
    # Other names than those that train printed.
    seed = saved.settings.seed + 11 if options.seed is None else options.seed
    names = saved.model.sample(saved.vocabulary, saved.settings.context, options.num, seed)
    print("\n".join(names))
    return 0


_COMMANDS = {"check": _check, "train": _train, "sweep": _sweep, "sample": _sample}
