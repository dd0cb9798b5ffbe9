"""The command line: python -m bench [--suite quick|full], bench kernels, compare, report."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler talks to stderr

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from bench import machine, options, report, runner, tables

_INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.command is not _run and sys.argv[1].startswith("-"):
        parser.error(f"expected options after the command, got {sys.argv[1]} before it")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` saves as Ctrl-C does
    try:
        arguments.command(arguments)
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it yet
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(f"bench: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--suite", choices=["quick", "full"], default="quick")
    one_of = f"one of {', '.join(runner.operations())}; repeatable (default: all)"
    only = "only cases whose name contains it; repeatable"
    parser.add_argument("--op", action="append", metavar="NAME", help=one_of)
    parser.add_argument("--case", action="append", metavar="TEXT", help=only)
    parser.add_argument(
        "--device", type=options.device, help="default: cuda where there is one, else cpu"
    )
    parser.add_argument(
        "--threads",
        type=options.count,
        help="of torch and JAX on the CPU (default: their own choice)",
    )
    parser.add_argument(
        "--budget",
        type=options.seconds,
        metavar="SECONDS",
        help="of the run; it does not end compiling, nor the 5 rounds of a case that has begun "
        f"(default: {', '.join(f'{s:.0f} for {suite}' for suite, s in runner.BUDGETS.items())})",
    )
    parser.add_argument(
        "--out", type=Path, help="the JSON (default: bench/results/DEVICE-DATE.json)"
    )
    parser.set_defaults(command=_run)
    commands = parser.add_subparsers(title="commands")
    kernels = commands.add_parser("kernels", help="what the compiler made of the kernels; no GPU")
    kernels.add_argument("--op", action="append", metavar="NAME", help=one_of)
    kernels.add_argument("--case", action="append", metavar="TEXT", help=only)
    kernels.add_argument("--target", action="append", metavar="NAME", help="default: all four")
    kernels.add_argument(
        "--processes", type=options.count, default=os.cpu_count(), help="default: as many as cores"
    )
    kernels.add_argument("--out", type=Path)
    kernels.set_defaults(command=_kernels)
    compare = commands.add_parser("compare", help="what changed between two runs")
    compare.add_argument("a", type=Path, metavar="A.json")
    compare.add_argument("b", type=Path, metavar="B.json")
    compare.set_defaults(command=_compare)
    page = commands.add_parser("report", help="docs/benchmarks.md from bench/results/*.json")
    page.set_defaults(command=lambda _: print(f"wrote {_shown(report.write())}"))
    return parser


def _run(arguments: argparse.Namespace) -> None:
    device = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(device)  # events, streams and the rest are of the current one
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        os.environ["NPROC"] = str(arguments.threads)  # XLA's, for JAX; XLA_FLAGS leave it several
    _check_out(arguments.out)
    budget = arguments.budget or runner.BUDGETS[arguments.suite]
    result = runner.run(arguments.suite, arguments.op, arguments.case, device, budget)
    name = f"{machine.slug(result['machine'])}-{result['date'][:10]}"
    if result["interrupted"]:  # not in the place of a complete run of that day
        name += "-interrupted"
    path = _save(result, arguments.out or report.RESULTS / f"{name}.json")
    print(tables.summary(result))
    print(f"\nwrote {_shown(path)}", flush=True)
    if result["interrupted"]:
        raise KeyboardInterrupt
    pictures = report.plot(result, path.stem, path.parent)
    if pictures is None:
        print("no plots: matplotlib is not installed")
    for picture in pictures or ():
        print(f"wrote {_shown(picture)}")
    if result["failures"]:
        sys.exit(f"bench: {len(result['failures'])} failed, listed as skipped")


def _check_out(path: Path | None) -> None:
    """Now, not when everything is measured."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--out {path}: expected a file, which is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--out {path}: expected a file that may be written")


def _kernels(arguments: argparse.Namespace) -> None:
    _check_out(arguments.out)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("unset TRITON_INTERPRET: interpreted kernels are not compiled")
    import triton

    from bench import kernels

    targets = arguments.target or list(kernels.TARGETS)
    unknown = set(targets) - set(kernels.TARGETS)
    if unknown:
        raise ValueError(f"expected --target of {', '.join(kernels.TARGETS)}, got {unknown.pop()}")
    ops = runner.operations(arguments.op)
    rows = kernels.report(ops, targets, arguments.case, arguments.processes)
    print(tables.kernel_traffic(rows), tables.KERNELS, tables.kernels(rows), sep="\n\n")
    result = {"triton": triton.__version__, **machine.own_versions(), "kernels": rows}
    path = arguments.out
    if path is None and not (arguments.op or arguments.case or arguments.target):
        path = report.RESULTS / f"kernels-triton-{triton.__version__}.json"
    if path is not None:
        print(f"\nwrote {_shown(_save(result, path))}")


def _compare(arguments: argparse.Namespace) -> None:
    a, b = (_load(path) for path in (arguments.a, arguments.b))
    print(f"A: {tables.heading(a)}\nB: {tables.heading(b)}\n\n{tables.compare(a, b)}")


def _load(path: Path) -> dict[str, Any]:
    with report.reading(path):
        result = json.loads(path.read_text())
        tables.heading(result), tables.compare(result, result)  # has what they need
    return result


def _save(result: dict[str, Any], path: Path) -> Path:
    result["command"] = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _shown(path: Path) -> Path:
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main()
