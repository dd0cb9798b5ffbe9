"""Every kernel, as its launcher launches it, compiles for every target; without a GPU."""

import json

import pytest

from tests.test_backend import python
from tests.test_package import ROOT

pytest.importorskip("triton")

CODE = f"""
import json, sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from bench import kernels
for dtype in (torch.bfloat16, torch.float32, torch.float64):
    for operation, launchers, n, c in kernels.GRID:
        if not (SELECTED):
            continue
        with kernels.catch_launches() as launches:
            launchers(n, c, dtype)
        for launch in launches:
            for name, target in kernels.TARGETS.items():
                r = kernels.compile_launch(launch, target)
                kind = str(dtype).removeprefix("torch.")
                print(json.dumps([launch.kernel.__name__, n * c, kind, name, r.stack_bytes]))
"""


def compiled(selected: str) -> list[list]:
    """(kernel, elements, dtype, target, stack bytes) of everything in the grid that is selected."""
    result = python(CODE.replace("SELECTED", selected))
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_no_spills(rows: list[list]) -> None:
    """No stack at all, of the large shapes."""
    spilled = [row for row in rows if row[4] and row[1] >= 2**20 and row[2] != "float64"]
    assert not spilled


def test_kernels_compile_for_every_target() -> None:
    rows = compiled("c in (27, 200, 1024) and dtype is torch.bfloat16")
    assert {row[3] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row[0] for row in rows} == {
        "_cross_entropy_fwd_kernel",
        "_cross_entropy_scale_kernel",
        "_cross_entropy_bwd_kernel",
        "_batch_norm_moments_kernel",
        "_batch_norm_fwd_kernel",
        "_batch_norm_sums_kernel",
        "_batch_norm_bwd_kernel",
    }
    check_no_spills(rows)


@pytest.mark.slow
def test_kernels_compile_over_the_whole_grid() -> None:
    check_no_spills(compiled("True"))
