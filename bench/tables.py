"""Markdown tables of a run's JSON: for the terminal, and for docs/benchmarks.md."""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


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


def speed(result: dict[str, Any], operation: str) -> str:
    """Time of torch, then of every contender as a ratio to it; then how near to the copy."""
    cuda = result["machine"]["type"] == "cuda"
    metric = "device_cold" if cuda else "wall"
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


def host(result: dict[str, Any], operation: str) -> str:
    """Wall time of calls in a row, on CUDA: small shapes are bound by the host."""
    names = _contenders(result, operation)
    rows = []
    for (case, phase), group in _groups(result, operation).items():
        cells = [duration(group[n]["times"]["wall"]["median"]) if n in group else "" for n in names]
        rows.append([case, phase, *cells])
    return markdown(["case", "phase", *names], rows)


def memory(result: dict[str, Any], operation: str) -> str:
    """The most memory held above the inputs, in units of the case's one large tensor."""
    names = [n for n in _contenders(result, operation) if n != "jax" and "graph" not in n]
    rows = []
    for (case, phase), group in _groups(result, operation).items():
        peaks = (
            group[n]["peak_bytes"] / group[n]["tensor_bytes"] if n in group else None for n in names
        )
        cells = ["" if peak is None else f"{peak:.2f}" for peak in peaks]
        rows.append([case, phase, *cells])
    return markdown(["case", "phase", *names], rows)


def rates(result: dict[str, Any], operation: str) -> str:
    """Units a second: steps of a training loop."""
    rows = []
    for (case, _), group in _groups(result, operation).items():
        for name, row in group.items():
            t = row["times"]["wall"]
            rows.append(
                [
                    f"{case} {name}",
                    f"{1 / t['median']:,.0f}",
                    f"{1 / t['high']:,.0f} to {1 / t['low']:,.0f}",
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


def summary(result: dict[str, Any]) -> str:
    """Everything, as the runner prints it at the end."""
    parts = [heading(result)]
    for operation in operations(result):
        parts += [f"{operation}:", table(result, operation)]
    if result["skipped"]:
        parts += ["Skipped:", skipped(result)]
    return "\n\n".join(parts)


def table(result: dict[str, Any], operation: str) -> str:
    """The one table that says most about an operation."""
    bounded = any(r["least_bytes"] for r in result["rows"] if r["operation"] == operation)
    return speed(result, operation) if bounded else rates(result, operation)


def heading(result: dict[str, Any]) -> str:
    m = result["machine"]
    where = f"{m['name']}, {m['threads']} threads" if m["type"] == "cpu" else m["name"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    return (
        f"{where}; {versions}; {result['date'][:10]}; suite {result['suite']}; "
        f"copy {result['copy_bytes_per_second'] / 1e9:.1f} GB/s"
    )


def compare(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Medians of two runs, where both have one; `changed` where the spreads do not overlap."""
    keys = ("operation", "case", "phase", "contender")
    old = {tuple(row[k] for k in keys): row for row in a["rows"]}
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
                    f"{new['median'] / was['median']:.2f}",
                    "changed" if apart else "",
                ]
            )
    return markdown(["case", "phase", "contender", "metric", "A", "B", "B/A", ""], rows)


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            break
    return f"{seconds * factor:.3g} {unit}"


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
