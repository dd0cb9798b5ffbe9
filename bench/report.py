"""docs/benchmarks.md, and the README's figures, from the JSONs in bench/results/, so that none is
typed by hand."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import runner, tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"

# Whose headlines the README shows, between the two lines; each is shown once, from the first that
# has it: a run of one operation has more samples of it.
_SHOWN = ("cpu-amd-epyc-1-thread-cross_entropy.json", "cpu-amd-epyc-1-thread.json")
_BEGIN, _END = "<!-- by python -m bench report -->\n", "<!-- to here -->\n"

_PREFACE = """# Benchmarks

Written by `python -m bench report` from the JSON files in [bench/results](../bench/results); each
section names the command that made its file.

- Contenders ran interleaved in one process on the same inputs, after their outputs were compared
  with those of PyTorch and of the unfused form (sum of the differences over the sum); what agreed
  with neither is listed, not timed, and so is where the two differ.
- Each round of n contenders had another order: over 2n rounds each comes right after each other
  twice. Time ends the rounds wherever they are, after 5 to 100, so that how often two pairs came
  differs by two at most; with fewer than 2n rounds, some may not have come.
- Upstream gradients are random tensors. Where the loss is one number it is 1, as `loss.backward()`
  gives it, and in the cases `scaled` another, as a loss scale gives it.
- A budget of seconds does not end compiling, nor the 5 rounds of a case that has begun.
- `fwd` runs without a graph, `bwd` is the backward alone, `fwd_bwd` both. `torch` is PyTorch's
  eager operation; every other contender is given as the ratio of its time to torch's, below 1 being
  faster: the median over the rounds. On a GPU that is device time with a cold L2 cache; `jax`, on
  streams of its own, has the host's part of a call in it, as has `liger`, which waits for the
  device within one.
- `fused correction=1` is batch norm with Bessel's correction, given the weight and eps that make
  its output the others'.
- `chunked` is the notebook's unfused form, `torch chunked` PyTorch's own `linear_cross_entropy`,
  and `products` its matrix products alone. `compile` is `torch.compile` of torch's operation,
  with `max` for its max-autotune mode; `graph` a replay from a CUDA graph.
- GB/s is of the `fused` column: the least number of bytes that has to be moved over the time, so
  that re-reads show as lost bandwidth; `of copy` is its share of a large copy's rate in that run.
- `bwd` of `fused` cross-entropy only hands over what its forward formed: compare `fwd_bwd`.
- Memory is the most that is held above the inputs, in units of the case's one large tensor.
- A size that does not fit the machine's memory or the time is measured with fewer rows: the case
  names what was measured.

