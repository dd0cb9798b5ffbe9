"""The embedding MLP with batch norm, "chunkated": every intermediate tensor and its gradient.

One line a tensor, in the order and under the names of Andrej Karpathy's notebook (makemore part 4,
"becoming a backprop ninja"). Shapes: n examples, T characters of context, V characters in the
vocabulary, E numbers an embedding, H hidden units.

On the CPU in float32 every gradient is bit for bit what autograd computes, so the order of the
operations below is part of the specification.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


class Parameters(NamedTuple):
    """The weights of the network."""

    C: Tensor  # (V, E) embedding of each character
    W1: Tensor  # (T*E, H)
    b1: Tensor  # (H,), cancelled by the batch norm behind it
    W2: Tensor  # (H, V)
    b2: Tensor  # (V,)
    bngain: Tensor  # (1, H)
    bnbias: Tensor  # (1, H)


# The order in which the backward pass reaches the tensors: the order of the notebook's table.
TENSORS = (
    "logprobs probs counts_sum_inv counts_sum counts norm_logits logit_maxes logits "
    "h W2 b2 hpreact bngain bnbias bnraw bnvar_inv bnvar bndiff2 bndiff bnmeani hprebn "
    "embcat W1 b1 emb C"
).split()


def forward(parameters: Parameters, Xb: Tensor, Yb: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of contexts Xb (n, T) and next characters Yb (n,), and every tensor on the way.

    Returns (loss, tensors): a 0-d loss, and the 26 tensors of `TENSORS` by name, parameters
    included.
    """
    C, W1, b1, W2, b2, bngain, bnbias = parameters
    n = Xb.shape[0]
    # embedding and linear layer 1
    emb = C[Xb]  # (n, T, E)
    embcat = emb.view(n, -1)  # (n, T*E)
    hprebn = embcat @ W1 + b1  # (n, H)
    # batch norm, with Bessel's correction
    bnmeani = 1 / n * hprebn.sum(0, keepdim=True)  # (1, H)
    bndiff = hprebn - bnmeani  # (n, H)
    bndiff2 = bndiff**2  # (n, H)
    bnvar = 1 / (n - 1) * bndiff2.sum(0, keepdim=True)  # (1, H)
    bnvar_inv = (bnvar + EPS) ** -0.5  # (1, H)
    bnraw = bndiff * bnvar_inv  # (n, H)
    hpreact = bngain * bnraw + bnbias  # (n, H)
    # non-linearity and linear layer 2
    h = torch.tanh(hpreact)  # (n, H)
    logits = h @ W2 + b2  # (n, V)
    # cross-entropy
    logit_maxes = logits.max(1, keepdim=True).values  # (n, 1)
    norm_logits = logits - logit_maxes  # (n, V), at most 0: exp cannot overflow
    counts = norm_logits.exp()  # (n, V)
    counts_sum = counts.sum(1, keepdim=True)  # (n, 1)
    counts_sum_inv = counts_sum**-1  # (n, 1); 1.0 / counts_sum would not be bit-exact backwards
    probs = counts * counts_sum_inv  # (n, V)
    logprobs = probs.log()  # (n, V)
    loss = -logprobs[range(n), Yb].mean()
    scope = locals()
    return loss, {name: scope[name] for name in TENSORS}


def backward(tensors: dict[str, Tensor], Xb: Tensor, Yb: Tensor) -> dict[str, Tensor]:
    """The gradient of the loss with respect to each of the 26 tensors, by hand.

    Takes what `forward` returned and its inputs; returns the gradients by the tensors' names, in
    the order of `TENSORS`. No autograd.
    """
    with torch.no_grad():
        return _backward(tensors, Xb, Yb)


