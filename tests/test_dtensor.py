"""DTensors, which take PyTorch's own operations: the numbers of one process, over two."""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fused
from tests import processes

X = torch.arange(40.0).cos().view(10, 4)
Y = torch.tensor([-100, -100, 0, 1, -100, 3, 2, 1, 0, 3])  # each process ignores another number
ODD = slice(7)  # rows that two processes share unequally
W, B = torch.arange(16.0).sin().view(4, 4), torch.arange(4.0).exp()

# Of x and then, over two processes: by rows (0), by columns (1), or whole in each (None).
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], tuple[int | None, ...]]] = {
    "rows": (fused.cross_entropy, (X, Y), (0, 0)),
    "unequal rows": (fused.cross_entropy, (X[ODD], Y[ODD]), (0, 0)),
    "classes": (fused.cross_entropy, (X, Y), (1, None)),
    "whole": (fused.cross_entropy, (X, Y), (None, None)),
    "weighted": (fused.cross_entropy, (X, Y, B), (0, 0, None)),
    "stats": (lambda *args: fused.cross_entropy_with_stats(*args).loss, (X, Y), (0, 0)),
    "linear": (lambda x, w, y: fused.linear_cross_entropy(x, w, y), (X, W, Y), (0, None, 0)),
    "batch norm": (
        lambda x, w, b: fused.batch_norm(x, None, None, w, b, True),
        (X.double(), B.double(), B.double()),
        (0, None, None),
    ),
}

if torch.__version__ < "2.10":
    del CASES["stats"]  # there is no logsumexp of DTensors


def step(function: Callable[..., Any], tensors: list[Any]) -> list[Any]:
    x = tensors[0].requires_grad_()
    y = function(x, *tensors[1:])
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), x)]


def worker(rank: int, folder: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2,))

    def distributed(tensor: Tensor, dim: int | None = None) -> Any:
        return distribute_tensor(tensor, mesh, [Replicate() if dim is None else Shard(dim)])

    found = {}
    for name, (function, tensors, dims) in CASES.items():
        outputs = step(function, [*map(distributed, tensors, dims)])
        found[name] = [output.full_tensor() for output in outputs]

    mistakes: dict[str, Callable[[], Any]] = {
        "target": lambda: fused.cross_entropy(X, distributed(Y), z_loss=0.1),
        "linear target": lambda: fused.linear_cross_entropy(X, W, distributed(Y)),
        "gain": lambda: fused.batch_norm(X, None, None, distributed(B), training=True),
        "slice": lambda: fused.vocab_parallel_cross_entropy(distributed(X, 1), Y, widths=[2, 2]),
        "slice's target": lambda: fused.vocab_parallel_cross_entropy(X, distributed(Y)),
        "batch": lambda: fused.SyncBatchNorm(4)(distributed(X, 0)),
    }
    said = {}
    for name, mistake in mistakes.items():
        for implementation in ("eager", "triton"):
            with fused.backend.use(implementation):
                try:
                    mistake()
                except Exception as error:
                    said[name, implementation] = f"{type(error).__name__}: {error}"
    torch.save((found, said), f"{folder}/{rank}.pt")


MIXED = "RuntimeError: .*got mixed torch.Tensor and DTensor"
SAID = {
    "target": MIXED,
    "linear target": MIXED,
    "gain": MIXED,
    "slice": "TypeError: vocab_.*got a DTensor; .*take to_local.*or fused.cross_entropy, which",
    "slice's target": "TypeError: vocab_.*got a DTensor",
    "batch": "TypeError: SyncBatchNorm: .*got a DTensor; .*take to_local.*or fused.BatchNorm1d",
}


def test_equals_one_process(tmp_path) -> None:
    """Where F.cross_entropy's mean is wrong, or it refuses: processes that ignore unequal numbers
    of rows, have unequal weights, or unequal numbers of rows. In one spawn, which costs seconds."""
    processes.run(worker, 2, tmp_path)
    for rank in range(2):
        found, said = torch.load(tmp_path / f"{rank}.pt")
        for name, (function, tensors, _) in CASES.items():
            torch.testing.assert_close(found[name], step(function, [t.clone() for t in tensors]))
        assert said.keys() == {(name, i) for name in SAID for i in ("eager", "triton")}
        for (name, implementation), message in said.items():
            assert re.match(SAID[name], message), (name, implementation, message)
    torch.testing.assert_close(fused.cross_entropy(X, Y), F.cross_entropy(X, Y))
