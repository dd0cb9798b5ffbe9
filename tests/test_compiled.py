"""Every kernel once as compiled code, with the checks of tests/emulator.

The tests are some of this suite's, run in a process where kernels are compiled (--compiled).
"""

import ast
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.test_package import ROOT

pytest.importorskip("triton")

# Small: a kernel takes up to some seconds to compile, and its threads run on one core.
CASES = [
    "test_batch_norm_plans.py::test_edge[(129, 7)-['moments', 'fwd', 'sums', 'bwd']--relu]",
    "test_cross_entropy.py::test_launches[(4097, 8)-{}-['count', 'fwd', 'sum']-['scale']]",
    "test_cross_entropy.py::test_launches[(32, 27)-{'reduction': 'none'}-['fwd']-['bwd']]",
    "test_cross_entropy_inplace.py::test_no_warp_overwrites_what_another_has_not_read",
    "test_vocab_parallel_cross_entropy.py::test_no_rows_and_all_ignored[triton-mean]",
    "test_mlp_train.py::test_no_warp_updates_a_gain_that_another_has_not_read",
    "test_mlp_train.py::test_rates_may_begin_anywhere",
    "test_mlp_train.py::test_odd_sizes[V28-T1-E10-H64-B2-persistent]",
    "test_mlp_train.py::test_odd_sizes[V28-T1-E10-H64-B2-graph]",
]


def kernels() -> set[str]:
    """What the launchers of kernels/ launch: the names in NAME[grid](...)."""
    found = set()
    for path in ROOT.joinpath("kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert isinstance(node.func.value, ast.Name), ast.unparse(node)
                found.add(node.func.value.id)
    return found


@pytest.mark.interpreted("runs the suite compiled itself")
@pytest.mark.skipif(torch.cuda.is_available(), reason="--compiled is for machines without a GPU")
def test_every_kernel_runs_compiled() -> None:
    unwanted = ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    environment = {k: v for k, v in os.environ.items() if k not in unwanted}
    cases = [f"tests/{case}" for case in CASES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--compiled", *cases],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CASES) + 2} passed" in done.stdout  # two have two
    launched = set(re.findall(r"^compiled for sm_90: (\w+), \d+ times", done.stdout, re.M))
    assert launched == kernels()
