"""Markdown tables of a run's JSON: for the terminal, and for docs/benchmarks.md."""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


KERNELS = """\
A line a launch and target: registers a thread, bytes spilled (they should be 0), shared memory and
warps of a program, warps that fit a multiprocessor at once; then, for each innermost loop that
touches global memory (for the whole kernel where none does), in order: instructions, barriers,
accesses to global memory as count x bytes a thread, and instructions over the bytes they move. An
H100 issues 128 thread-instructions a clock and multiprocessor and reads or writes about 14 bytes of
memory, so that a loop above 9 is limited by its instructions. `reads` and `writes` are what the
launch asks memory for, caches included, in units of the case's one large tensor: counted in
Triton's interpreter, of the first, the middle and the last program along each axis of the grid, the
middle one for all between."""


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table whose columns are aligned, so that it also reads where nothing renders it."""
    lines = [header, *rows]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(
        "| " + " | ".join(_padded(line, widths)) + " |" for line in (header, rule, *lines[1:])
    )


def operations(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["operation"] for row in result["rows"]))


def main_metric(result: dict[str, Any], operation: str) -> str:
    """What an operation is judged by: device time with a cold cache, where it was measured."""
    rows = (row for row in result["rows"] if row["operation"] == operation)
    return "device_cold" if any("device_cold" in row["times"] for row in rows) else "wall"


def speed(result: dict[str, Any], operation: str) -> str:
    """Time of torch, then of every contender as a ratio to it; then how near to the copy."""
    metric = main_metric(result, operation)
    groups = _groups(result, operation)
    names = _contenders(result, operation)
    others = [name for name in names if name != "torch"]
    bounded = any(row["least_bytes"] for group in groups.values() for row in group.values())
    header = ["case", "phase", "torch", *others]
    if bounded:
        header += ["GB/s", "of copy"]
    rows = []
    for (case, phase), group in groups.items():
        cells = [case, phase, duration(group["torch"]["times"][metric]["median"])]
        for name in others:
            row = group.get(name)
            cells.append("" if row is None else f"{row['ratio_to_torch'][metric]:.2f}")
        if bounded:
            cells += _bandwidth(group.get("fused"), metric, result["copy_bytes_per_second"])
        rows.append(cells)
    return markdown(header, rows)


def times(result: dict[str, Any], operation: str, metric: str) -> str:
    """Every contender's time by that metric."""
    names = _contenders(result, operation)
    rows = []
    for (case, phase), group in _groups(result, operation).items():
        found = (group[n]["times"].get(metric) if n in group else None for n in names)
        cells = ["" if t is None else duration(t["median"]) for t in found]
        rows.append([case, phase, *cells])
    return markdown(["case", "phase", *names], rows)


def memory(result: dict[str, Any], operation: str) -> str:
    """The most memory held above the inputs, in units of the case's one large tensor."""
    names = [name for name in _contenders(result, operation) if memory_is_seen(name)]
    rows = []
    for (case, phase), group in _groups(result, operation).items():
        peaks = (
            group[n]["peak_bytes"] / group[n]["tensor_bytes"] if n in group else None for n in names
        )
        cells = ["" if peak is None else f"{peak:.2f}" for peak in peaks]
        rows.append([case, phase, *cells])
    return markdown(["case", "phase", *names], rows)


def memory_is_seen(contender: str) -> bool:
    """Whether a run's memory is PyTorch's to count: JAX's is its own, and that of a CUDA graph was
    taken when it was captured."""
    return contender != "jax" and "graph" not in contender


def headlines(result: dict[str, Any], cases: set[tuple[str, str]]) -> str:
    """Forward and backward of the cases, (operation, what was asked): time and memory."""
    rows = []
    for operation in operations(result):
        metric = main_metric(result, operation)
        for (case, phase), group in _groups(result, operation).items():
            torch, fused, compiled = (group.get(n) for n in ("torch", "fused", "compile"))
            if phase != "fwd_bwd" or torch is None or fused is None:
                continue
            if (operation, torch["asked"]) not in cases:
                continue
            ratios = [row and f"{row['ratio_to_torch'][metric]:.2f}" for row in (fused, compiled)]
            peaks = [
                row and f"{row['peak_bytes'] / row['tensor_bytes']:.2f}"
                for row in (torch, fused, compiled)
            ]
            time = duration(torch["times"][metric]["median"])
            rows.append([operation, case, time, *(text or "" for text in ratios + peaks)])
    names = ["torch", "fused", "compile"]
    header = ["operation", "case", *names, f"memory: {names[0]}", *names[1:]]
    return markdown(header, rows)


def rates(result: dict[str, Any], operation: str) -> str:
    """Units a second: steps of a training loop. The phase is named where there are several."""
    rows, groups = [], _groups(result, operation)
    several = len({phase for _, phase in groups}) > 1
    for (case, phase), group in groups.items():
        for name, row in group.items():
            t = row["times"]["wall"]
            rows.append(
                [
                    f"{case} {phase} {name}" if several else f"{case} {name}",
                    _rate(t["median"]),
                    f"{_rate(t['high'])} to {_rate(t['low'])}",
                    f"{1 / row['ratio_to_torch']['wall']:.2f}",
                ]
            )
    return markdown(["engine", "a second", "10% to 90%", "times torch"], rows)


