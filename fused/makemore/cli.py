"""fused-makemore: check the gradients, train the network, sweep settings, sample names."""

import argparse
import dataclasses
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch

from fused import backend
from fused.makemore.errors import InputError
from fused.makemore.model import Settings

_DEFAULTS = Settings()
_ENGINES = {
    "auto": "the fastest that can run",
    "persistent": "one launch of one GPU kernel for many steps",
    "graph": "four GPU kernels a step, in a CUDA graph of many steps",
    "numba": "closed forms in a compiled loop, on the CPU",
    "manual": "closed forms in torch's operations, no autograd",
    "fused": "this package's operations under autograd",
    "chunked": "the 26 gradients one tensor at a time",
    "autograd": "torch's own operations and .backward()",
}
_SWEEP_ENGINES = ("persistent", "graph", "numba", "manual")
_MOST_MODELS = 65536
_LARGEST = 2**31 - 1
_METRICS, _SWEEP = "metrics.json", "sweep.json"
# What a shell reports of a program that Ctrl-C ended, and of one whose output nobody reads.
_INTERRUPTED, _UNREAD = 130, 141
_NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")  # torch, on a CPU


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    0; 1 for failed checks; 2 for bad input, for what does not fit memory, and for files that cannot
    be written; 130 where Ctrl-C ended it; 141 where the reader of its output went away.
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names may have letters that a terminal has not
    try:
        status = options.command(options)
        print(end="", flush=True)
        return status
    except InputError as error:
        return _refused(str(error))
    except KeyboardInterrupt:  # before training began, or the second one during it
        return _INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
    print(f"fused-makemore: {why}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fused-makemore",
        description="Train the character-level MLP of the makemore notebooks with hand-derived "
        "backward passes.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser(
        "check",
        help="compare hand-derived gradients with autograd's",
        description="Compares the gradients of 26 tensors, derived by hand, with autograd's, on "
        "one minibatch; then the two closed forms. Exit status 1 if one is not approximately "
        "equal.",
    )
    _add_data(check)
    _add_network(check, dataclasses.replace(_DEFAULTS, hidden=64))
    check.set_defaults(command=_check)

    train = commands.add_parser(
        "train",
        help="train, evaluate, sample and save a run",
        description="Trains the network and saves checkpoint, metrics, loss curve and a picture "
        "of the logits' gradient in a run folder. Ctrl-C saves a checkpoint to resume from.",
    )
    _add_data(train)
    _add_network(train, _DEFAULTS)
    _add(train, "--steps", _positive, _DEFAULTS.steps, "training steps")
    _add(train, "--lr", _rate, _DEFAULTS.lr, "learning rate")
    _add(train, "--final-lr", _rate, _DEFAULTS.final_lr, "learning rate from half way")
    engines = "; ".join(f"{name}: {what}" for name, what in _ENGINES.items())
    train.add_argument(
        "--engine", choices=_ENGINES, help=f"how gradients are computed (default auto). {engines}"
    )
    train.add_argument("--out", type=_path, metavar="DIR", help="run folder (default runs/<time>)")
    train.add_argument(
        "--resume",
        type=_path,
        metavar="DIR",
        help="run folder to continue; its settings hold, and it ends with exactly the parameters "
        "of a run that was never interrupted",
    )
    train.set_defaults(command=_train)

    sweep = commands.add_parser(
        "sweep",
        help="train many networks: learning rates times seeds",
        description="Trains a network for each learning rate and seed, on a GPU all of them in one "
        "launch, on a CPU on all cores; prints a table sorted by validation loss, and saves it as "
        "JSON with plots of the losses. From half way the learning rate is a tenth.",
    )
    _add_data(sweep)
    _add_network(sweep, _DEFAULTS, seed=False)
    _add(sweep, "--steps", _positive, _DEFAULTS.steps, "training steps of each network")
    sweep.add_argument(
        "--lr",
        type=_rates,
        default=[0.03, 0.1, 0.3],
        metavar="N,...",
        help="learning rates (default 0.03,0.1,0.3)",
    )
    sweep.add_argument(
        "--seed",
        type=_seeds,
        default=list(range(8)),
        metavar="N,...|N:N",
        help="seeds, a list or a range without its end (default 0:8)",
    )
    sweep.add_argument(
        "--engine",
        choices=("auto", *_SWEEP_ENGINES),
        default="auto",
        help="how gradients are computed (default auto: the fastest that can run)",
    )
    sweep.add_argument(
        "--out", type=_path, metavar="DIR", help="folder for results (default sweeps/<time>)"
    )
    sweep.set_defaults(command=_sweep)

    sample = commands.add_parser(
        "sample", help="sample names from a checkpoint", description="Samples names."
    )
    sample.add_argument("checkpoint", type=_path, help="run folder or checkpoint file")
    sample.add_argument("--num", type=_positive, default=20, help="how many names (default 20)")
    sample.add_argument(
        "--seed",
        type=_seed,
        help="seed of the draw (default: the run's, plus 11; train draws its names with the run's, "
        "plus 10)",
    )
    _add_device(sample)
    sample.set_defaults(command=_sample)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (default auto: cuda where there is one)",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=_path,
        metavar="FILE",
        help="text file with one word a line (default: 5,163 given names of the US Census of 1990)",
    )
    _add_device(parser)


