"""Ways to train: each takes minibatches, updates the parameters in place, and returns the losses.

All compute the same step: forward, backward, parameter -= lr * gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from fused.makemore.errors import InputError
from fused.makemore.model import EPS
from fused.mlp_train import MLPParameters, train_mlp_method
from fused.reference import mlp


class Engine(Protocol):
    def run(self, x: Tensor, y: Tensor, index: Tensor, lr: float) -> Tensor:
        """One step for each minibatch: rows index (K, B) of contexts x (N, T), characters y (N,).

        Returns the losses (K,), each from before its update, on the parameters' device.
        """
        ...


class LibraryEngine:
    """`fused.train_mlp`, all steps in one call."""

    def __init__(self, parameters: MLPParameters, method: str) -> None:
        self._parameters, self._method = parameters, method

    def run(self, x: Tensor, y: Tensor, index: Tensor, lr: float) -> Tensor:
        _, losses = fused.train_mlp(
            self._parameters, x, y, index, lr, eps=EPS, method=self._method, inplace=True
        )
        return losses


class AutogradEngine:
    """A loss under torch's autograd; the gradients come from `.backward()`."""

    def __init__(
        self, parameters: MLPParameters, loss: Callable[[MLPParameters, Tensor, Tensor], Tensor]
    ) -> None:
        # Leaves that share memory with the caller's tensors, so that updates reach them.
        self._leaves = MLPParameters(*(p.detach().requires_grad_() for p in parameters))
        self._loss = loss

    def run(self, x: Tensor, y: Tensor, index: Tensor, lr: float) -> Tensor:
        losses = torch.empty(len(index), device=x.device)
        for i, (xb, yb) in enumerate(zip(x[index].unbind(), y[index].unbind(), strict=True)):
            loss = self._loss(self._leaves, xb, yb)
            for p in self._leaves:
                p.grad = None
            loss.backward()
            with torch.no_grad():
                for p in self._leaves:
                    assert p.grad is not None
                    p.add_(p.grad, alpha=-lr)
            losses[i] = loss.detach()
        return losses


def torch_loss(p: MLPParameters, x: Tensor, y: Tensor) -> Tensor:
    """The network in torch's own operations, as the notebook trains it.

    But for its C[x], whose gradient several threads add up in any order.
    """
    hprebn = F.embedding(x, p.C).flatten(1) @ p.W1 + p.b1
    mean = hprebn.mean(0, keepdim=True)
    var = hprebn.var(0, keepdim=True, correction=1)
    hpreact = p.bngain * ((hprebn - mean) * (var + EPS) ** -0.5) + p.bnbias
    return F.cross_entropy(torch.tanh(hpreact) @ p.W2 + p.b2, y)


def fused_loss(p: MLPParameters, x: Tensor, y: Tensor) -> Tensor:
    """The network in this package's operations: the way a user writes it."""
    hprebn = F.embedding(x, p.C).flatten(1) @ p.W1 + p.b1
    gain, bias = p.bngain.flatten(), p.bnbias.flatten()
    hpreact = fused.batch_norm(hprebn, None, None, gain, bias, True, eps=EPS, correction=1)
    return fused.cross_entropy(torch.tanh(hpreact) @ p.W2 + p.b2, y)


class ChunkedEngine:
    """The 26 gradients by hand, one tensor at a time."""

    def __init__(self, parameters: MLPParameters) -> None:
        self._parameters = mlp.Parameters(*parameters)

    @torch.no_grad()
    def run(self, x: Tensor, y: Tensor, index: Tensor, lr: float) -> Tensor:
        losses = torch.empty(len(index), device=x.device)
        for i, (xb, yb) in enumerate(zip(x[index].unbind(), y[index].unbind(), strict=True)):
            losses[i], tensors = mlp.forward(self._parameters, xb, yb)
            gradients = mlp.backward(tensors, xb, yb)
            for name, p in self._parameters._asdict().items():
                p.add_(gradients[name], alpha=-lr)
        return losses


METHODS = {"persistent": "persistent", "graph": "graph", "numba": "numba", "manual": "eager"}
ENGINES: dict[str, Callable[[MLPParameters], Engine]] = {
    **{name: partial(LibraryEngine, method=method) for name, method in METHODS.items()},
    "fused": lambda parameters: AutogradEngine(parameters, fused_loss),
    "chunked": ChunkedEngine,
    "autograd": lambda parameters: AutogradEngine(parameters, torch_loss),
}


def fastest(parameters: MLPParameters, x: Tensor, batch: int) -> str:
    """The engine that --engine auto is."""
    fastest = train_mlp_method(parameters, x, batch)
    return next(name for name, method in METHODS.items() if method == fastest)


def start(name: str, parameters: MLPParameters, x: Tensor, y: Tensor, batch: int) -> Engine:
    """The engine, compiled. Raises InputError where it cannot run on this device or these sizes."""
    engine = ENGINES[name](parameters)
    with input_errors(name):
        engine.run(x, y, torch.empty(0, batch, dtype=torch.int64, device=x.device), 0.0)
    return engine


@contextmanager
def input_errors(name: str) -> Iterator[None]:
    """What the library refuses, as the InputError of an engine's name."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--engine {name}: {str(error).removeprefix('train_mlp: ')}") from None
