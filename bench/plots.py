"""Plots of a run's JSON: bandwidth over size under the copy's roof, memory, times of a case."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench import tables

_COLOURS = {
    "fused": "tab:red",
    "fused graph": "tab:pink",
    "fused correction=1": "tab:brown",
    "torch": "tab:blue",
    "torch graph": "tab:cyan",
    "compile": "tab:green",
    "compile max": "tab:olive",
    "chunked": "tab:gray",
    "torch chunked": "navy",
    "products": "gold",
    "liger": "tab:purple",
    "jax": "tab:orange",
}


def draw(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Writes the PNGs of a run as folder/stem-*.png, and returns their paths."""
    written = []
    for operation in tables.operations(result):
        rows = [r for r in result["rows"] if r["operation"] == operation]
        both = [r for r in rows if r["phase"] == "fwd_bwd"]
        figures = {}
        if any(r["least_bytes"] for r in both):
            figures["speed"] = _speed(result, both, operation)
        else:
            figures["speed"] = _durations(result, both or rows, operation)
        if both:
            figures["memory"] = _memory(both, operation)
        for name, figure in figures.items():
            path = folder / f"{stem}-{operation}-{name}.png"
            figure.savefig(path, dpi=110, metadata={"Software": None})
            plt.close(figure)
            written.append(path)
    return written


def _speed(result: dict[str, Any], rows: list[dict[str, Any]], operation: str) -> Any:
    metric = tables.main_metric(result, operation)
    figure, axes = _by_dtype(rows)
    for dtype, ax in axes.items():
        for name, group in _by_contender(rows, dtype).items():
            points = sorted((r["tensor_bytes"], _rate(r, metric)) for r in group)
            ax.plot(
                *zip(*points, strict=True),
                "o-",
                ms=4,
                lw=1,
                color=_COLOURS.get(name, "black"),
                label=name,
            )
        copy = result["copy_bytes_per_second"] / 1e9
        ax.axhline(copy, color="black", ls="--", lw=1, label="copy")
        ax.set(
            xscale="log", yscale="log", xlabel="bytes of the tensor", title=f"{operation} {dtype}"
        )
        ax.set_ylabel("GB/s of the least possible bytes, forward + backward")
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    return figure


def _memory(rows: list[dict[str, Any]], operation: str) -> Any:
    rows = [r for r in rows if tables.memory_is_seen(r["contender"])]
    figure, axes = _by_dtype(rows)
    for dtype, ax in axes.items():
        groups = _by_contender(rows, dtype)
        cases = list(dict.fromkeys(r["case"] for r in rows if r["dtype"] == dtype))
        for i, (name, group) in enumerate(groups.items()):
            found = {r["case"]: r["peak_bytes"] / r["tensor_bytes"] for r in group}
            places = [cases.index(case) + i / (len(groups) + 1) for case in found]
            width = 1 / (len(groups) + 1)
            ax.bar(
                places,
                list(found.values()),
                width,
                color=_COLOURS.get(name, "black"),
                label=name,
            )
        ax.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=7)
        ax.set(ylabel="peak memory above the inputs / tensor", title=f"{operation} {dtype}")
        ax.legend(fontsize=7)
    return figure


def _durations(result: dict[str, Any], rows: list[dict[str, Any]], operation: str) -> Any:
    """Of what no bound by bytes holds for: bars for each case, on axes of its own."""
    metric = tables.main_metric(result, operation)
    cases = list(dict.fromkeys(r["case"] for r in rows))
    of = {case: [r for r in rows if r["case"] == case] for case in cases}
    heights = [1 + len(group) / 3 for group in of.values()]
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(6, sum(heights)), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    what = "a step" if rows[0]["phase"] == "step" else "of forward + backward"
    for ax, (case, group) in zip(axes[:, 0], of.items(), strict=True):
        names = [r["contender"] for r in group]
        times = [r["times"][metric]["median"] * 1e6 for r in group]
        bars = ax.barh(names, times, color=[_COLOURS.get(name, "black") for name in names])
        ax.bar_label(bars, [tables.duration(t / 1e6) for t in times], padding=3, fontsize=7)
        ax.margins(x=0.15)  # room for the longest bar's label
        ax.invert_yaxis()  # torch first, as in the tables
        ax.set(xlabel=f"microseconds {what}", title=f"{operation} {case}")
    return figure


def _by_dtype(rows: list[dict[str, Any]]) -> tuple[Any, dict[str, Axes]]:
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    size = (6 * len(dtypes), 4.5)
    figure, axes = plt.subplots(1, len(dtypes), figsize=size, squeeze=False, layout="constrained")
    return figure, dict(zip(dtypes, axes[0], strict=True))


def _by_contender(rows: list[dict[str, Any]], dtype: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["dtype"] == dtype:
            groups.setdefault(row["contender"], []).append(row)
    return groups


def _rate(row: dict[str, Any], metric: str) -> float:
    return row["least_bytes"] / row["times"][metric]["median"] / 1e9
