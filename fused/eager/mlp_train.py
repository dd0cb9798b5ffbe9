"""K steps of training the embedding MLP in closed form: no autograd, no allocation in the loop.

The formulas are those of fused/kernels/mlp_train.py, with two changes that make them cheap here:

    batch norm is torch's own, which divides by B: with the weight gain * sqrt((B-1)/B) and with
    eps * (B-1)/B it has Bessel's correction (docs/derivations.md);
    tanh(x) = 2 sigmoid(2x) - 1: on a CPU torch's sigmoid takes a fifth of the time of its tanh. So
    batch norm gives 2 hpreact, u = sigmoid of that, h = 2u - 1, and d(2 hpreact) = 2 u (1-u) dh.

That 2, and -lr/B, enter where the loss does: gradients arrive ready to be added to the parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


_CHUNK = 128  # steps whose logits are kept at a time: they stay in the cache


@torch.no_grad()
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
    """K steps of M models, one after the other. Updates the parameters; returns losses (M, K).

    Takes contiguous parameters C (M, V, E), W1 (M, T*E, H), W2 (M, H, V), b2 (M, V), gain and
    bias (M, H); the examples x (N, T) and y (N,); the rows of them that are minibatches, index
    (S, K, B); and lr (M,). Model m takes the minibatches index[m % S] and steps by lr[m].
    """
    streams = [(x[rows].flatten(1), y[rows]) for rows in index.unbind()]
    models = zip(C, W1, W2, b2, gain, bias, lr.tolist(), strict=True)
    losses = [
        _train(*parameters, *streams[m % len(streams)], rate, eps)
        for m, (*parameters, rate) in enumerate(models)
    ]
    return torch.stack(losses)


def _train(
    C: Tensor, W1: Tensor, W2: Tensor, b2: Tensor, gain: Tensor, bias: Tensor, x: Tensor, y: Tensor,
    lr: float, eps: float,
) -> Tensor:  # fmt: skip
    """One model: contexts x (K, B*T), targets y (K, B)."""
    batch_norm = torch.ops.aten.native_batch_norm.out
    batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
    sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
    (steps, n), (V, E), (TE, H) = y.shape, C.shape, W1.shape
    rate, bessel = -2 * lr / n, (n - 1) / n
    factor = C.new_tensor([[2 * bessel**0.5], [2.0]])

    W2_T = W2.T.contiguous()  # (V, H): the products with it are faster by a fifth
    affine, scaled = torch.stack((gain, bias)), C.new_empty(2, H)
    emb, demb = C.new_empty(x.shape[1], E), C.new_empty(n, TE)
    embcat, demb_rows = emb.view(n, TE), demb.view(-1, E)
    pre, u, h, dh = (C.new_empty(n, H) for _ in range(4))
    mean, rstd, minus_1 = C.new_empty(H), C.new_empty(H), C.new_tensor(-1.0)
    probs, dlogits, ones = C.new_empty(V, n), C.new_empty(V, n), C.new_ones(n)
    (gain_, bias_), (weight, shift), b2_ = affine, scaled, b2.unsqueeze(1)
    W1_T, dlogits_T, embcat_T, h_T = W1.T, dlogits.T, embcat.T, h.T

    chunk = min(steps, _CHUNK)
    minus_targets, logits_kept = C.new_empty(chunk, V, n), C.new_empty(chunk, V, n)
    losses = []
    for x_chunk, y_chunk in zip(x.split(chunk), y.split(chunk), strict=True):
        minus_targets.zero_().scatter_(1, y_chunk.unsqueeze(1), -rate)
        of_values = x_chunk.unsqueeze(2).expand(-1, -1, E)  # where each value of demb goes
        for rows, of_value, minus_target, logits in zip(
            x_chunk, of_values, minus_targets, logits_kept, strict=False
        ):
            # forward
            torch.index_select(C, 0, rows, out=emb)
            torch.mm(embcat, W1, out=pre)
            torch.mul(affine, factor, out=scaled)
            batch_norm(
                pre, weight, shift, None, None, True, 0.0, eps * bessel,
                out=u, save_mean=mean, save_invstd=rstd,
            )  # fmt: skip
            u.sigmoid_()
            torch.add(minus_1, u, alpha=2, out=h)
            torch.addmm(b2_, W2_T, h_T, out=logits)
            # backward: cross-entropy and linear layer 2
            torch.softmax(logits, 0, out=probs)
            torch.add(minus_target, probs, alpha=rate, out=dlogits)
            torch.mm(dlogits_T, W2_T, out=dh)
            W2_T.addmm_(dlogits, h, alpha=0.5)
            b2.addmv_(dlogits, ones, alpha=0.5)
            # tanh and batch norm; its out= form would copy all three
            sigmoid_backward(dh, u, grad_input=dh)
            dpre, dweight, dshift = batch_norm_backward(
                dh, pre, weight, None, None, mean, rstd, True, eps * bessel, [True, True, True]
            )
            gain_.add_(dweight, alpha=2 * bessel**0.5)
            bias_.add_(dshift, alpha=2)
            # linear layer 1 and embedding
            torch.mm(dpre, W1_T, out=demb)
            W1.addmm_(embcat_T, dpre)
            _add_rows(C, of_value, demb_rows)
        kept = logits_kept[: len(y_chunk)]  # one cross-entropy for all of them
        losses.append(F.cross_entropy(kept, y_chunk, reduction="none").mean(1))

    W2.copy_(W2_T.T)
    gain.copy_(gain_)
    bias.copy_(bias_)
    return torch.cat(losses)


def _add_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """table[rows[i, j], j] += values[i, j], repeated rows adding up in a fixed order."""
    if table.is_cuda:  # scatter_add_ takes atomics there: another sum in every run
        table.index_put_((rows[:, 0],), values, accumulate=True)
    else:
        table.scatter_add_(0, rows, values)
