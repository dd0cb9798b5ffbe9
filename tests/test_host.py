"""The host never looks at a tensor's values: on the meta device there are none to look at.

Every .item(), nonzero() or comparison of values raises there, so what passes cannot stall a GPU.
"""

import pytest
import torch

import fused
from tests.test_backend import python
from tests.test_package import ROOT


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_cross_entropy_of_the_closed_form(kind, reduction) -> None:
    x = torch.zeros(6, 9, 2, device="meta", requires_grad=True)
    weight = torch.zeros(9, device="meta")
    target = (
        torch.zeros(6, 2, dtype=torch.int64, device="meta") if kind == "indices" else x.detach()
    )
    with fused.backend.use("eager"):
        output = fused.cross_entropy_with_stats(
            x, target, weight, reduction=reduction, label_smoothing=0.1, z_loss=0.1, softcap=3.0
        )
        (dx,) = torch.autograd.grad(output.loss, x, torch.ones_like(output.loss))
    assert dx.shape == x.shape


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_the_closed_form(training, momentum) -> None:
    norm = fused.BatchNorm2d(
        3, momentum=momentum, activation="relu", skip_nonfinite=True, device="meta"
    ).train(training)
    x = torch.zeros(2, 3, 4, 4, device="meta", requires_grad=True)
    with fused.backend.use("eager"):
        (dx,) = torch.autograd.grad(norm(x, x.detach()).sum(), x)
    assert dx.shape == x.shape


# The launchers themselves run, on tensors without values; the launches are caught.
LAUNCHERS = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from bench import kernels
from bench.runner import operations
caught = []
for op in operations().values():
    for case in op.kernel_cases():
        caught += kernels.caught(op, case)
print(len(caught), *sorted({{launch.kernel.__name__ for launch in caught}}))
"""


def test_launchers() -> None:
    pytest.importorskip("triton")
    result = python(LAUNCHERS)
    assert result.returncode == 0, result.stderr
    count, *names = result.stdout.split()
    assert int(count) > 50
    assert {name.split("_")[1] for name in names} >= {"cross", "batch", "vocab"}
