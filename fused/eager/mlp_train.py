"""K steps of training the embedding MLP in closed form: no autograd, next to no allocation.

The formulas are those of fused/kernels/mlp_train.py, with changes that make them cheap here:

    batch norm is torch's own, which divides by B: with the weight gain * sqrt((B-1)/B) and with
    eps * (B-1)/B it has Bessel's correction (docs/derivations.md);
    tanh(x) = 2 sigmoid(2x) - 1: on a CPU torch's sigmoid takes a fifth of the time of its tanh. So
    batch norm gives 2 hpreact, u = sigmoid of that, h = 2u - 1, and d(2 hpreact) = 2 u (1-u) dh;
    b2 is one more row of W2, that of a hidden unit which is always 1;
    embeddings and their gradient lie transposed, each of the E numbers of a character together for
    all B examples: products are fastest where these lie in a row.

That 2, and -lr/B, enter where the loss does: gradients arrive ready to be added to the parameters.
The tensors of the loop are torch's inference tensors, whose operations cost the least.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
# Steps whose minibatches and logits are at hand at a time, and numbers that these may be: they stay
# in the cache.
CHUNK, _CHUNK_NUMBERS = 64, 2**20
# Examples whose shares are added to the parameters as they come: those of many are summed first, as
# each, or what a matrix product adds at a time, could be too small for the parameter.
_FEW = 64


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
    """K steps of M models, one after the other. Updates the parameters in place.

    Returns the mean loss of each step, (M, K). Takes parameters C (M, V, E), W1 (M, T*E, H), W2
    (M, H, V), b2 (M, V), gain and bias (M, H); the examples x (N, T) and y (N,); the rows of them
    that are minibatches, index (S, K, B); and lr (M,). Model m takes the minibatches index[m % S]
    and steps by lr[m].
    """
    losses = C.new_empty(len(C), index.shape[1])
    with torch.inference_mode(), _few_threads(index.shape[2] * W1[0].numel()):
        for m in range(len(C)):
            model = (C[m], W1[m], W2[m], b2[m], gain[m], bias[m])
            rows = index[m % len(index)]
            loop = Loop(*model, rows.shape[1], x.shape[1], lr[m], eps, onehot=C.is_cuda)
            for rows_chunk, losses_chunk in zip(
                rows.split(loop.chunk), losses[m].split(loop.chunk), strict=True
            ):
                # Not y[rows_chunk], which takes row -1 for the last one.
                flat = rows_chunk.flatten()
                targets = y.index_select(0, flat).view(rows_chunk.shape)
                contexts = x.index_select(0, flat).view(*rows_chunk.shape, x.shape[1])
                loop.load(contexts, targets)
                loop.take_all(len(targets))
                losses_chunk.copy_(loop.losses(targets))
            loop.store(*model)
    return losses


@contextmanager
def _few_threads(products: int) -> Iterator[None]:
    """One thread where a matrix product has few products of numbers.

    A second thread then only waits: with 200 hidden units on 2 idle cores it made the loop slower
    by a tenth, on busy ones by a factor of 15.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if products < 2**22 else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Loop:
    """One model in the loop: its parameters, the minibatches of a chunk, and a step.

    Every tensor stays where it is from one chunk to the next.
    """

    def __init__(
        self, C: Tensor, W1: Tensor, W2: Tensor, b2: Tensor, gain: Tensor, bias: Tensor,
        n: int, n_context: int, lr: Tensor, eps: float, onehot: bool,
    ) -> None:  # fmt: skip
        (V, E), (TE, H) = C.shape, W1.shape
        self.bessel = (n - 1) / n
        self.eps = eps * self.bessel
        self.rate = lr * (-2 / n)
        # The parameters: W2 transposed, which makes its products faster by a fifth, and b2 in it.
        self.C, self.affine = C.T.contiguous(), torch.stack((gain, bias))  # C: (E, V)
        self.W1 = _exchanged(W1, n_context, E)  # rows (E, T), not (T, E)
        self.W2 = torch.cat((W2, b2.unsqueeze(0))).T.contiguous()  # (V, H + 1)
        self.W1_T, self.W2_h, (self.gain, self.bias) = self.W1.T, self.W2[:, :H], self.affine

        self.emb, self.demb = C.new_empty(E, n_context * n), C.new_empty(E, n_context * n)
        self.embcat_T = self.emb.view(TE, n)
        self.embcat, self.dembcat = self.embcat_T.T, self.demb.view(TE, n).T
        self.pre, self.u, self.dh = (C.new_empty(n, H) for _ in range(3))
        self.h1 = C.new_ones(n, H + 1)  # h, and the unit that is always 1
        self.h, self.h1_T = self.h1[:, :H], self.h1.T
        self.probs, self.dlogits = C.new_empty(V, n), C.new_empty(V, n)
        self.dlogits_T = self.dlogits.T
        self.mean, self.rstd, self.scaled = C.new_empty(H), C.new_empty(H), C.new_empty(2, H)
        self.u_and_stats = (self.u, self.mean, self.rstd)
        self.weight, self.shift = self.scaled
        self.factor = torch.full_like(self.affine, 2.0)
        self.factor[0] *= self.bessel**0.5
        self.minus_1 = torch.full_like(lr, -1.0)

        self.chunk = max(1, min(CHUNK, _CHUNK_NUMBERS // max(1, V * n)))
        self.rows = torch.zeros(self.chunk, n_context * n, dtype=torch.int64, device=C.device)
        self.minus_target, self.logits = (C.new_empty(self.chunk, V, n) for _ in range(2))
        # Where the values of demb go: their addresses, or one-hot rows for a GPU, where adding by
        # addresses takes atomics: another sum in every run.
        self.onehot = onehot
        if onehot:
            self.goal = C.new_empty(self.chunk, n_context * n, V)
        else:
            self.goal = self.rows.unsqueeze(1).expand(-1, E, -1)
        self.sums = None
        if n > _FEW:
            self.sums = [torch.empty_like(t) for t in (self.C, self.W1, self.W2)]
        self.step = list(zip(self.rows, self.goal, self.minus_target, self.logits, strict=True))

    def load(self, x: Tensor, y: Tensor) -> None:
        """The minibatches of a chunk: contexts (K, B, T), targets (K, B), K at most `chunk`."""
        self.rows[: len(x)] = x.transpose(1, 2).flatten(1)
        one = -self.rate.expand(y.shape).unsqueeze(1)
        self.minus_target.zero_()[: len(y)].scatter_(1, y.unsqueeze(1), one)
        if self.onehot:
            self.goal.zero_().scatter_(2, self.rows.unsqueeze(2), 1.0)

    def take_all(self, steps: int) -> None:
        """The first `steps` steps of the chunk."""
        for i in range(steps):
            self.take(i)

    def take(self, i: int) -> None:
        """Step i of the chunk. It keeps the logits."""
        rows, goal, minus_target, logits = self.step[i]
        # forward
        torch.index_select(self.C, 1, rows, out=self.emb)
        torch.mm(self.embcat, self.W1, out=self.pre)
        torch.mul(self.affine, self.factor, out=self.scaled)
        torch.native_batch_norm(
            self.pre, self.weight, self.shift, None, None, True, 0.0, self.eps,
            out=self.u_and_stats,
        )  # fmt: skip
        self.u.sigmoid_()
        torch.add(self.minus_1, self.u, alpha=2, out=self.h)
        torch.mm(self.W2, self.h1_T, out=logits)
        # backward: cross-entropy and linear layer 2
        torch.softmax(logits, 0, out=self.probs)
        torch.addcmul(minus_target, self.probs, self.rate, out=self.dlogits)
        torch.mm(self.dlogits_T, self.W2_h, out=self.dh)
        if self.sums is None:
            self.W2.addmm_(self.dlogits, self.h1, alpha=0.5)
        else:
            self.W2.add_(torch.mm(self.dlogits, self.h1, out=self.sums[2]), alpha=0.5)
        # tanh and batch norm; its out= form would copy all three
        _sigmoid_backward(self.dh, self.u, grad_input=self.dh)
        dpre, dweight, dshift = _batch_norm_backward(
            self.dh, self.pre, self.weight, None, None, self.mean, self.rstd, True, self.eps,
            [True, True, True],
        )  # fmt: skip
        self.gain.add_(dweight, alpha=2 * self.bessel**0.5)
        self.bias.add_(dshift, alpha=2)
        # linear layer 1 and embedding
        torch.mm(dpre, self.W1_T, out=self.dembcat)
        dC = self.C
        if self.sums is None:
            self.W1.addmm_(self.embcat_T, dpre)
        else:
            self.W1.add_(torch.mm(self.embcat_T, dpre, out=self.sums[1]))
            dC = self.sums[0].zero_()
        if self.onehot:
            dC.addmm_(self.demb, goal)
        else:
            dC.scatter_add_(1, goal, self.demb)
        if dC is not self.C:
            self.C.add_(dC)

    def losses(self, y: Tensor) -> Tensor:
        """The mean loss (K,) of each step of the chunk, whose targets y (K, B) are."""
        return F.cross_entropy(self.logits[: len(y)], y, reduction="none").mean(1)

    def store(
        self, C: Tensor, W1: Tensor, W2: Tensor, b2: Tensor, gain: Tensor, bias: Tensor
    ) -> None:
        """Writes the parameters back."""
        C.copy_(self.C.T)
        W1.copy_(_exchanged(self.W1, len(self.C), W1.shape[0] // len(self.C)))
        W2.copy_(self.W2_h.T)
        b2.copy_(self.W2[:, -1])
        gain.copy_(self.gain)
        bias.copy_(self.bias)


def _exchanged(W1: Tensor, outer: int, inner: int) -> Tensor:
    """W1 with its rows (outer, inner) in the order (inner, outer)."""
    return W1.unflatten(0, (outer, inner)).transpose(0, 1).flatten(0, 1)
