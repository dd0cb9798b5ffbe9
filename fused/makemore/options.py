"""The options of fused-makemore: what they are called, and what may be given."""

import argparse
import dataclasses
from typing import Any, NoReturn

import torch

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
SWEEP_LR, SWEEP_SEEDS = [0.03, 0.1, 0.3], list(range(8))
_MOST_MODELS = 65536
_LARGEST, _LARGEST_RATE = 2**31 - 1, 3.4e38


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of sys.argv, or of `arguments`; ends the program with status 2 where they are
    none of ours. `command` is which; a setting that is not given is None."""
    parser = _Parser(
        prog="fused-makemore",
        description="Train the character-level MLP of the makemore notebooks with hand-derived "
        "backward passes.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_check, _add_train, _add_sweep, _add_sample):
        add(commands)
    return parser.parse_args(arguments)


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="compare hand-derived gradients with autograd's",
        description="Compares the gradients of 26 tensors, derived by hand, with autograd's, on "
        "one minibatch; then the two closed forms with it, and the local derivatives with slopes. "
        "Exit status 1 if one is not approximately equal.",
    )
    _add_data(check)
    _add_network(check, dataclasses.replace(_DEFAULTS, hidden=64))


def _add_train(commands: Any) -> None:
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
    _add(train, "--final-lr", _rate, "a tenth of --lr", "learning rate from half way")
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


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="train many networks: learning rates times seeds",
        description="Trains a network for each learning rate and seed, on a GPU all of them in one "
        "launch, on a CPU on all cores; prints a table sorted by validation loss, and saves it as "
        "JSON with plots of the losses. From half way the learning rate is a tenth. Ctrl-C saves a "
        "checkpoint to resume from.",
    )
    _add_data(sweep)
    _add_network(sweep, _DEFAULTS, seed=False)
    _add(sweep, "--steps", _positive, _DEFAULTS.steps, "training steps of each network")
    sweep.add_argument(
        "--lr",
        type=_rates,
        metavar="N,...",
        help="learning rates (default 0.03,0.1,0.3)",
    )
    sweep.add_argument(
        "--seed",
        type=_seeds,
        metavar="N,...|N:N",
        help="seeds, a list or a range without its end (default 0:8)",
    )
    sweep.add_argument(
        "--engine",
        choices=("auto", *_SWEEP_ENGINES),
        help="how gradients are computed (default auto: the fastest that can run)",
    )
    sweep.add_argument(
        "--out", type=_path, metavar="DIR", help="folder for results (default sweeps/<time>)"
    )
    sweep.add_argument(
        "--resume",
        type=_path,
        metavar="DIR",
        help="folder of an interrupted sweep to continue; its settings hold, and it ends with "
        "exactly the results of one that was never interrupted",
    )


def _add_sample(commands: Any) -> None:
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
    if not 0 <= value <= _LARGEST_RATE:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 3.4e38, got {text!r}")
    return value


def _rates(text: str) -> list[float]:
    rates = [_rate(part) for part in text.split(",")]
    _distinct(torch.tensor(rates, dtype=torch.float32).tolist(), text)  # in which networks train
    return rates


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
