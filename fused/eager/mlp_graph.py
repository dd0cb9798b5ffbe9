"""The loop of mlp_train.py with the steps of a chunk in one CUDA graph.

A step is 18 operations of a few microseconds each, which a CPU cannot hand out one by one as fast
as the GPU takes them. Captured once and replayed, a chunk of them is one launch. It serves networks
that are too large for one multiprocessor (fused/kernels/mlp_train.py).
"""

import torch
from torch import Tensor

from fused.eager.mlp_train import CHUNK, Loop, train_models


def mlp_train(
    C: Tensor,
    W1: Tensor,
    W2: Tensor,
    b2: Tensor,
    gain: Tensor,
    bias: Tensor,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    lr: Tensor,
    eps: float,
) -> Tensor:
    """K steps of M models; takes and returns what fused/eager/mlp_train.py does, on a CUDA device.

    Steps that do not fill a chunk are taken one by one, by the same operations.
    """
    graphs: dict[Loop, torch.cuda.CUDAGraph] = {}

    def take_all(loop: Loop, steps: int) -> None:
        if steps < CHUNK:
            loop.take_all(steps)
            return
        if loop not in graphs:
            graphs.clear()  # the model before is done
            graphs[loop] = _captured(loop)
        graphs[loop].replay()

    return train_models(C, W1, W2, b2, gain, bias, x, y, index, lr, eps, take_all)


def _captured(loop: Loop) -> torch.cuda.CUDAGraph:
    """The steps of a chunk as a graph; the loop's tensors stay as they are."""
    state = (loop.C, loop.W1, loop.W2, loop.affine)
    before = [tensor.clone() for tensor in state]
    # Whatever the libraries set up at their first call must not happen while capturing.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop.take(0)
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop.take_all(CHUNK)
    return graph