def skipped(result: dict[str, Any]) -> str:
    """What did not run and why: a line a contender and reason."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for s in result["skipped"]:
        groups.setdefault((s["operation"], s["contender"], s["reason"]), []).append(s["case"])
    lines = []
    for (operation, contender, reason), cases in groups.items():
        where = ", ".join(cases) if len(cases) <= 3 else f"{len(cases)} cases"
        lines.append(f"- {operation}, {contender}: {reason} ({where})")
    return "\n".join(lines)


def notes(result: dict[str, Any]) -> str:
    return "\n".join(f"- {note}" for note in result["notes"])


def summary(result: dict[str, Any]) -> str:
    """Everything, as the runner prints it at the end."""
    parts = [heading(result)]
    for operation in operations(result):
        parts += [f"{operation}:", table(result, operation)]
    if result["skipped"]:
        parts += ["Skipped:", skipped(result)]
    if result["notes"]:
        parts += ["Notes:", notes(result)]
    return "\n\n".join(parts)


def table(result: dict[str, Any], operation: str) -> str:
    """The one table that says most about an operation."""
    loop = any(phase == "step" for _, phase in _groups(result, operation))
    return rates(result, operation) if loop else speed(result, operation)


def heading(result: dict[str, Any]) -> str:
    m = result["machine"]
    where = m["name"]
    if m["type"] == "cpu":
        plural = "" if m["threads"] == 1 else "s"
        where += f", {m['threads']} thread{plural}{', large pages' if m.get('large_pages') else ''}"
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    return (
        f"{where}; {versions}; {result['date'][:10]}; suite {result['suite']}; "
        f"copy {result['copy_bytes_per_second'] / 1e9:.1f} GB/s"
    )


def compare(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Medians of two runs, where both have one; `changed` where the spreads do not overlap. A line
    more says how many measurements only one of them has."""
    keys = ("operation", "case", "phase", "contender")
    old = {tuple(row[k] for k in keys): row for row in a["rows"]}
    new_keys = {tuple(row[k] for k in keys) for row in b["rows"]}
    rows = []
    for row in b["rows"]:
        before = old.get(tuple(row[k] for k in keys))
        if before is None:
            continue
        for metric, new in row["times"].items():
            was = before["times"].get(metric)
            if was is None:
                continue
            apart = new["low"] > was["high"] or new["high"] < was["low"]
            rows.append(
                [
                    f"{row['operation']} {row['case']}",
                    row["phase"],
                    row["contender"],
                    metric,
                    duration(was["median"]),
                    duration(new["median"]),
                    f"{new['median'] / was['median']:.2f}" if was["median"] else "",
                    "changed" if apart else "",
                ]
            )
    table = markdown(["case", "phase", "contender", "metric", "A", "B", "B/A", ""], rows)
    alone = len(old.keys() - new_keys), len(new_keys - old.keys())
    return f"{table}\n\nOnly in A: {alone[0]}, only in B: {alone[1]}" if any(alone) else table


def kernel_traffic(rows: list[dict[str, Any]]) -> str:
    """A line a case: what forward and backward ask memory for, and the least possible."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(f"{row['operation']} {row['case']}", []).append(row)
    lines = []
    for case, launches in cases.items():
        if launches[0]["least"] is None:
            continue
        known = all(row["reads"] is not None for row in launches)
        totals = [sum(row[k] for row in launches) if known else None for k in ("reads", "writes")]
        cells = ["" if total is None else f"{total:.2f}" for total in totals]
        lines.append([case, f"{len(launches)}", *cells, f"{launches[0]['least']:.2f}"])
    return markdown(["case", "launches", "reads", "writes", "least of both"], lines)


def kernels(rows: list[dict[str, Any]], only: str | None = None) -> str:
    """A line a launch and target, or only those of one target."""
    lines = []
    for row in rows:
        for target, c in row["targets"].items():
            if only not in (None, target):
                continue
            parts = c["loops"] or [c["code"]]
            lines.append(
                [
                    f"{row['kernel']} {row['case']}",
                    *("" if row[k] is None else f"{row[k]:.2f}" for k in ("reads", "writes")),
                    target,
                    *(f"{c[k]}" for k in ("registers", "spilled", "shared", "warps")),
                    f"{c['warps'] * c['programs']}",
                    ", ".join(f"{part['instructions']}" for part in parts),
                    ", ".join(f"{part['barriers']}" for part in parts),
                    ", ".join(_accesses(part["loads"]) for part in parts),
                    ", ".join(_accesses(part["stores"]) for part in parts),
                    ", ".join(
                        f"{part['instructions'] / max(1, _moved(part)):.1f}" for part in parts
                    ),
                ]
            )
    header = "kernel reads writes target regs spilled shared warps resident instr barriers loads"
    return markdown([*header.split(), "stores", "instr/byte"], lines)


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            break
    return f"{seconds * factor:.3g} {unit}"


def _rate(seconds: float) -> str:
    return f"{1 / seconds:,.0f}" if seconds < 0.1 else f"{1 / seconds:.2g}"


def _bandwidth(row: Row | None, metric: str, copy: float) -> list[str]:
    if row is None or not row["least_bytes"]:
        return ["", ""]
    rate = row["least_bytes"] / row["times"][metric]["median"]
    return [f"{rate / 1e9:.1f}", f"{rate / copy:.0%}"]


def _groups(result: dict[str, Any], operation: str) -> dict[tuple[str, str], dict[str, Row]]:
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in result["rows"]:
        if row["operation"] == operation:
            groups.setdefault((row["case"], row["phase"]), {})[row["contender"]] = row
    return groups


def _contenders(result: dict[str, Any], operation: str) -> list[str]:
    rows = [row for row in result["rows"] if row["operation"] == operation]
    return list(dict.fromkeys(row["contender"] for row in rows))


def _padded(cells: list[str], widths: list[int]) -> list[str]:
    first, *rest = zip(cells, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]


def _moved(code: dict[str, Any]) -> int:
    return sum(int(w) * n for m in (code["loads"], code["stores"]) for w, n in m.items())


def _accesses(widths: dict[Any, int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in widths.items()) or "-"
