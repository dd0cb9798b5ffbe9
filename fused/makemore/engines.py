"""Ways to train: each takes minibatches, updates the parameters in place, and returns the losses.

All compute the same step: forward, backward, parameter -= lr * gradient.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from fused.reference import mlp
from fused.reference.mlp import EPS, Parameters


class Engine(Protocol):
    def run(self, X: Tensor, Y: Tensor, lr: float) -> Tensor:
        """One step for each minibatch: contexts X (K, B, T), next characters Y (K, B).

        Returns the losses (K,), each from before its update, on the parameters' device.
        """
        ...


class AutogradEngine:
    """A loss under torch's autograd; the gradients come from `.backward()`."""

    def __init__(
        self, parameters: Parameters, loss: Callable[[Parameters, Tensor, Tensor], Tensor]
    ) -> None:
        # Leaves that share memory with the caller's tensors, so that updates reach them.
        self._leaves = Parameters(*(p.detach().requires_grad_() for p in parameters))
        self._loss = loss

    def run(self, X: Tensor, Y: Tensor, lr: float) -> Tensor:
        losses = []
        for x, y in zip(X.unbind(), Y.unbind(), strict=True):
            loss = self._loss(self._leaves, x, y)
            for p in self._leaves:
                p.grad = None
            loss.backward()
            with torch.no_grad():
                for p in self._leaves:
                    assert p.grad is not None
                    p.add_(p.grad, alpha=-lr)
            losses.append(loss.detach())
        return torch.stack(losses)


def torch_loss(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
    """The network in torch's own operations, as the notebook trains it."""
    hprebn = p.C[x].flatten(1) @ p.W1 + p.b1
    mean = hprebn.mean(0, keepdim=True)
    var = hprebn.var(0, keepdim=True, correction=1)
    hpreact = p.bngain * ((hprebn - mean) * (var + EPS) ** -0.5) + p.bnbias
    return F.cross_entropy(torch.tanh(hpreact) @ p.W2 + p.b2, y)


def fused_loss(p: Parameters, x: Tensor, y: Tensor) -> Tensor:
    """The network in this package's operations: the way a user writes it."""
    hprebn = p.C[x].flatten(1) @ p.W1 + p.b1
    gain, bias = p.bngain.flatten(), p.bnbias.flatten()
    hpreact = fused.batch_norm(hprebn, None, None, gain, bias, True, eps=EPS, correction=1)
    return fused.cross_entropy(torch.tanh(hpreact) @ p.W2 + p.b2, y)


class ChunkedEngine:
    """The 26 gradients by hand, one tensor at a time."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters

    @torch.no_grad()
    def run(self, X: Tensor, Y: Tensor, lr: float) -> Tensor:
        losses = []
        for x, y in zip(X.unbind(), Y.unbind(), strict=True):
            loss, tensors = mlp.forward(self._parameters, x, y)
            gradients = mlp.backward(tensors, x, y)
            for name, p in self._parameters._asdict().items():
                p.add_(gradients[name], alpha=-lr)
            losses.append(loss)
        return torch.stack(losses)


class ManualEngine:
    """The closed forms, without autograd and without an allocation in the loop.

    With n rows and dlogits = softmax(logits) - onehot, n times the gradient of the mean loss; every
    update takes lr/n of what follows from it, so the division happens there.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters

    @torch.no_grad()
    def run(self, X: Tensor, Y: Tensor, lr: float) -> Tensor:
        C, W1, b1, W2, b2, bngain, bnbias = self._parameters
        steps, n, context = X.shape
        H, V, E = W1.shape[1], W2.shape[1], C.shape[1]
        rate = -lr / n
        onehot = C.new_zeros(steps, n, V).scatter_(2, Y.unsqueeze(2), 1.0)
        logits_of_step = C.new_empty(steps, n, V)  # kept: one cross-entropy for all of them

        emb, demb = C.new_empty(n * context, E), C.new_empty(n, context * E)
        embcat, demb_rows = emb.view(n, context * E), demb.view(n * context, E)
        xhat, h, dh, product = (C.new_empty(n, H) for _ in range(4))
        mean, rstd, dgain, dbias, slope = (C.new_empty(1, H) for _ in range(5))
        dlogits, db2 = C.new_empty(n, V), C.new_empty(V)
        W1_T, W2_T, embcat_T, h_T = W1.T, W2.T, embcat.T, h.T

        for x, target, logits in zip(
            X.flatten(1).unbind(), onehot.unbind(), logits_of_step.unbind(), strict=True
        ):
            # forward
            torch.index_select(C, 0, x, out=emb)
            torch.addmm(b1, embcat, W1, out=xhat)
            torch.sum(xhat, 0, keepdim=True, out=mean)
            xhat.sub_(mean, alpha=1 / n)
            torch.mul(xhat, xhat, out=product)
            torch.sum(product, 0, keepdim=True, out=rstd)
            rstd.mul_(1 / (n - 1)).add_(EPS).rsqrt_()
            xhat.mul_(rstd)
            torch.addcmul(bnbias, xhat, bngain, out=h)
            h.tanh_()
            torch.addmm(b2, h, W2, out=logits)
            # backward: cross-entropy and linear layer 2
            torch.softmax(logits, 1, out=dlogits)
            dlogits.sub_(target)
            torch.mm(dlogits, W2_T, out=dh)
            W2.addmm_(h_T, dlogits, alpha=rate)
            torch.sum(dlogits, 0, out=db2)
            b2.add_(db2, alpha=rate)
            # tanh and batch norm: gain*rstd * (dh - dbias/n - xhat * dgain/(n-1))
            torch.ops.aten.tanh_backward.grad_input(dh, h, grad_input=dh)
            torch.sum(dh, 0, keepdim=True, out=dbias)
            torch.mul(dh, xhat, out=product)
            torch.sum(product, 0, keepdim=True, out=dgain)
            torch.mul(bngain, rstd, out=slope)
            dh.sub_(dbias, alpha=1 / n).addcmul_(xhat, dgain, value=-1 / (n - 1)).mul_(slope)
            bngain.add_(dgain, alpha=rate)
            bnbias.add_(dbias, alpha=rate)
            # linear layer 1 and embedding. Batch norm cancels b1: its gradient, the sum of dh over
            # the batch, is 0, so b1 stays as it is.
            torch.mm(dh, W1_T, out=demb)
            W1.addmm_(embcat_T, dh, alpha=rate)
            _add_rows(C, x, demb_rows, rate)

        rows = F.cross_entropy(logits_of_step.flatten(0, 1), Y.flatten(), reduction="none")
        return rows.view(steps, n).mean(1)


def _add_rows(table: Tensor, rows: Tensor, values: Tensor, alpha: float) -> None:
    """table[rows[i]] += alpha * values[i], repeated rows adding up in a fixed order."""
    if table.is_cuda:  # index_add_ takes atomics there: another sum in every run
        table.index_put_((rows,), values * alpha, accumulate=True)
    else:
        table.index_add_(0, rows, values, alpha=alpha)


ENGINES: dict[str, Callable[[Parameters], Engine]] = {
    "autograd": lambda parameters: AutogradEngine(parameters, torch_loss),
    "chunked": ChunkedEngine,
    "manual": ManualEngine,
    "fused": lambda parameters: AutogradEngine(parameters, fused_loss),
}
