"""K steps of training the embedding MLP in closed form: no autograd, next to no allocation.

The formulas are those of fused/kernels/mlp_train.py, with changes that make them cheap here:

    batch norm is torch's own, which divides by B: with the weight gain * sqrt((B-1)/B) and with
    eps * (B-1)/B it has Bessel's correction (docs/derivations.md);
    tanh(x) = 2 sigmoid(2x) - 1: on a CPU torch's sigmoid takes a fifth of the time of its tanh. So
    batch norm gives 2 hpreact, u = sigmoid of that, h = 2u - 1, and d(2 hpreact) = 2 u (1-u) dh;
    b2 is one more row of W2, that of a hidden unit which is always 1.

That 2, and -lr/B, enter where the loss does: gradients arrive ready to be added to the parameters.
The tensors of the loop are torch's inference tensors, whose operations cost the least.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 128  # steps whose logits are kept at a time: they stay in the cache


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
    models = zip(C, W1, W2, b2, gain, bias, losses, lr.tolist(), strict=True)
    with torch.inference_mode():
        for m, model in enumerate(models):
            rows = index[m % len(index)]
            _train(*model, x[rows].flatten(1), y[rows], eps)
    return losses


def _train(
    C: Tensor, W1: Tensor, W2: Tensor, b2: Tensor, gain: Tensor, bias: Tensor, losses: Tensor,
    lr: float, x: Tensor, y: Tensor, eps: float,
) -> None:  # fmt: skip
    """One model: contexts x (K, B*T), targets y (K, B); writes losses (K,)."""
    batch_norm = torch.ops.aten.native_batch_norm.out
    batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
    sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
    n, (V, E), (TE, H) = y.shape[1], C.shape, W1.shape
    rate, bessel = -2 * lr / n, (n - 1) / n

    # The parameters: W2 transposed, which makes its products faster by a fifth, and b2 beside it.
    table, weight1, affine = C.clone(), W1.clone(), torch.stack((gain, bias))
    weight2 = torch.cat((W2, b2.unsqueeze(0))).T.contiguous()  # (V, H + 1)
    weight1_T, weight2_h, (gain_, bias_) = weight1.T, weight2[:, :H], affine

    emb, demb = C.new_empty(x.shape[1], E), C.new_empty(n, TE)
    embcat, demb_rows = emb.view(n, TE), demb.view(-1, E)
    embcat_T = embcat.T
    pre, u, dh = (C.new_empty(n, H) for _ in range(3))
    h1 = C.new_ones(n, H + 1)  # h, and the unit that is always 1
    h, h1_T = h1[:, :H], h1.T
    probs, dlogits = C.new_empty(V, n), C.new_empty(V, n)
    dlogits_T = dlogits.T
    mean, rstd, scaled = C.new_empty(H), C.new_empty(H), C.new_empty(2, H)
    weight, shift = scaled
    factor, minus_1 = C.new_tensor([[2 * bessel**0.5], [2.0]]), C.new_tensor(-1.0)
    minus_targets, logits_kept = C.new_empty(2, min(len(y), _CHUNK), V, n)

    for x_chunk, y_chunk, losses_chunk in zip(
        x.split(_CHUNK), y.split(_CHUNK), losses.split(_CHUNK), strict=True
    ):
        minus_targets.zero_().scatter_(1, y_chunk.unsqueeze(1), -rate)
        of_values = x_chunk.unsqueeze(2).expand(-1, -1, E)  # where each value of demb goes
        for rows, of_value, minus_target, logits in zip(
            x_chunk, of_values, minus_targets, logits_kept, strict=False
        ):
            # forward
            torch.index_select(table, 0, rows, out=emb)
            torch.mm(embcat, weight1, out=pre)
            torch.mul(affine, factor, out=scaled)
            batch_norm(
                pre, weight, shift, None, None, True, 0.0, eps * bessel,
                out=u, save_mean=mean, save_invstd=rstd,
            )  # fmt: skip
            u.sigmoid_()
            torch.add(minus_1, u, alpha=2, out=h)
            torch.mm(weight2, h1_T, out=logits)
            # backward: cross-entropy and linear layer 2
            torch.softmax(logits, 0, out=probs)
            torch.add(minus_target, probs, alpha=rate, out=dlogits)
            torch.mm(dlogits_T, weight2_h, out=dh)
            weight2.addmm_(dlogits, h1, alpha=0.5)
            # tanh and batch norm; its out= form would copy all three
            sigmoid_backward(dh, u, grad_input=dh)
            dpre, dweight, dshift = batch_norm_backward(
                dh, pre, weight, None, None, mean, rstd, True, eps * bessel, [True, True, True]
            )
            gain_.add_(dweight, alpha=2 * bessel**0.5)
            bias_.add_(dshift, alpha=2)
            # linear layer 1 and embedding
            torch.mm(dpre, weight1_T, out=demb)
            weight1.addmm_(embcat_T, dpre)
            _add_rows(table, of_value, demb_rows)
        kept = logits_kept[: len(y_chunk)]  # one cross-entropy for all of them
        losses_chunk.copy_(F.cross_entropy(kept, y_chunk, reduction="none").mean(1))

    C.copy_(table)
    W1.copy_(weight1)
    W2.copy_(weight2_h.T)
    b2.copy_(weight2[:, H])
    gain.copy_(gain_)
    bias.copy_(bias_)


def _add_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """table[rows[i, j], j] += values[i, j], repeated rows adding up in a fixed order."""
    if table.is_cuda:  # scatter_add_ takes atomics there: another sum in every run
        table.index_put_((rows[:, 0],), values, accumulate=True)
    else:
        table.scatter_add_(0, rows, values)
