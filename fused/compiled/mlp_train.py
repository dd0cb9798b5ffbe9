"""K steps of training the embedding MLP, compiled as one loop; models side by side on threads.

The formulas are those of fused/kernels/mlp_train.py. The innermost loops all run along the hidden
units, which lie next to each other: W2 is kept transposed. Examples, classes and features are
padded to multiples of 4 with zeros that stay zeros. -lr/B enters where the loss does, so that
gradients arrive ready to be added to the parameters: those of few examples at once, those of many
are summed first, as each example's share could be too small for the parameter. float32 only.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

# Examples whose shares are added to the parameters one after the other, four at a time.
_FEW = 64

# Sums may be reordered, for the vector units: once, when compiling, so every run adds up alike.
_jit: Any = functools.partial(
    numba.njit, fastmath={"reassoc", "contract", "arcp", "nsz"}, error_model="numpy", nogil=True
)


def _compiled(function: Any) -> Any:
    try:
        return _jit(cache=True)(function)
    except RuntimeError:  # there is no folder that a cache may be written to
        return _jit()(function)


@_compiled
def _add_product(a: Any, b: Any, out: Any) -> None:
    """out (m, H) += a (m, k) @ b (k, H); m and k multiples of 4"""
    for i in range(0, a.shape[0], 2):
        out0, out1 = out[i], out[i + 1]
        for j in range(0, a.shape[1], 4):
            p0, p1, p2, p3 = a[i, j], a[i, j + 1], a[i, j + 2], a[i, j + 3]
            q0, q1, q2, q3 = a[i + 1, j], a[i + 1, j + 1], a[i + 1, j + 2], a[i + 1, j + 3]
            b0, b1, b2, b3 = b[j], b[j + 1], b[j + 2], b[j + 3]
            for h in range(out.shape[1]):
                r0, r1, r2, r3 = b0[h], b1[h], b2[h], b3[h]
                out0[h] += p0 * r0 + p1 * r1 + p2 * r2 + p3 * r3
                out1[h] += q0 * r0 + q1 * r1 + q2 * r2 + q3 * r3


@_compiled
def _products_of_rows(a: Any, b: Any, out: Any) -> None:
    """out (m, k) = a (m, H) @ b (k, H)^T; m and k multiples of 4"""
    zero = a.dtype.type(0)
    for i in range(0, a.shape[0], 2):
        p, q = a[i], a[i + 1]
        for j in range(0, b.shape[0], 4):
            b0, b1, b2, b3 = b[j], b[j + 1], b[j + 2], b[j + 3]
            p0 = p1 = p2 = p3 = q0 = q1 = q2 = q3 = zero
            for h in range(a.shape[1]):
                x, y, r0, r1, r2, r3 = p[h], q[h], b0[h], b1[h], b2[h], b3[h]
                p0 += x * r0
                p1 += x * r1
                p2 += x * r2
                p3 += x * r3
                q0 += y * r0
                q1 += y * r1
                q2 += y * r2
                q3 += y * r3
            out[i, j], out[i, j + 1], out[i, j + 2], out[i, j + 3] = p0, p1, p2, p3
            out[i + 1, j], out[i + 1, j + 1], out[i + 1, j + 2], out[i + 1, j + 3] = q0, q1, q2, q3


@_compiled
def _exp(x: Any) -> Any:
    """e^x = 2^k * e^f with |f| <= ln(2)/2, to 3e-7; vectorised, which a library's exp is not"""
    x = np.float32(-87) if x < np.float32(-87) else x  # written so that NaN stays NaN
    x = np.float32(88) if x > np.float32(88) else x
    k = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    f = x - k * np.float32(0.693147181)
    p = np.float32(1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = p * f + np.float32(c)
    return p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compiled
def _batch_norm_tanh(d: Any, gain: Any, bias: Any, n: Any, eps: Any, h: Any, rstd: Any) -> None:
    """Makes d (>= n, H) xhat, in place; writes h = tanh(gain * xhat + bias) and rstd (H,)."""
    H = d.shape[1]
    one, two = np.float32(1), np.float32(2)
    sums, squares = np.zeros(H), np.zeros(H)  # float64: there may be many examples
    for b in range(n):
        for j in range(H):
            sums[j] += d[b, j]
    mean = (sums / n).astype(np.float32)
    for b in range(n):
        for j in range(H):
            d[b, j] -= mean[j]
            squares[j] += d[b, j] * d[b, j]
    for j in range(H):
        rstd[j] = one / np.sqrt(np.float32(squares[j] / (n - 1)) + eps)
    for b in range(n):
        for j in range(H):
            d[b, j] *= rstd[j]
            h[b, j] = one - two / (_exp(two * (gain[j] * d[b, j] + bias[j])) + one)


@_compiled
def _batch_norm_tanh_backward(
    dh: Any, h: Any, xhat: Any, gain: Any, bias: Any, n: Any, rstd: Any
) -> None:
    """Makes dh the gradient of batch norm's input, in place; updates gain and bias."""
    H = dh.shape[1]
    one = np.float32(1)
    sums, products, slope = np.zeros(H), np.zeros(H), gain * rstd
    for b in range(n):
        for j in range(H):
            dh[b, j] *= one - h[b, j] * h[b, j]
            sums[j] += dh[b, j]
            products[j] += dh[b, j] * xhat[b, j]
    dgain, dbias = products.astype(np.float32), sums.astype(np.float32)
    gain += dgain
    bias += dbias
    dgain *= one / np.float32(n - 1)
    dbias *= one / np.float32(n)
    for b in range(n):
        for j in range(H):
            dh[b, j] = slope[j] * (dh[b, j] - dbias[j] - xhat[b, j] * dgain[j])


@_compiled
def _cross_entropy(z: Any, b2: Any, y: Any, rate: Any, n: Any) -> Any:
    """Makes z (>= n, >= V) rate * (softmax(z + b2) - onehot(y)); returns the mean loss."""
    V = len(b2)
    total = 0.0
    for b in range(n):
        largest = np.float32(-np.inf)
        for v in range(V):
            z[b, v] += b2[v]
            largest = max(largest, z[b, v])
        z_y = z[b, y[b]]
        s = np.float32(0)
        for v in range(V):
            z[b, v] = _exp(z[b, v] - largest)
            s += z[b, v]
        total += math.log(s) - (z_y - largest)
        for v in range(V):
            z[b, v] *= rate / s
        z[b, y[b]] -= rate
    return total / n


@_compiled
def _in_range(x: Any, y: Any, index: Any, V: Any) -> bool:
    """Whether the loop may use index (K, B), and what it selects of x and y, as addresses."""
    for step in range(index.shape[0]):
        for row in index[step]:
            if row < 0 or row >= len(y) or y[row] < 0 or y[row] >= V:
                return False
            for character in x[row]:
                if character < 0 or character >= V:
                    return False
    return True


@_compiled
def _train(
    C: Any, W1: Any, W2: Any, b2: Any, gain: Any, bias: Any, x: Any, y: Any, index: Any,
    lr: Any, eps: Any, losses: Any,
) -> None:  # fmt: skip
    """One model: index (K, B), W2 (V, H) transposed; writes losses (K,)."""
    (V, E), H, T, (steps, n) = C.shape, W1.shape[1], x.shape[1], index.shape
    rate = -lr / np.float32(n)
    rows, features, classes = n + -n % 4, T * E + -(T * E) % 4, V + -V % 4
    W1_padded = np.zeros((features, H), np.float32)
    W1_padded[: T * E] = W1
    W2_padded = np.zeros((classes, H), np.float32)
    W2_padded[:V] = W2
    emb, demb = np.zeros((rows, features), np.float32), np.zeros((rows, features), np.float32)
    z, target = np.zeros((rows, classes), np.float32), np.zeros(n, np.int64)
    h, xhat, dh = (
        np.zeros((rows, H), np.float32),
        np.zeros((rows, H), np.float32),
        np.zeros((rows, H), np.float32),
    )
    rstd = np.zeros(H, np.float32)
    # What the shares of the examples are added to: the parameters, or their sums.
    few = n <= _FEW
    dC, dW1, dW2, db2 = C, W1_padded, W2_padded, b2
    if not few:
        dC, dW1, dW2, db2 = (
            np.zeros_like(C),
            np.zeros_like(W1_padded),
            np.zeros_like(W2_padded),
            np.zeros_like(b2),
        )
    for step in range(steps):
        for b in range(n):
            row = index[step, b]
            target[b] = y[row]
            for t in range(T):
                emb[b, t * E : t * E + E] = C[x[row, t]]
        # forward
        xhat[:] = 0
        _add_product(emb, W1_padded, xhat)
        _batch_norm_tanh(xhat, gain, bias, n, eps, h, rstd)
        _products_of_rows(h, W2_padded, z)
        losses[step] = _cross_entropy(z, b2, target, rate, n)
        # backward; z is the logits' gradient now
        dh[:] = 0
        _add_product(z, W2_padded, dh)
        if not few:
            dC[:], dW1[:], dW2[:], db2[:] = 0, 0, 0, 0
        _add_product(z.T, h, dW2)
        for b in range(n):
            db2 += z[b, :V]
        _batch_norm_tanh_backward(dh, h, xhat, gain, bias, n, rstd)
        _products_of_rows(dh, W1_padded, demb)
        _add_product(emb.T, dh, dW1)
        for b in range(n):
            for t in range(T):
                dC[x[index[step, b], t]] += demb[b, t * E : t * E + E]
        if not few:
            C += dC
            W1_padded += dW1
            W2_padded += dW2
            b2 += db2
    W1[:] = W1_padded[: T * E]
    W2[:] = W2_padded[:V]


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
    """K steps of M models, on as many threads as torch takes. Updates the parameters in place.

    Returns the mean loss of each step, (M, K). Takes contiguous float32 parameters on the CPU: C
    (M, V, E), W1 (M, T*E, H), W2 (M, H, V), b2 (M, V), gain and bias (M, H); the examples x (N, T)
    and y (N,); the rows of them that are minibatches, index (S, K, B); and lr (M,). Model m takes
    the minibatches index[m % S] and steps by lr[m]. A model gets the same bits alone and among
    others.
    """
    n_models = len(C)
    losses = torch.empty(n_models, index.shape[1], dtype=torch.float32)
    W2_transposed = W2.transpose(1, 2).contiguous()
    parameters = [p.numpy() for p in (C, W1, W2_transposed, b2, gain, bias)]
    examples, minibatches = (x.numpy(), y.numpy()), index.numpy()

    if not all(_in_range(*examples, rows, C.shape[1]) for rows in minibatches):
        raise IndexError(
            f"train_mlp: a minibatch has a row not in [0, {len(y)}) or a character not in "
            f"[0, {C.shape[1]})"
        )

    def train(m: int) -> None:
        _train(
            *[p[m] for p in parameters], *examples, minibatches[m % len(minibatches)],
            np.float32(lr[m]), np.float32(eps), losses[m].numpy(),
        )  # fmt: skip

    if n_models == 1:
        train(0)
    else:
        with ThreadPoolExecutor(min(n_models, torch.get_num_threads())) as pool:
            list(pool.map(train, range(n_models)))
    W2.copy_(W2_transposed.transpose(1, 2))
    return losses
