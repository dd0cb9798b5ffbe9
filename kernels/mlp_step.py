"""Steps of training the embedding MLP in four launches each, for networks of any size.

The mathematics are those of mlp_train.py, whose kernel keeps a network on one multiprocessor. Here
a program owns a block of hidden units and all examples of a minibatch, because batch norm's sums
run over the examples of one unit; or a few examples; or one character:

    hidden    a block of units    pre = C[x] @ W1    xhat, rstd    h = tanh(...)
    logits    a few examples      z = h @ W2 + b2    loss    dz = softmax(z) - onehot(y)
    backward  a block of units    dy = (1 - h^2) * (dz @ W2^T)    dW2, dgain, dbias, dW1
                                  its part of demb = q @ (gain * rstd * W1)^T
    table     a character         dC from its rows of demb, summed over parts    db2
              (256 numbers of it)

and whoever has a gradient updates the parameter. Every number has one program that adds it up in a
fixed order: two runs are equal to the last bit. All loops go over blocks, so only the memory limits
the sizes. The grid's second axis is the model. Products and SCALE are those of mlp_train.py.

The steps of a chunk are captured in one CUDA graph: by itself a step is over before the CPU has
handed out the next one's launches.
"""

import torch
import triton
import triton.language as tl

from fused.kernels import tuning
from fused.kernels.device import on_its_device
from fused.kernels.mlp_train import _dot, _factor

_SCALE = tl.constexpr(256.0)
# One binary for every step, wherever in its chunk the minibatch begins, and for any number of
# models: none is left to be compiled while capturing, and all add up in the same order.
_step_kernel = triton.jit(
    do_not_specialize=["n_streams"],
    do_not_specialize_on_alignment=["x_ptr", "y_ptr", "loss_ptr", "lr_ptr"],
)


