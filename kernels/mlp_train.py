"""K steps of training the embedding MLP in one launch, for any number of models.

    emb  = C[x]  (B, T*E), minus its mean over the batch     d = emb @ W1          (B, H)
    rstd = (sum_b d^2 / (B-1) + eps)^-1/2    xhat = d * rstd    h = tanh(gain * xhat + bias)
    z    = h @ W2 + b2  (B, V)               loss_b = lse(z_b) - z_b[y_b]
    dz   = softmax(z) - onehot(y)            B times the gradient of the mean loss
    dh   = dz @ W2^T                         dW2 = h^T @ dz                      db2 = sum_b dz
    dy   = (1 - h^2) * dh                    dbias = sum_b dy          dgain = sum_b dy * xhat
    q    = dy - dbias/B - xhat * dgain/(B-1)                 gain * rstd * q = d loss / d (emb @ W1)
    demb = q @ (gain * rstd * W1)^T          dW1 = (emb^T @ q) * gain * rstd
    dC   = sum over positions j of onehot(x_j)^T @ demb_j
    each parameter -= lr/B * its gradient

A linear map of a centred input is centred, so it is the embedding that is centred; a bias in front
of batch norm is cancelled by it and is not here at all (docs/derivations.md).

One program owns one model. Its weights stay in registers from the first step to the last; only the
embedding table, a kilobyte that is gathered from, lives in memory. The hidden units lie in G groups
of U, a warp each, so what batch norm and tanh need never leaves a warp. Only z and demb are sums
over all hidden units: every warp writes its part to a scratch buffer that stays in the cache, and
after one barrier the parts are added up in a fixed order. So two runs are equal to the last bit, a
model gets the same bits alone and among others, and how steps are cut into launches does not
matter. b2 is the row of W2 that belongs to a hidden unit beyond the last one, whose h is always 1.

Products: PRECISION "fp16x3" writes each factor as the sum of two float16 numbers and takes three of
the four products, which is as exact as float32 ("tf32x3" does that with TF32, "ieee" without tensor
cores); "fp16" and "tf32" round the factors. Sums are float32 always, and all else is. From dz on
everything carries a factor SCALE that keeps small gradients clear of float16's underflow.
"""

import torch
import triton
import triton.language as tl

from fused.kernels import tuning


@triton.jit
def _high(x, PRECISION: tl.constexpr):
    """x as a factor of a product, rounded where PRECISION says so"""
    if PRECISION == "fp16" or PRECISION == "fp16x3":
        return x.to(tl.float16)
    else:
        return x


@triton.jit
def _low(x, high, PRECISION: tl.constexpr):
    """what `high` lacks of x (unused unless PRECISION is fp16x3)"""
    if PRECISION == "fp16x3":
        return (x - high.to(tl.float32)).to(tl.float16)
    else:
        return high


@triton.jit
def _dot(a, a_low, b, b_low, PRECISION: tl.constexpr):
    """(a + a_low) @ (b + b_low), but for a_low @ b_low, which is below float32's rounding"""
    if PRECISION == "fp16x3":
        acc = tl.dot(a_low, b)
        acc = tl.dot(a, b_low, acc)
        return tl.dot(a, b, acc)
    elif PRECISION == "fp16":
        return tl.dot(a, b)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _select_rows(onehot, b, b_low, PRECISION: tl.constexpr):
    """onehot @ (b + b_low): a factor of zeros and ones has no low part"""
    if PRECISION == "fp16x3":
        a = onehot.to(tl.float16)
        return tl.dot(a, b, tl.dot(a, b_low))
    elif PRECISION == "fp16":
        return tl.dot(onehot.to(tl.float16), b)
    else:
        return tl.dot(onehot.to(tl.float32), b, input_precision=PRECISION)


@triton.jit
def _over_groups(x, n_groups: tl.constexpr):
    """x (N, M) as (n_groups, N, M), the same for every group"""
    return tl.broadcast_to(x[None], (n_groups, x.shape[0], x.shape[1]))