def _add_network(parser: argparse.ArgumentParser, defaults: Settings, seed: bool = True) -> None:
    _add(parser, "--context", _positive, defaults.context, "characters of context")
    _add(parser, "--embedding", _positive, defaults.embedding, "numbers per character")
    _add(parser, "--hidden", _positive, defaults.hidden, "hidden units")
    _add(parser, "--batch", _positive, defaults.batch, "examples per minibatch")
    if seed:
        _add(parser, "--seed", _seed, defaults.seed, "seed of parameters and minibatches")
    parser.set_defaults(defaults=defaults)


def _add(parser: argparse.ArgumentParser, flag: str, kind: Any, default: Any, what: str) -> None:
    # No default of argparse's own: None says that the option was not given.
    parser.add_argument(flag, type=kind, metavar="N", help=f"{what} (default {default})")


def _path(text: str) -> str:
    if not text:  # a shell variable that is not set; as a path it would be the current folder
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    if int(text) > _LARGEST:
        raise argparse.ArgumentTypeError(f"expected a number up to {_LARGEST}, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63-1, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def _rates(text: str) -> list[float]:
    return _distinct([_rate(part) for part in text.split(",")], text)


def _seeds(text: str) -> list[int]:
    if ":" not in text:
        return _distinct([_seed(part) for part in text.split(",")], text)
    first, _, end = text.partition(":")
    seeds = range(_seed(first), _seed(end))
    if not 0 < len(seeds) <= _MOST_MODELS:
        raise argparse.ArgumentTypeError(
            f"expected a range like 0:32 with 1 to {_MOST_MODELS} seeds, got {text!r}"
        )
    return list(seeds)


def _distinct(values: list[Any], text: str) -> list[Any]:
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"expected every number once, got {text!r}")
    return values


def _settings(options: argparse.Namespace) -> Settings:
    given = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if not isinstance(value, list)}
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
    _report(run, folder, outcome.steps_per_second, device)
    return 0


