"""fused.SyncBatchNorm over real processes: the numbers of one process with the whole batch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fused
from tests.test_package import ROOT

# What each process runs: its share of the batch, forward and backward.
WORKER = """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import fused
rank, folder, sizes, options = int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]), sys.argv[5]
options = json.loads(options)
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=len(sizes))
with_residual = options.pop("residual")
calls = []
for name in ("all_gather", "all_reduce"):
    def counted(*a, _f=getattr(dist, name), _n=name, **k):
        calls.append(_n)
        return _f(*a, **k)
    setattr(dist, name, counted)
data = torch.load(f"{folder}/data.pt")
begin = sum(sizes[:rank])
share = slice(begin, begin + sizes[rank])
x, residual, upstream = (data[name][share] for name in ("x", "residual", "upstream"))
norm = fused.SyncBatchNorm(x.shape[1], **options)
with torch.no_grad():
    norm.weight.copy_(data["weight"]), norm.bias.copy_(data["bias"])
x = x.clone().requires_grad_()
parallel = torch.nn.parallel.DistributedDataParallel(norm)
y = parallel(x, residual) if with_residual else parallel(x)
try:
    torch.autograd.grad(y, x, upstream, create_graph=True)
except RuntimeError as error:
    refused = str(error)
y.backward(upstream)
torch.save({"y": y.detach(), "dx": x.grad, "dw": norm.weight.grad, "db": norm.bias.grad,
            "buffers": dict(norm.named_buffers()), "calls": calls, "refused": refused},
           f"{folder}/out{rank}.pt")
dist.destroy_process_group()
"""


def over_processes(
    folder: Path, sizes: list[int], data: dict[str, torch.Tensor], options: dict[str, Any]
) -> list[dict[str, Any]]:
    torch.save(data, folder / "data.pt")
    arguments = [str(folder), json.dumps(sizes), json.dumps(options)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(ROOT), str(rank), *arguments],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(len(sizes))
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return [torch.load(folder / f"out{rank}.pt") for rank in range(len(sizes))]


CASES: dict[str, tuple[list[int], tuple[int, ...], dict[str, Any]]] = {
    "two unequal": ([3, 6], (9, 4), {}),
    "three with images": (
        [2, 1, 4],
        (7, 3, 5, 2),
        {"activation": "relu", "correction": 1, "residual": True},
    ),
    "one is empty": ([4, 0], (4, 3, 6), {"momentum": None, "residual": True, "activation": "silu"}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process_with_the_whole_batch(case, tmp_path) -> None:
    sizes, shape, options = CASES[case]
    generator = torch.Generator().manual_seed(0)
    data = {n: torch.randn(shape, generator=generator) for n in ("x", "residual", "upstream")}
    data |= {n: torch.randn(shape[1], generator=generator) + 1 for n in ("weight", "bias")}
    results = over_processes(tmp_path, sizes, data, {"residual": False, **options})

    options = dict(options)
    residual = data["residual"] if options.pop("residual", False) else None
    module = {2: fused.BatchNorm1d, 3: fused.BatchNorm1d, 4: fused.BatchNorm2d}[len(shape)]
    norm = module(shape[1], **options)
    with torch.no_grad():
        norm.weight.copy_(data["weight"])
        norm.bias.copy_(data["bias"])
    x = data["x"].clone().requires_grad_()
    y = norm(x, residual)
    y.backward(data["upstream"])

    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([r["y"] for r in results]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([r["dx"] for r in results]), x.grad, **close)
    # Parameter gradients are each process's own share, of which DistributedDataParallel made the
    # mean in all of them: their sum is the whole.
    torch.testing.assert_close(sum(r["dw"] for r in results), norm.weight.grad, **close)
    torch.testing.assert_close(sum(r["db"] for r in results), norm.bias.grad, **close)
    for result in results:
        assert result["calls"] == ["all_gather", "all_reduce"]
        assert "expected create_graph=False" in result["refused"]
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(result["buffers"][name], buffer, **close)
            same = results[0]["buffers"][name]
            torch.testing.assert_close(result["buffers"][name], same, rtol=0, atol=0)


def test_alone_it_is_batch_norm(implementation, device) -> None:
    ours, theirs = fused.SyncBatchNorm(3, device=device), nn.BatchNorm2d(3, device=device)
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
    x = torch.randn(4, 3, 5, 2, device=device)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_convert_sync_batchnorm() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.Sequential(fused.BatchNorm2d(4, activation="relu")), nn.Linear(2, 2)
    )
    assert repr(fused.SyncBatchNorm(4, 1e-4, 0.2, True, True, None, "cpu", torch.float64)) == (
        repr(nn.SyncBatchNorm(4, 1e-4, 0.2))
    )
    parameters = list(model.parameters())
    converted = fused.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert type(model[0]) is fused.SyncBatchNorm and type(model[1][0]) is fused.SyncBatchNorm
    assert model[0].process_group is None and model[1][0].activation == "relu"
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert type(fused.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm3d(2))) is (
        fused.SyncBatchNorm
    )