@triton.jit(do_not_specialize=["n_steps", "n_streams"])
def _mlp_train_kernel(
    C_ptr,  # in and out, as all parameters: shape (n_models, V, E)
    W1_ptr,  # (n_models, T*E, H)
    W2_ptr,  # (n_models, H, V)
    b2_ptr,  # (n_models, V)
    gain_ptr,  # (n_models, H)
    bias_ptr,  # (n_models, H)
    words_ptr,  # minibatches, shape (n_streams, n_steps, B): T characters and the target in a word
    lr_ptr,  # (n_models,)
    loss_ptr,  # out: loss of each example, shape (n_models, n_steps, B)
    scratch_ptr,  # (n_models, G, BLOCK_B, BLOCK_V + BLOCK_F)
    n_steps,
    n_streams,
    eps: tl.float32,
    T: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    B: tl.constexpr,
    BITS: tl.constexpr,  # of a character in a word
    G: tl.constexpr,
    U: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The step above, n_steps times, of the model that the program's number says."""
    F: tl.constexpr = T * E
    SCALE: tl.constexpr = 256.0
    CHARACTER: tl.constexpr = (1 << BITS) - 1
    model = tl.program_id(0).to(tl.int64)
    C_ptr += model * (V * E)
    W1_ptr += model * (F * H)
    W2_ptr += model * (H * V)
    b2_ptr += model * V
    gain_ptr += model * H
    bias_ptr += model * H
    words_ptr += (model % n_streams) * n_steps * B
    loss_ptr += model * n_steps * B
    z_ptr = scratch_ptr + model * (G * BLOCK_B * (BLOCK_V + BLOCK_F))  # (G, BLOCK_B, BLOCK_V)
    demb_ptr = z_ptr + G * BLOCK_B * BLOCK_V  # (G, BLOCK_B, BLOCK_F)

    b = tl.arange(0, BLOCK_B)
    f = tl.arange(0, BLOCK_F)
    v = tl.arange(0, BLOCK_V)
    e = tl.arange(0, BLOCK_E)
    group = tl.arange(0, G)[:, None, None]
    unit = group * U + tl.arange(0, U)[None, :, None]  # (G, U, 1)
    b_mask, v_mask = b < B, v < V

    W1_at = W1_ptr + f[None, None, :] * H + unit
    W1_mask = (unit < H) & (f < F)[None, None, :]
    W1 = tl.load(W1_at, mask=W1_mask, other=0.0)  # (G, U, F)
    W2_at = W2_ptr + unit * V + v[None, None, :]
    W2_mask = (unit < H) & v_mask[None, None, :]
    b2_at = b2_ptr + v[None, None, :] + 0 * unit
    b2_mask = (unit == H) & v_mask[None, None, :]
    W2 = tl.load(W2_at, mask=W2_mask, other=0.0)  # (G, U, V)
    W2 += tl.load(b2_at, mask=b2_mask, other=0.0)
    gain = tl.load(gain_ptr + unit, mask=unit < H, other=0.0)  # (G, U, 1)
    bias = tl.load(bias_ptr + unit, mask=unit < H, other=0.0)
    bias = tl.where(unit == H, 20.0, bias)  # tanh(20) is 1
    C_at = C_ptr + v[:, None] * E + e[None, :]
    C_mask = v_mask[:, None] & (e < E)[None, :]
    C = tl.load(C_at, mask=C_mask, other=0.0)  # (V, E)
    rate = -tl.load(lr_ptr + model) / (B * SCALE)

    emb_mask = (f < F)[:, None] & b_mask[None, :]
    emb_shift, emb_col = (f // E * BITS)[:, None], (f % E)[:, None]
    z_at = z_ptr + group * (BLOCK_B * BLOCK_V) + b[None, :, None] * BLOCK_V + v[None, None, :]
    demb_at = demb_ptr + group * (BLOCK_B * BLOCK_F) + b[None, :, None] * BLOCK_F + f[None, None, :]
    # demb again, a row for each position of each example: row r is example r % B, position r // B.
    r = tl.arange(0, BLOCK_T * BLOCK_B)
    position, example = r // BLOCK_B, r % BLOCK_B
    r_mask = (position < T) & (example < B)
    rows_at = demb_ptr + (example * BLOCK_F + position * E)[:, None] + e[None, :]
    rows_at = rows_at[None] + group * (BLOCK_B * BLOCK_F)  # (G, T*B, E)
    rows_mask = (r_mask[:, None] & (e < E)[None, :])[None] & (group < G)

    word = tl.load(words_ptr + b, mask=b_mask & (b < n_steps * B), other=0)
    for step in range(n_steps):
        # A step ahead: from memory it takes a good part of a step.
        ahead = tl.load(words_ptr + B + b, mask=b_mask & (b < (n_steps - 1 - step) * B), other=0)
        # Hidden units are rows and examples columns: their sums over the batch stay in a warp.
        x = (word[None, :] >> emb_shift) & CHARACTER
        emb = tl.load(C_ptr + (emb_col + x * E), mask=emb_mask & (x < V), other=0.0)  # (F, B)
        emb = tl.where(emb_mask, emb - tl.sum(emb, axis=1, keep_dims=True) / B, 0.0)
        emb_high = _high(emb, PRECISION)
        emb_low = _low(emb, emb_high, PRECISION)
        W1_high = _high(W1, PRECISION)
        W1_low = _low(W1, W1_high, PRECISION)
        d = _dot(
            W1_high, W1_low, _over_groups(emb_high, G), _over_groups(emb_low, G), PRECISION
        )  # (G, U, B)  # fmt: skip
        rstd = tl.rsqrt(tl.sum(d * d, axis=2, keep_dims=True) / (B - 1) + eps)
        xhat = d * rstd
        h = 1.0 - 2.0 / (tl.exp(2.0 * (gain * xhat + bias)) + 1.0)  # tanh
        h_high = _high(h, PRECISION)
        h_low = _low(h, h_high, PRECISION)
        W2_high = _high(W2, PRECISION)
        W2_low = _low(W2, W2_high, PRECISION)
        z_part = _dot(
            tl.permute(h_high, (0, 2, 1)), tl.permute(h_low, (0, 2, 1)), W2_high, W2_low, PRECISION
        )  # (G, B, V)  # fmt: skip
        tl.store(z_at, z_part)
        tl.debug_barrier()

        z = tl.where(v_mask[None, :], tl.sum(tl.load(z_at), axis=0), float("-inf"))  # (B, V)
        y = tl.load(words_ptr + b, mask=b_mask, other=0) >> (T * BITS)
        hit = (y[:, None] == v[None, :]) & v_mask[None, :]
        z -= tl.max(z, axis=1, keep_dims=True)
        p = tl.exp(z)
        s = tl.sum(p, axis=1, keep_dims=True)
        # At b + v - y with v == y: at b, by addresses that run along v as the values do.
        loss_at = loss_ptr + b[:, None] + (v[None, :] - y[:, None])
        tl.store(loss_at, tl.log(s) - z, mask=hit & b_mask[:, None])
        dz = tl.where(b_mask[:, None], (p / s - hit.to(tl.float32)) * SCALE, 0.0)
        dz_high = _high(dz, PRECISION)
        dz_low = _low(dz, dz_high, PRECISION)
        dh = _dot(
            W2_high,
            W2_low,
            _over_groups(tl.trans(dz_high), G),
            _over_groups(tl.trans(dz_low), G),
            PRECISION,
        )  # (G, U, B)
        dy = (1.0 - h * h) * dh
        W2 += rate * _dot(
            h_high, h_low, _over_groups(dz_high, G), _over_groups(dz_low, G), PRECISION
        )

        dbias = tl.sum(dy, axis=2, keep_dims=True)  # (G, U, 1)
        dgain = tl.sum(dy * xhat, axis=2, keep_dims=True)
        q = dy - dbias / B - xhat * (dgain / (B - 1))
        slope = gain * rstd
        gain += rate * dgain
        bias += rate * dbias
        q_high = _high(q, PRECISION)
        q_low = _low(q, q_high, PRECISION)
        sloped = W1 * slope
        W1_high = _high(sloped, PRECISION)
        W1_low = _low(sloped, W1_high, PRECISION)
        demb_part = _dot(
            tl.permute(q_high, (0, 2, 1)), tl.permute(q_low, (0, 2, 1)), W1_high, W1_low, PRECISION
        )  # (G, B, F)  # fmt: skip
        tl.store(demb_at, demb_part)
        W1 += (rate * slope) * _dot(
            q_high,
            q_low,
            _over_groups(tl.trans(emb_high), G),
            _over_groups(tl.trans(emb_low), G),
            PRECISION,
        )
        tl.debug_barrier()

        demb = tl.sum(tl.load(rows_at, mask=rows_mask, other=0.0), axis=0)  # (T*B, E)
        demb_high = _high(demb, PRECISION)
        demb_low = _low(demb, demb_high, PRECISION)
        of_row = tl.load(words_ptr + example, mask=r_mask, other=0)
        of_row = tl.where(r_mask, (of_row >> (position * BITS)) & CHARACTER, -1)
        onehot = v[:, None] == of_row[None, :]  # (V, T*B)
        C += rate * _select_rows(onehot, demb_high, demb_low, PRECISION)
        tl.store(C_at, C, mask=C_mask)
        tl.debug_barrier()
        word = ahead
        words_ptr += B
        loss_ptr += B

    tl.store(W1_at, W1, mask=W1_mask)
    tl.store(W2_at, W2, mask=W2_mask)
    tl.store(b2_at, W2, mask=b2_mask)
    tl.store(gain_ptr + unit, gain, mask=unit < H)
    tl.store(bias_ptr + unit, bias, mask=unit < H)


def plan(C: torch.Tensor, W1: torch.Tensor, n_context: int, n_batch: int) -> tuning.MLPTrainPlan:
    """How a program holds such a model on C's device; ValueError where it cannot."""
    memory = 232448  # bytes; an H100's, where there is no device to ask
    if C.is_cuda:
        properties = triton.runtime.driver.active.utils.get_device_properties(C.device.index)
        memory = properties["max_shared_mem"]
    return tuning.mlp_train(n_context, C.shape[-1], W1.shape[-1], C.shape[-2], n_batch, memory)


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
    precision: str = tuning.MLP_TRAIN_PRECISION,
) -> torch.Tensor:
    """K steps of M models. Updates the parameters; returns the mean loss of each step, (M, K).

    Takes contiguous float32 parameters C (M, V, E), W1 (M, T*E, H), W2 (M, H, V), b2 (M, V),
    gain and bias (M, H); the examples x (N, T) and y (N,); the rows of them that are minibatches,
    index (S, K, B); and lr (M,). Model m takes the minibatches index[m % S] and steps by lr[m].
    Raises ValueError where one program cannot hold the model.

    Bytes: x and y are read and written as N words of 4 bytes (8 where T+1 characters need more than
    31 bits); of each step and stream the B words that the minibatch gathers are written, and read
    once by each of its models; of each step and model 4*B bytes of losses are written twice and
    read once; each parameter is read and written once, 8 bytes. The least is a read of the
    minibatches and a write of M*K losses beside the parameters. The scratch buffer, 64 KB a model
    at the default sizes, and the table C are written and read in every step, by one multiprocessor:
    they stay in the cache. Launches: 3*T + 2 to pack, 1 to gather, 1 to fill, 1 to train,
    1 for the means.
    """
    n_models, V, E = C.shape
    n_streams, n_steps, B = index.shape
    T, H = x.shape[1], W1.shape[2]
    assert n_models % n_streams == 0 and W1.shape[1] == T * E
    p = plan(C, W1, T, B)
    words = _pack(x, y, p.bits)[index]  # (S, K, B)
    losses = C.new_full((n_models, n_steps, B), float("nan"))  # stays of a target out of range
    scratch = torch.empty(n_models, p.scratch, dtype=torch.float32, device=C.device)
    options = {} if torch.version.hip else {"maxnreg": p.max_registers}
    _mlp_train_kernel[(n_models,)](
        C, W1, W2, b2, gain, bias, words, lr, losses, scratch, n_steps, n_streams, eps,
        T=T, E=E, H=H, V=V, B=B, BITS=p.bits, G=p.groups, U=p.units,
        BLOCK_B=p.BLOCK_B, BLOCK_F=p.BLOCK_F, BLOCK_V=p.BLOCK_V, BLOCK_E=p.BLOCK_E,
        BLOCK_T=p.BLOCK_T, PRECISION=precision, num_warps=p.num_warps, num_stages=1, **options,
    )  # fmt: skip
    return losses.mean(2)


def _pack(x: torch.Tensor, y: torch.Tensor, bits: int) -> torch.Tensor:
    """x (N, T) and y (N,) as words (N,): T characters from the lowest bits up, then the target."""
    T = x.shape[1]
    dtype = torch.int32 if (T + 1) * bits <= 31 else torch.int64
    words = y.to(dtype) << (T * bits)
    for j in range(T):
        words |= x[:, j].to(dtype) << (j * bits)
    return words
