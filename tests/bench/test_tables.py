"""What the tables of a run say."""

import re
from typing import Any

from bench import tables


def test_the_summary_lists_what_was_skipped_and_noted() -> None:
    def skip(contender: str, case: str) -> dict[str, str]:
        return {"operation": "op", "case": case, "contender": contender, "reason": "no GPU"}

    names = ("torch", "fused", "fused graph", "jax")
    rows = [
        {"operation": "op", "case": "8x8", "phase": "fwd", "contender": name, "least_bytes": 512,
         "peak_bytes": 128, "tensor_bytes": 256, "times": {"wall": {"median": 1.0}},
         "ratio_to_torch": {"wall": 1.5}}
        for name in names
    ]  # fmt: skip
    result: dict[str, Any] = {
        "rows": rows, "date": "2026-01-01", "suite": "quick", "copy_bytes_per_second": 1024.0,
        "machine": {"name": "here", "type": "cpu", "threads": 1, "versions": {}},
        "skipped": [skip("liger", c) for c in "abc"] + [skip("compile", c) for c in "abcd"],
        "notes": ["torch is off"],
    }  # fmt: skip
    summary = tables.summary(result)
    assert "- op, liger: no GPU (a, b, c)\n- op, compile: no GPU (4 cases)" in summary
    assert "Notes:\n\n- torch is off" in summary
    row = "8x8|fwd|1 s|1.50|1.50|1.50|0.0|50%"
    assert row in re.sub(r" *\| *", "|", summary)
    # What others or a captured graph hold is not torch's to count.
    header = tables.memory(result, "op").splitlines()[0]
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["case", "phase", *names[:2]]


def test_durations() -> None:
    times = [tables.duration(seconds) for seconds in (90.0, 1.0, 0.999, 1e-3, 2.5e-6, 1e-9)]
    assert times == ["90 s", "1 s", "999 ms", "1 ms", "2.5 us", "0.001 us"]


def test_traffic_that_was_not_counted() -> None:
    row = {"operation": "op", "case": "8x8", "reads": 1.0, "writes": 1.0, "least": 2.0}
    counted = tables.kernel_traffic([row, row]).splitlines()[-1]
    assert [cell.strip() for cell in counted.split("|")[2:-1]] == ["2", "2.00", "2.00", "2.00"]
    not_counted = tables.kernel_traffic([row, {**row, "reads": None}]).splitlines()[-1]
    assert [cell.strip() for cell in not_counted.split("|")[2:-1]] == ["2", "", "", "2.00"]