def _backward(tensors: dict[str, Tensor], Xb: Tensor, Yb: Tensor) -> dict[str, Tensor]:
    t = tensors
    n = Xb.shape[0]

    # loss = -mean_i logprobs[i, y_i]: each of the n picked elements weighs -1/n, all others 0.
    dlogprobs = torch.zeros_like(t["logprobs"])
    dlogprobs[range(n), Yb] = -1.0 / n

    # logprobs = log probs: d log(p) = 1/p. As one division: 1/p * dlogprobs would round twice.
    dprobs = dlogprobs / t["probs"]

    # probs = counts * counts_sum_inv: of a product, each factor gets the other one. counts_sum_inv
    # (n, 1) was broadcast over the V columns: used V times, so its gradients are summed.
    dcounts_sum_inv = (t["counts"] * dprobs).sum(1, keepdim=True)

    # counts_sum_inv = counts_sum^-1: d x^-1 = -x^-2.
    dcounts_sum = -(t["counts_sum"] ** -2) * dcounts_sum_inv

    # counts is used twice. In probs it gets the other factor; in counts_sum, a sum over the
    # columns, each element weighs 1, so (n, 1) is broadcast back. The two add up.
    dcounts = t["counts_sum_inv"] * dprobs + dcounts_sum

    # counts = exp(norm_logits): exp is its own derivative.
    dnorm_logits = t["counts"] * dcounts

    # norm_logits = logits - logit_maxes: -1, summed over the broadcast columns. (It is 0 but for
    # rounding: the maximum shifts the whole row, and softmax does not see a shift.)
    dlogit_maxes = (-dnorm_logits).sum(1, keepdim=True)

    # logits is used twice: +1 in norm_logits; and where it is the maximum of its row, the gradient
    # of logit_maxes goes through.
    n_classes = t["logits"].shape[1]
    dlogits = dnorm_logits + F.one_hot(t["logits"].argmax(1), n_classes) * dlogit_maxes

    # logits = h @ W2 + b2: logits_ij = sum_k h_ik W2_kj + b2_j, so dh_ik = sum_j dlogits_ij W2_kj
    # and dW2_kj = sum_i h_ik dlogits_ij; b2 was broadcast over the rows.
    dh = dlogits @ t["W2"].T
    dW2 = t["h"].T @ dlogits
    db2 = dlogits.sum(0)

    # h = tanh(hpreact): d tanh = 1 - tanh^2. As one fused multiply-add, which rounds once: that is
    # what autograd does, and 1 - h*h, which rounds twice, is not bit-exact.
    dhpreact = torch.addcmul(torch.ones_like(t["h"]), t["h"], t["h"], value=-1) * dh

    # hpreact = bngain * bnraw + bnbias: a product and a sum; gain and bias (1, H) were broadcast
    # over the n rows.
    dbngain = (t["bnraw"] * dhpreact).sum(0, keepdim=True)
    dbnbias = dhpreact.sum(0, keepdim=True)
    dbnraw = t["bngain"] * dhpreact

    # bnraw = bndiff * bnvar_inv: bnvar_inv was broadcast over the rows.
    dbnvar_inv = (t["bndiff"] * dbnraw).sum(0, keepdim=True)

    # bnvar_inv = (bnvar + eps)^-1/2: d x^-1/2 = -1/2 x^-3/2.
    dbnvar = -0.5 * (t["bnvar"] + EPS) ** -1.5 * dbnvar_inv

    # bnvar = 1/(n-1) * sum over rows of bndiff2: each element weighs 1/(n-1).
    dbndiff2 = 1 / (n - 1) * torch.ones_like(t["bndiff2"]) * dbnvar

    # bndiff is used twice: in bnraw as a factor, in bndiff2 as a square, d x^2 = 2x.
    dbndiff = t["bnvar_inv"] * dbnraw + 2 * t["bndiff"] * dbndiff2

    # bndiff = hprebn - bnmeani: -1, summed over the broadcast rows.
    dbnmeani = (-dbndiff).sum(0, keepdim=True)

    # hprebn is used twice: +1 in bndiff; and 1/n in bnmeani, the mean of the rows.
    dhprebn = dbndiff + 1 / n * dbnmeani

    # hprebn = embcat @ W1 + b1: as linear layer 2.
    dembcat = dhprebn @ t["W1"].T
    dW1 = t["embcat"].T @ dhprebn
    db1 = dhprebn.sum(0)

    # embcat = emb.view(n, T*E): another shape of the same numbers.
    demb = dembcat.view(t["emb"].shape)

    # emb = C[Xb]: each position of each context used a row of C; a row's gradients add up.
    dC = torch.zeros_like(t["C"])
    dC.index_add_(0, Xb.flatten(), demb.flatten(0, 1))

    scope = locals()
    return {name: scope[f"d{name}"] for name in TENSORS}


# The scalar functions on the way and their derivatives as `backward` uses them.
LOCAL_GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "log(x)": (torch.log, lambda x: 1 / x),
    "x**-1": (lambda x: x**-1, lambda x: -(x**-2)),
    "exp(x)": (torch.exp, torch.exp),
    "tanh(x)": (torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
    "(x + eps)**-0.5": (lambda x: (x + EPS) ** -0.5, lambda x: -0.5 * (x + EPS) ** -1.5),
    "x**2": (lambda x: x**2, lambda x: 2 * x),
}