@contextmanager
def _started(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[Any, Path]]:
    from fused.makemore import checkpoint, engines, model, training

    settings, engine = _settings(options), options.engine or "auto"
    _check_backend(engine, device)
    dataset = _load_data(options.data, settings, device)
    parameters, generator = model.initial_parameters(settings, len(dataset.vocabulary), device)
    if engine == "auto":
        engine = engines.fastest(parameters, dataset.train.x, settings.batch)
    # What cannot run leaves no folder.
    engines.start(engine, parameters, dataset.train.x, dataset.train.y, settings.batch)
    with _folder(options.out, "runs") as folder:
        if (folder / checkpoint.FILE).exists():
            raise InputError(f"{folder} already holds a run; continue it with --resume {folder}")
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
        try:
            tempfile.TemporaryFile(dir=folder).close()  # now rather than when training is over
        except OSError as error:
            why = f"cannot write into the folder {folder}: {error.strerror}"
            raise InputError(why) from None
        yield folder
    finally:
        with suppress(OSError):  # it is not empty
            for path in made:
                path.rmdir()


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

    if options.out is not None:
        raise InputError("--out: a resumed run stays in its folder")
    path = Path(options.resume)
    saved = checkpoint.load(path, device)
    _check_backend(saved.engine, device)
    asked = {**dataclasses.asdict(saved.settings), "engine": saved.engine}
    for name, value in asked.items():
        given = getattr(options, name, None)
        if given is not None and given != value and (name, given) != ("engine", "auto"):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {given}: the run in {path} has {flag} {value}")
    folder = path if path.is_dir() else path.parent
    if saved.step >= saved.settings.steps and (folder / _METRICS).exists():
        raise InputError(f"the run in {path} is complete: {saved.step} steps")
    data = saved.data if options.data is None else options.data
    dataset = _load_data(data, saved.settings, device)
    if dataset.sha256 != saved.sha256:
        raise InputError(f"{dataset.source} is not the data that the run in {path} began with")
    generator = torch.Generator()
    generator.set_state(saved.generator)
    run = training.Run(
        saved.settings,
        saved.engine,
        data,
        dataset,
        saved.model.parameters,
        generator,
        saved.losses,
    )
    return run, folder


def _report(run: Any, folder: Path, steps_per_second: float, device: torch.device) -> None:
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
    print(
        f"{steps_per_second:.0f} steps/s\n"
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
    from fused.makemore import engines, sweep

    settings, device = _settings(options), _device(options.device)
    _check_backend(options.engine, device)
    dataset = _load_data(options.data, settings, device)
    models = sweep.start(settings, options.lr, options.seed, dataset)
    engine = options.engine
    if engine == "auto":
        engine = engines.fastest(models.parameters, dataset.train.x, settings.batch)
    # What cannot run leaves no folder.
    engines.start(engine, models.parameters, dataset.train.x, dataset.train.y, settings.batch)
    with _folder(options.out, "sweeps") as folder:
        return _swept(models, engine, dataset, folder, device)


def _swept(models: Any, engine: str, dataset: Any, folder: Path, device: torch.device) -> int:
    from fused.makemore import plots, sweep

    settings = models.settings
    if (folder / _SWEEP).is_file():
        raise InputError(f"{folder} already holds a sweep; use another --out")
    print(
        f"{dataset.source}: {dataset.words} words, {len(dataset.train)} training examples\n"
        f"{len(models)} networks ({len(models) // len(models.seeds)} learning rates x "
        f"{len(models.seeds)} seeds), engine {engine}, device {device.type}, "
        f"{settings.steps} steps, folder {folder}",
        flush=True,
    )
    outcome = sweep.train(models, engine, dataset)
    if outcome.interrupted:
        print("\ninterrupted; nothing is saved of a sweep that is not complete")
        return _INTERRUPTED
    results = models.results(dataset)
    if all(r.val_loss is None for r in results):  # the last step's update, which no loss shows
        raise sweep.no_longer_finite(models, settings.steps)
    content = {
        "steps": settings.steps,
        "models_steps_per_second": len(models) * outcome.steps_per_second,
        "engine": engine,
        "settings": {k: v for k, v in settings.asdict().items() if k not in sweep.VARIED},
        **_circumstances(dataset, device),
        "results": [dataclasses.asdict(r) for r in results],
    }
    (folder / _SWEEP).write_text(json.dumps(content, indent=2) + "\n")
    plots.sweep_losses(models.losses, models.lr, folder / "losses.png")
    plots.sweep_validation(results, folder / "validation.png")
    print(
        f"{len(models)} networks x {outcome.steps_per_second:.0f} steps/s\n\n{sweep.table(results)}"
    )
    return 0


def _sample(options: argparse.Namespace) -> int:
    from fused.makemore import checkpoint

    saved = checkpoint.load(Path(options.checkpoint), _device(options.device))
    # Other names than those that train printed.
    seed = saved.settings.seed + 11 if options.seed is None else options.seed
    names = saved.model.sample(saved.vocabulary, saved.settings.context, options.num, seed)
    print("\n".join(names))
    return 0