The least possible bytes:
"""


def write() -> Path:
    """Writes the page, the plots and the README's figures; returns the page's path."""
    for path, result in _results():
        if "rows" in result:
            with reading(path):
                plot(result, path.stem, RESULTS)
    PAGE.write_text(text())
    README.write_text(readme())
    return PAGE


def text() -> str:
    """The page."""
    parts = [_PREFACE.rstrip(), _least_bytes()]
    for path, result in _results():
        with reading(path):
            if "rows" in result:
                parts.append(_section(path, result))
            elif "kernels" in result:
                parts.append(_kernel_section(path, result))
            elif "gpt" in result:
                parts.append(_gpt_section(path, result))
    return "\n\n".join(parts) + "\n"


def readme() -> str:
    """The README, with the figures of the results."""
    before, rest = README.read_text().split(_BEGIN)
    after = rest.split(_END)[1]
    parts, shown = [], set[tuple[str, str]]()
    for path, result in _results():
        if path.name in _SHOWN:
            with reading(path):
                table = tables.headlines(result, _headlines(result["suite"]) - shown)
                parts.append(f"{tables.heading(result)}:\n\n{table}\n")
                shown |= {(row["operation"], row["asked"]) for row in result["rows"]}
    return "\n".join([before + _BEGIN, *parts, _END + after])


def _headlines(suite: str) -> set[tuple[str, str]]:
    return {
        (name, str(case))
        for name, op in runner.operations().items()
        for case in op.cases(suite)
        if case.headline
    }


def _results() -> list[tuple[Path, dict[str, Any]]]:
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        with reading(path):
            found.append((path, json.loads(path.read_text())))
    return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block, what the JSON lacks is a ValueError that names its file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        message = f"{path}: expected the JSON of a run of this benchmark ({found})"
        raise ValueError(message) from error


def plot(result: dict[str, Any], stem: str, folder: Path) -> list[Path] | None:
    """The PNGs of a run, beside its JSON; None where matplotlib is not installed."""
    try:
        from bench import plots
    except ImportError:
        return None
    return plots.draw(result, folder, stem)


def _least_bytes() -> str:
    rows = [
        [name, phase, text]
        for name, op in runner.operations().items()
        for phase, text in op.BYTES.items()
    ]
    return tables.markdown(["operation", "phase", "bytes"], rows)


def _section(path: Path, result: dict[str, Any]) -> str:
    m = result["machine"]
    variable = "THP_MEM_ALLOC_ENABLE=1 " if m.get("large_pages") else ""
    parts = [
        f"## {m['name']}, {result['suite']} suite, {result['date'][:10]}",
        f"`{variable}{result['command']}` ({path.name})\n\n{tables.heading(result)}",
    ]
    for operation in tables.operations(result):
        rows = [row for row in result["rows"] if row["operation"] == operation]
        parts += [f"### {operation}", tables.table(result, operation)]
        if m["type"] == "cuda":
            # Small shapes are bound by the host.
            parts += ["Wall time of calls in a row:", tables.times(result, operation, "wall")]
            if any("device_warm" in row["times"] for row in rows):
                warm = tables.times(result, operation, "device_warm")
                parts += ["Device time with a warm L2 cache:", warm]
        if any(row["phase"] == "fwd_bwd" for row in rows):
            parts += ["Peak memory:", tables.memory(result, operation)]
        for kind in ("memory", "speed"):
            picture = RESULTS / f"{path.stem}-{operation}-{kind}.png"
            if picture.exists():
                parts.append(f"![{picture.stem}](../bench/results/{picture.name})")
    if result["skipped"]:
        parts += ["Skipped:", tables.skipped(result)]
    if result["notes"]:
        parts += ["Notes:", tables.notes(result)]
    return "\n\n".join(parts)


def _gpt_section(path: Path, result: dict[str, Any]) -> str:
    runs = result["gpt"]
    unfused, fused = runs["unfused"]["losses"], runs["fused"]["losses"]
    apart = max(abs(a - b) for a, b in zip(unfused, fused, strict=True))
    rows = [
        [name, f"{losses[0]:.4f}", f"{losses[len(losses) // 2]:.4f}", f"{losses[-1]:.4f}",
         f"{runs[name]['peak_bytes'] / 2**20:.1f} MiB", f"{runs[name]['seconds']:.1f} s"]
        for name, losses in (("unfused", unfused), ("fused", fused))
    ]  # fmt: skip
    header = ["loss", "first step", "middle", "last step", "peak of a step", "time"]
    machine = result["machine"]
    return "\n\n".join(
        [
            "## A small GPT, with and without the logits",
            f"`python -m bench.gpt --steps {len(fused)}` ({path.name}), {machine['name']}, "
            f"torch {machine['versions']['torch']}; {runs['fused']['vocabulary']:,} words. "
            f"Losses differ by at most {apart:.1e}.",
            tables.markdown(header, rows),
        ]
    )


def _kernel_section(path: Path, result: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            "## What the compiler made of the kernels",
            f"`{result['command']}` ({path.name}), Triton {result['triton']}, without a GPU.",
            "What forward and backward ask memory for, in units of the case's one large tensor:",
            tables.kernel_traffic(result["kernels"]),
            tables.KERNELS,
            "For sm_90; the file has the other targets too.",
            tables.kernels(result["kernels"], "sm_90"),
        ]
    )