@triton.jit
def _embeddings(C_ptr, x_ptr, b, f, B, T: tl.constexpr, E: tl.constexpr, V: tl.constexpr):
    """C[x] of examples b and features f, (b, f); 0 beyond the last, and of no character"""
    mask = (b < B)[:, None] & (f < T * E)[None, :]
    x = tl.load(x_ptr + b[:, None] * T + (f // E)[None, :], mask=mask, other=-1)
    return tl.load(C_ptr + x * E + (f % E)[None, :], mask=mask & (x >= 0) & (x < V), other=0.0)


@_step_kernel
def _mlp_hidden_kernel(
    C_ptr,  # (n_models, V, E)
    W1_ptr,  # (n_models, T*E, H)
    gain_ptr,  # (n_models, H)
    bias_ptr,  # (n_models, H)
    x_ptr,  # (n_streams, n_chunk, B, T)
    xhat_ptr,  # out, (n_models, B, H)
    h_ptr,  # out, (n_models, B, H)
    rstd_ptr,  # out, (n_models, H)
    n_streams,
    stride_stream,
    eps: tl.float32,
    T: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """xhat = (pre - mean) * rstd and h = tanh(gain * xhat + bias) of pre = C[x] @ W1"""
    F: tl.constexpr = T * E
    model = tl.program_id(1).to(tl.int64)
    C_ptr += model * (V * E)
    W1_ptr += model * (F * H)
    x_ptr += (model % n_streams) * stride_stream
    xhat_ptr += model * (B * H)
    h_ptr += model * (B * H)
    unit = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = unit < H
    mean = tl.zeros((BLOCK_H,), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        pre = tl.zeros((BLOCK_B, BLOCK_H), dtype=tl.float32)
        for f0 in range(0, F, BLOCK_K):
            f = f0 + tl.arange(0, BLOCK_K)
            emb = _embeddings(C_ptr, x_ptr, b, f, B, T, E, V)
            W1_mask = (f < F)[:, None] & mask[None, :]
            W1 = tl.load(W1_ptr + f[:, None] * H + unit[None, :], mask=W1_mask, other=0.0)
            pre += _dot(_factor(emb, PRECISION), _factor(W1, PRECISION), PRECISION)
        at = b[:, None] * H + unit[None, :]
        tl.store(xhat_ptr + at, pre, mask=(b < B)[:, None] & mask[None, :])
        # Chan's merge of these examples' mean and squares with those of the ones before.
        count = tl.minimum(B - b0, BLOCK_B)
        block_mean = tl.sum(pre, axis=0) / count
        centred = tl.where((b < B)[:, None], pre - block_mean[None, :], 0.0)
        delta = block_mean - mean
        m2 += tl.sum(centred * centred, axis=0) + delta * delta * (b0 * count / (b0 + count))
        mean += delta * (count / (b0 + count))
    rstd = tl.rsqrt(m2 / (B - 1) + eps)
    tl.store(rstd_ptr + model * H + unit, rstd, mask=mask)
    gain = tl.load(gain_ptr + model * H + unit, mask=mask, other=0.0)
    bias = tl.load(bias_ptr + model * H + unit, mask=mask, other=0.0)
    tl.debug_barrier()
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        at = b[:, None] * H + unit[None, :]
        at_mask = (b < B)[:, None] & mask[None, :]
        xhat = (tl.load(xhat_ptr + at, mask=at_mask, other=0.0) - mean[None, :]) * rstd[None, :]
        h = 1.0 - 2.0 / (tl.exp(2.0 * (gain[None, :] * xhat + bias[None, :])) + 1.0)  # tanh
        tl.store(xhat_ptr + at, xhat, mask=at_mask)
        tl.store(h_ptr + at, h, mask=at_mask)


@_step_kernel
def _mlp_logits_kernel(
    W2_ptr,  # (n_models, H, V)
    b2_ptr,  # (n_models, V)
    h_ptr,  # (n_models, B, H)
    y_ptr,  # (n_streams, n_chunk, B)
    loss_ptr,  # out: of each example, (n_models, n_chunk, B)
    dz_ptr,  # out, (n_models, B, V)
    n_streams,
    stride_stream,
    stride_loss,
    H: tl.constexpr,
    V: tl.constexpr,
    B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z = h @ W2 + b2, loss = lse(z) - z[y], dz = SCALE * (softmax(z) - onehot(y))"""
    model = tl.program_id(1).to(tl.int64)
    W2_ptr += model * (H * V)
    h_ptr += model * (B * H)
    dz_ptr += model * (B * V)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    b_mask = b < B
    y = tl.load(y_ptr + (model % n_streams) * stride_stream + b, mask=b_mask, other=-1)
    top = tl.full((BLOCK_B,), float("-inf"), dtype=tl.float32)
    s = tl.zeros((BLOCK_B,), dtype=tl.float32)
    z_y = tl.full((BLOCK_B,), float("nan"), dtype=tl.float32)  # stays of a target out of range
    for v0 in range(0, V, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        v_mask = v < V
        z = tl.zeros((BLOCK_B, BLOCK_V), dtype=tl.float32)
        for k0 in range(0, H, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            h_mask, W2_mask = b_mask[:, None] & (k < H)[None, :], (k < H)[:, None] & v_mask[None, :]
            h = tl.load(h_ptr + b[:, None] * H + k[None, :], mask=h_mask, other=0.0)
            W2 = tl.load(W2_ptr + k[:, None] * V + v[None, :], mask=W2_mask, other=0.0)
            z += _dot(_factor(h, PRECISION), _factor(W2, PRECISION), PRECISION)
        z += tl.load(b2_ptr + model * V + v, mask=v_mask, other=0.0)[None, :]
        tl.store(dz_ptr + b[:, None] * V + v[None, :], z, mask=b_mask[:, None] & v_mask[None, :])
        hit = (y[:, None] == v[None, :]) & v_mask[None, :]
        in_block = (y >= v0) & (y < tl.minimum(v0 + BLOCK_V, V))
        z_y = tl.where(in_block, tl.sum(tl.where(hit, z, 0.0), axis=1), z_y)
        z = tl.where(v_mask[None, :], z, float("-inf"))
        # A logit of inf makes NaN, here as in torch.
        new_top = tl.maximum(top, tl.max(z, axis=1))
        s = s * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), axis=1)
        top = new_top
    tl.store(loss_ptr + model * stride_loss + b, tl.log(s) + (top - z_y), mask=b_mask)
    tl.debug_barrier()
    for v0 in range(0, V, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        mask = b_mask[:, None] & (v < V)[None, :]
        at = dz_ptr + b[:, None] * V + v[None, :]
        p = tl.exp(tl.load(at, mask=mask, other=0.0) - top[:, None]) / s[:, None]
        dz = (p - (y[:, None] == v[None, :]).to(tl.float32)) * _SCALE
        tl.store(at, dz, mask=mask)


@_step_kernel
def _mlp_backward_kernel(
    C_ptr,  # (n_models, V, E)
    W1_ptr,  # in and out, (n_models, T*E, H)
    W2_ptr,  # in and out, (n_models, H, V)
    gain_ptr,  # in and out, (n_models, H)
    bias_ptr,  # in and out, (n_models, H)
    x_ptr,  # (n_streams, n_chunk, B, T)
    xhat_ptr,  # (n_models, B, H)
    h_ptr,  # (n_models, B, H)
    rstd_ptr,  # (n_models, H)
    dz_ptr,  # (n_models, B, V)
    dy_ptr,  # out, (n_models, B, H); nothing else reads it
    demb_ptr,  # out, (n_models, blocks of hidden units, B, T*E)
    lr_ptr,  # (n_models,)
    n_streams,
    stride_stream,
    T: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block of hidden units, and the updates of all that is theirs alone"""
    F: tl.constexpr = T * E
    model = tl.program_id(1).to(tl.int64)
    C_ptr += model * (V * E)
    W1_ptr += model * (F * H)
    W2_ptr += model * (H * V)
    x_ptr += (model % n_streams) * stride_stream
    xhat_ptr += model * (B * H)
    h_ptr += model * (B * H)
    dz_ptr += model * (B * V)
    dy_ptr += model * (B * H)
    demb_ptr += (model * tl.num_programs(0) + tl.program_id(0)) * (B * F)
    unit = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = unit < H

    dbias = tl.zeros((BLOCK_H,), dtype=tl.float32)
    dgain = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        dh = tl.zeros((BLOCK_B, BLOCK_H), dtype=tl.float32)
        for v0 in range(0, V, BLOCK_K):
            v = v0 + tl.arange(0, BLOCK_K)
            dz_mask, W2_mask = (b < B)[:, None] & (v < V)[None, :], (v < V)[:, None] & mask[None, :]
            dz = tl.load(dz_ptr + b[:, None] * V + v[None, :], mask=dz_mask, other=0.0)
            W2 = tl.load(W2_ptr + unit[None, :] * V + v[:, None], mask=W2_mask, other=0.0)
            dh += _dot(_factor(dz, PRECISION), _factor(W2, PRECISION), PRECISION)
        at = b[:, None] * H + unit[None, :]
        at_mask = (b < B)[:, None] & mask[None, :]
        h = tl.load(h_ptr + at, mask=at_mask, other=0.0)
        dy = (1.0 - h * h) * dh
        tl.store(dy_ptr + at, dy, mask=at_mask)
        dbias += tl.sum(dy, axis=0)
        dgain += tl.sum(dy * tl.load(xhat_ptr + at, mask=at_mask, other=0.0), axis=0)
    gain = tl.load(gain_ptr + model * H + unit, mask=mask, other=0.0)
    bias = tl.load(bias_ptr + model * H + unit, mask=mask, other=0.0)
    slope = gain * tl.load(rstd_ptr + model * H + unit, mask=mask, other=0.0)
    rate = -tl.load(lr_ptr + model) / (B * _SCALE)
    tl.debug_barrier()
    tl.store(gain_ptr + model * H + unit, gain + rate * dgain, mask=mask)
    tl.store(bias_ptr + model * H + unit, bias + rate * dbias, mask=mask)

    for v0 in range(0, V, BLOCK_K):
        v = v0 + tl.arange(0, BLOCK_K)
        W2_at = W2_ptr + unit[:, None] * V + v[None, :]
        W2_mask = mask[:, None] & (v < V)[None, :]
        W2 = tl.load(W2_at, mask=W2_mask, other=0.0)
        dW2 = tl.zeros((BLOCK_H, BLOCK_K), dtype=tl.float32)
        for b0 in range(0, B, BLOCK_B):
            b = b0 + tl.arange(0, BLOCK_B)
            h_mask, dz_mask = mask[:, None] & (b < B)[None, :], (b < B)[:, None] & (v < V)[None, :]
            h = tl.load(h_ptr + b[None, :] * H + unit[:, None], mask=h_mask, other=0.0)
            dz = tl.load(dz_ptr + b[:, None] * V + v[None, :], mask=dz_mask, other=0.0)
            dW2 += _dot(_factor(h, PRECISION), _factor(dz, PRECISION), PRECISION)
        tl.store(W2_at, W2 + rate * dW2, mask=W2_mask)

    for f0 in range(0, F, BLOCK_K):
        f = f0 + tl.arange(0, BLOCK_K)
        W1_at = W1_ptr + f[:, None] * H + unit[None, :]
        W1_mask = (f < F)[:, None] & mask[None, :]
        W1 = tl.load(W1_at, mask=W1_mask, other=0.0)
        dW1 = tl.zeros((BLOCK_K, BLOCK_H), dtype=tl.float32)
        for b0 in range(0, B, BLOCK_B):
            b = b0 + tl.arange(0, BLOCK_B)
            at = b[:, None] * H + unit[None, :]
            at_mask = (b < B)[:, None] & mask[None, :]
            dy = tl.load(dy_ptr + at, mask=at_mask, other=0.0)
            xhat = tl.load(xhat_ptr + at, mask=at_mask, other=0.0)
            q = dy - dbias[None, :] / B - xhat * (dgain / (B - 1))[None, :]
            q = _factor(tl.where((b < B)[:, None], q, 0.0), PRECISION)
            demb = _dot(q, _factor(tl.trans(W1 * slope[None, :]), PRECISION), PRECISION)
            demb_mask = (b < B)[:, None] & (f < F)[None, :]
            tl.store(demb_ptr + b[:, None] * F + f[None, :], demb, mask=demb_mask)
            emb = _embeddings(C_ptr, x_ptr, b, f, B, T, E, V)
            dW1 += _dot(_factor(tl.trans(emb), PRECISION), q, PRECISION)
        tl.store(W1_at, W1 + (rate * slope)[None, :] * dW1, mask=W1_mask)


@_step_kernel
def _mlp_table_kernel(
    C_ptr,  # in and out, (n_models, V, E)
    b2_ptr,  # in and out, (n_models, V)
    x_ptr,  # (n_streams, n_chunk, B, T)
    dz_ptr,  # (n_models, B, V)
    demb_ptr,  # (n_models, n_parts, B*T, E)
    lr_ptr,  # (n_models,)
    n_parts,
    n_streams,
    stride_stream,
    T: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """C[v] += the sum of demb over its parts and the positions where v stands; b2[v] likewise"""
    v = tl.program_id(0)
    model = tl.program_id(1).to(tl.int64)
    x_ptr += (model % n_streams) * stride_stream
    demb_ptr += model * n_parts * (B * T * E)
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.arange(0, BLOCK_P)[:, None, None]
    dC = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for r0 in range(0, B * T, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        here = tl.load(x_ptr + r, mask=r < B * T, other=-1) == v
        mask = here[None, :, None] & (e < E)[None, None, :]
        at = demb_ptr + r[None, :, None] * E + e[None, None, :]
        rows = tl.zeros((BLOCK_R, BLOCK_E), dtype=tl.float32)
        for p0 in range(0, n_parts, BLOCK_P):
            p = (p0 + part).to(tl.int64)
            parts = tl.load(at + p * (B * T * E), mask=mask & (p < n_parts), other=0.0)
            rows += tl.sum(parts, axis=0)
        dC += tl.sum(rows, axis=0)
    rate = -tl.load(lr_ptr + model) / (B * _SCALE)
    C_at = C_ptr + (model * V + v) * E + e
    tl.store(C_at, tl.load(C_at, mask=e < E, other=0.0) + rate * dC, mask=e < E)
    if tl.program_id(2) == 0:
        db2 = tl.zeros((BLOCK_B,), dtype=tl.float32)
        for b0 in range(0, B, BLOCK_B):
            b = b0 + tl.arange(0, BLOCK_B)
            db2 += tl.load(dz_ptr + (model * B + b) * V + v, mask=b < B, other=0.0)
        b2_at = b2_ptr + model * V + v
        tl.store(b2_at, tl.load(b2_at) + rate * tl.sum(db2, axis=0))


class Steps:
    """All models in the loop: the minibatches of a chunk, and the launches of a step.

    Every tensor stays where it is from one chunk to the next: a CUDA graph knows addresses.
    """

    def __init__(
        self, C: torch.Tensor, W1: torch.Tensor, W2: torch.Tensor, b2: torch.Tensor,
        gain: torch.Tensor, bias: torch.Tensor, lr: torch.Tensor, eps: float,
        n_streams: int, n_batch: int, n_context: int,
    ) -> None:  # fmt: skip
        n_models, V, E = C.shape
        H = W1.shape[2]
        self.parameters, self.lr, self.eps = (C, W1, W2, b2, gain, bias), lr, eps
        self.plan = p = tuning.mlp_step(n_models, n_context, E, H, V, n_batch)
        shape = n_streams, tuning.MLP_STEP_CHUNK, n_batch
        self.x = torch.zeros(*shape, n_context, dtype=torch.int32, device=C.device)
        self.y = torch.zeros(shape, dtype=torch.int32, device=C.device)
        self.losses = C.new_zeros(n_models, tuning.MLP_STEP_CHUNK, n_batch)
        self.xhat, self.h, self.dy = (C.new_zeros(n_models, n_batch, H) for _ in range(3))
        self.rstd, self.dz = C.new_zeros(n_models, H), C.new_zeros(n_models, n_batch, V)
        self.demb = C.new_zeros(n_models, p.hidden_blocks, n_batch, n_context * E)

    def take(self, i: int) -> None:
        """Step i of the chunk: four launches."""
        C, W1, W2, b2, gain, bias = self.parameters
        n_models, V, E = C.shape
        n_streams, _, B, T = self.x.shape
        H, p = W1.shape[2], self.plan
        x, y, loss = self.x[:, i], self.y[:, i], self.losses[:, i]
        _mlp_hidden_kernel[(p.hidden_blocks, n_models)](
            C, W1, gain, bias, x, self.xhat, self.h, self.rstd, n_streams, x.stride(0), self.eps,
            T=T, E=E, H=H, V=V, B=B, BLOCK_B=p.BLOCK_B, BLOCK_H=p.BLOCK_H, BLOCK_K=p.BLOCK_K,
            PRECISION=tuning.MLP_TRAIN_PRECISION, num_warps=p.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
        _mlp_logits_kernel[(triton.cdiv(B, p.LOGITS_B), n_models)](
            W2, b2, self.h, y, loss, self.dz, n_streams, y.stride(0), loss.stride(0),
            H=H, V=V, B=B, BLOCK_B=p.LOGITS_B, BLOCK_V=p.BLOCK_V, BLOCK_K=p.LOGITS_K,
            PRECISION=tuning.MLP_TRAIN_PRECISION, num_warps=p.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
        _mlp_backward_kernel[(p.hidden_blocks, n_models)](
            C, W1, W2, gain, bias, x, self.xhat, self.h, self.rstd, self.dz, self.dy, self.demb,
            self.lr, n_streams, x.stride(0), T=T, E=E, H=H, V=V, B=B, BLOCK_B=p.BLOCK_B,
            BLOCK_H=p.BLOCK_H, BLOCK_K=p.BLOCK_K, PRECISION=tuning.MLP_TRAIN_PRECISION,
            num_warps=p.num_warps, enable_fp_fusion=False, **p.options,
        )  # fmt: skip
        _mlp_table_kernel[(V, n_models, triton.cdiv(E, p.BLOCK_E))](
            C, b2, x, self.dz, self.demb, self.lr, p.hidden_blocks, n_streams, x.stride(0),
            T=T, E=E, V=V, B=B, BLOCK_P=p.BLOCK_P, BLOCK_R=p.BLOCK_R, BLOCK_E=p.BLOCK_E,
            BLOCK_B=p.TABLE_B, num_warps=p.num_warps, enable_fp_fusion=False,
        )  # fmt: skip

    def take_all(self, steps: int) -> None:
        """The first `steps` steps of the chunk."""
        for i in range(steps):
            self.take(i)


@on_its_device
def mlp_train(
    C: torch.Tensor,
    W1: torch.Tensor,
    W2: torch.Tensor,
    b2: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    index: torch.Tensor,
    lr: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """K steps of M models, together; takes and returns what fused/kernels/mlp_train.py does.

    Steps that do not fill a chunk are launched one by one, by the same kernels; a call of no steps
    compiles them.

    Bytes of a step and model, read and written, with P blocks of hidden units: W1 and W2 are read
    twice and written once, which is one reading more than the least; h, xhat, dy, dz, of B*H or
    B*V numbers, and the parts of demb, P*B*T*E numbers, are written and read, where the least is
    none. All of it fits the L2 cache up to some thousand hidden units. 4 launches, or, for a chunk,
    one of a graph.
    """
    n_streams, n_steps, B = index.shape
    steps = Steps(C, W1, W2, b2, gain, bias, lr, eps, n_streams, B, x.shape[1])
    losses = C.new_empty(len(C), n_steps)
    if n_steps == 0:
        compile_kernels(steps)
    graph = None
    for start in range(0, n_steps, tuning.MLP_STEP_CHUNK):
        rows = index[:, start : start + tuning.MLP_STEP_CHUNK]
        count = rows.shape[1]
        steps.x[:, :count] = x[rows]
        steps.y[:, :count] = y[rows]
        if C.is_cuda and count == tuning.MLP_STEP_CHUNK:
            graph = graph or captured(steps)
            graph.replay()
        else:
            steps.take_all(count)
        losses[:, start : start + count] = steps.losses[:, :count].mean(2)
    return losses


def compile_kernels(steps: Steps) -> None:
    """As their first launch does, and loads them; the parameters stay as they are."""
    before = [tensor.clone() for tensor in steps.parameters]
    steps.take(0)
    for tensor, value in zip(steps.parameters, before, strict=True):
        tensor.copy_(value)


def captured(steps: Steps) -> torch.cuda.CUDAGraph:
    """The steps of a chunk as a graph; the parameters stay as they are."""
    compile_kernels(steps)  # which must not happen while capturing
    graph = torch.cuda.CUDAGraph()
    # PyTorch's own stream for capturing is on the device where it was first asked for. What other
    # threads do meanwhile, as one that pins memory, is no part of it.
    stream = torch.cuda.Stream(steps.lr.device)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        steps.take_all(tuning.MLP_STEP_CHUNK)
    return graph
