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

One program owns one model. What a step needs at once does not fit its registers: W1, W2, d and h go
to memory while they wait, 128 KB that stay in the cache, in an order that every thread reads and
writes 16 bytes at a time and finds its own numbers in (`_keep`). The embedding table, a kilobyte
that is gathered from, lives in memory, too; of W2 the two halves of a factor stay in registers, of
W1 what was just updated. A warp owns PARTS x U hidden units, so what batch norm and tanh need never
leaves a warp; one part after the other, as two at a time would need twice the registers. Only z and
demb are sums over all hidden units: there a warp owns a tile of the result, and the factors reach
it through shared memory, which turns them on the way. Every sum has a fixed order: two runs are
equal to the last bit, a model gets the same bits alone and among others, and how steps are cut into
launches does not matter. b2 is the row of W2 that belongs to a hidden unit beyond the last one,
whose h is always 1.

Products: PRECISION "fp16x3" writes each factor as the sum of two float16 numbers and takes three of
the four products, which is as exact as float32 ("tf32x3" does that with TF32, "ieee" without tensor
cores); "fp16" and "tf32" round the factors. Sums are float32 always, and all else is. From dz on
everything carries a factor SCALE that keeps small gradients clear of float16's underflow, and demb,
which becomes a factor itself, SCALE_DEMB that keeps large ones clear of its overflow, and what its
high part lacks of it LOW.
"""

# mypy: disable-error-code="assignment"
# (Tuples of a tensor for each part grow in loops that the compiler unrolls.)

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fused.kernels import tuning
from fused.kernels.device import on_its_device


@triton.jit
def _factor(x, PRECISION: tl.constexpr):
    """x as a factor of a product: (high, low), which is what high lacks of x ("fp16x3" only)"""
    if PRECISION == "fp16x3":
        high = x.to(tl.float16)
        return high, (x - high.to(tl.float32)).to(tl.float16)
    elif PRECISION == "fp16":
        high = x.to(tl.float16)
        return high, high
    else:
        return x, x


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b of two factors, but for the product of their low parts: below float32's rounding"""
    if PRECISION == "fp16x3":
        return tl.dot(a[0], b[0], tl.dot(a[0], b[1], tl.dot(a[1], b[0])))
    elif PRECISION == "fp16":
        return tl.dot(a[0], b[0])
    else:
        return tl.dot(a[0], b[0], input_precision=PRECISION)


@triton.jit
def _select_rows(onehot, high, low, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """onehot @ (high + low / LOW): a factor of zeros and ones has no low part"""
    a = onehot.to(high.dtype)
    if PRECISION == "fp16x3":
        return tl.dot(a, high, tl.dot(a, low) * (1.0 / LOW))
    elif PRECISION == "fp16":
        return tl.dot(a, high)
    else:
        return tl.dot(a, high, input_precision=PRECISION)


@triton.jit
def _transposed(x):
    return tl.trans(x[0]), tl.trans(x[1])


@triton.jit
def _for_groups(x, n_groups: tl.constexpr):
    """A factor (N, M) as (n_groups, N, M), the same for every group"""
    shape: tl.constexpr = (n_groups, x[0].shape[0], x[0].shape[1])
    return tl.broadcast_to(x[0][None], shape), tl.broadcast_to(x[1][None], shape)


@triton.jit
def _row_tiles(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x (G, U, N) with the units last, in ROWS tiles for each of COLS: (ROWS*COLS, N/ROWS, G*U)"""
    K: tl.constexpr = x.shape[0] * x.shape[1]
    N: tl.constexpr = x.shape[2] // ROWS
    x = tl.reshape(tl.permute(x, (2, 0, 1)), (ROWS, 1, N, K))
    return tl.reshape(tl.broadcast_to(x, (ROWS, COLS, N, K)), (ROWS * COLS, N, K))


@triton.jit
def _column_tiles(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x (G, U, N) in COLS tiles for each of ROWS: (ROWS*COLS, G*U, N/COLS)"""
    K: tl.constexpr = x.shape[0] * x.shape[1]
    N: tl.constexpr = x.shape[2] // COLS
    x = tl.permute(tl.reshape(x, (K, COLS, N)), (1, 0, 2))
    return tl.reshape(tl.broadcast_to(x[None], (ROWS, COLS, K, N)), (ROWS * COLS, K, N))


@triton.jit
def _sum_over_units(a, b, ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr):
    """The sum over g and u of a[g, u, :, None] * b[g, u, None, :], a tile of it by every warp"""
    N: tl.constexpr = a[0].shape[2]
    M: tl.constexpr = b[0].shape[2]
    z = _dot(
        (_row_tiles(a[0], ROWS, COLS), _row_tiles(a[1], ROWS, COLS)),
        (_column_tiles(b[0], ROWS, COLS), _column_tiles(b[1], ROWS, COLS)),
        PRECISION,
    )  # (ROWS*COLS, N/ROWS, M/COLS)
    z = tl.permute(tl.reshape(z, (ROWS, COLS, N // ROWS, M // COLS)), (0, 2, 1, 3))
    return tl.reshape(z, (N, M))


@triton.jit
def _tiles(ptr, TILES: tl.constexpr, SIZE: tl.constexpr):
    """Addresses of tiles, which the compiler is to see as one address and constants: of a sum of
    offsets it makes another for the last tile, which takes registers.
    """
    within = tl.arange(0, SIZE)[None, :]
    return (ptr + within) + tl.arange(0, TILES)[:, None] * SIZE


@triton.jit
def _keep(ptr, x, LANES: tl.constexpr):
    """Writes x (G, 16, N) in the order in which the tensor cores' results lie in registers: of a
    tile of 16 rows 4 numbers of each thread, so that they go to memory and back 16 bytes at a time
    """
    G: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = LANES // 4  # of a tile
    TILES: tl.constexpr = x.shape[2] // COLS
    if LANES == 32:
        x = tl.permute(tl.reshape(x, (G, 2, 8, TILES, 4, 2)), (3, 0, 2, 4, 1, 5))
    else:
        x = tl.permute(tl.reshape(x, (G, 16, TILES, 4, 4)), (2, 0, 3, 1, 4))
    tl.store(_tiles(ptr, TILES, G * 16 * COLS), tl.reshape(x, (TILES, G * 16 * COLS)))


@triton.jit
def _kept(ptr, G: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr):
    """What `_keep` wrote, (G, 16, N)"""
    COLS: tl.constexpr = LANES // 4
    TILES: tl.constexpr = N // COLS
    x = tl.load(_tiles(ptr, TILES, G * 16 * COLS))
    if LANES == 32:
        x = tl.permute(tl.reshape(x, (TILES, G, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    else:
        x = tl.permute(tl.reshape(x, (TILES, G, 4, 16, 4)), (1, 3, 0, 2, 4))
    return tl.reshape(x, (G, 16, N))


# lr may be a part of a tensor, which begins anywhere.
@triton.jit(do_not_specialize=["n_steps", "n_streams"], do_not_specialize_on_alignment=["lr_ptr"])
def _mlp_train_kernel(
    C_ptr,  # in and out, as all parameters: shape (n_models, V, E)
    kept_ptr,  # as `_keep` orders it, of each model W1, W2 with b2, (gain, bias), scratch for d, h
    words_ptr,  # minibatches, shape (n_streams, n_steps, B): T characters and the target in a word
    lr_ptr,  # (n_models,)
    loss_ptr,  # out: loss of each example, shape (n_models, n_steps, B)
    demb_ptr,  # scratch, (n_models, 2, BLOCK_B, BLOCK_F): demb as a factor
    n_steps,
    n_streams,
    eps: tl.float32,
    T: tl.constexpr,
    E: tl.constexpr,
    V: tl.constexpr,
    B: tl.constexpr,
    LANES: tl.constexpr,  # of a warp
    BITS: tl.constexpr,  # of a character in a word
    PARTS: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,  # tiles of the sums over all units: of the batch,
    COLS_V: tl.constexpr,  # of the classes,
    COLS_F: tl.constexpr,  # and of the features
    PRECISION: tl.constexpr,
):
    """The step above, n_steps times, of the model that the program's number says."""
    F: tl.constexpr = T * E
    SCALE: tl.constexpr = 256.0
    # Of one context in the whole minibatch rstd is eps^-1/2, and demb beyond float16's numbers.
    SCALE_DEMB: tl.constexpr = 1.0 / 4096.0
    LOW: tl.constexpr = 2048.0  # of what float16 lacks of it, which is 2^-11 of it
    CHARACTER: tl.constexpr = (1 << BITS) - 1
    TWICE_LOG2_E: tl.constexpr = 2.8853900817779268
    model = tl.program_id(0).to(tl.int64)
    C_ptr += model * (V * E)
    UNITS: tl.constexpr = G * U  # of a part
    COLS: tl.constexpr = LANES // 4  # of a tile: gain and bias take one, (gain, bias, gain, ...)
    # From one address with offsets that are constants: addresses take registers, too.
    W1_ptr = kept_ptr + model * (PARTS * UNITS * (BLOCK_F + BLOCK_V + COLS + 2 * BLOCK_B))
    W2_ptr = W1_ptr + PARTS * UNITS * BLOCK_F
    affine_ptr = W2_ptr + PARTS * UNITS * BLOCK_V
    d_ptr = affine_ptr + PARTS * UNITS * COLS
    h_ptr = d_ptr + PARTS * UNITS * BLOCK_B
    words_ptr += (model % n_streams) * n_steps * B
    loss_ptr += model * n_steps * B
    high_ptr = demb_ptr + model * (2 * BLOCK_B * BLOCK_F)
    low_ptr = high_ptr + BLOCK_B * BLOCK_F

    b = tl.arange(0, BLOCK_B)
    f = tl.arange(0, BLOCK_F)
    v = tl.arange(0, BLOCK_V)
    e = tl.arange(0, BLOCK_E)
    col = tl.arange(0, COLS)[None, None, :]
    b_mask, v_mask = b < B, v < V

    W1, W2, gain, bias = (), (), (), ()  # of every part
    for part in tl.static_range(PARTS):
        W1 += (_kept(W1_ptr + part * UNITS * BLOCK_F, G, BLOCK_F, LANES),)  # (G, U, F)
        W2_part = _kept(W2_ptr + part * UNITS * BLOCK_V, G, BLOCK_V, LANES)  # (G, U, V)
        W2 += (_factor(W2_part, PRECISION),)
        affine = _kept(affine_ptr + part * UNITS * COLS, G, COLS, LANES)  # (G, U, COLS)
        gain += (tl.sum(tl.where(col == 0, affine, 0.0), axis=2, keep_dims=True),)  # (G, U, 1)
        bias += (tl.sum(tl.where(col == 1, affine, 0.0), axis=2, keep_dims=True),)
    rate = -tl.load(lr_ptr + model) / (B * SCALE)

    C_at = C_ptr + v[:, None] * E + e[None, :]
    C_mask = v_mask[:, None] & (e < E)[None, :]
    emb_mask = (f < F)[:, None] & b_mask[None, :]
    emb_shift, emb_col = (f // E * BITS)[:, None], (f % E)[:, None]
    demb_at = b[:, None] * BLOCK_F + f[None, :]
    # demb again, a row for each position of each example: row r is example r % B, position r // B.
    r = tl.arange(0, BLOCK_T * BLOCK_B)
    position, example = r // BLOCK_B, r % BLOCK_B
    r_mask = (position < T) & (example < B)
    rows_at = (example * BLOCK_F + position * E)[:, None] + e[None, :]  # (T*B, E)
    rows_mask = r_mask[:, None] & (e < E)[None, :]

    word = tl.load(words_ptr + b, mask=b_mask & (b < n_steps * B), other=0)
    done = 0  # examples; added to loss_ptr it would take 64 bits a thread instead of 32
    for step in range(n_steps):
        # A step ahead: from memory it takes a good part of a step.
        more = b_mask & (b < (n_steps - 1 - step) * B)
        ahead = tl.load(words_ptr + B + b, mask=more, other=0)
        # Hidden units are rows and examples columns: their sums over the batch stay in a warp.
        x = (word[None, :] >> emb_shift) & CHARACTER
        emb = tl.load(C_ptr + (emb_col + x * E), mask=emb_mask & (x < V), other=0.0)  # (F, B)
        emb = tl.where(emb_mask, emb - tl.sum(emb, axis=1, keep_dims=True) / B, 0.0)
        emb = _factor(emb, PRECISION)
        z = tl.zeros((BLOCK_B, BLOCK_V), dtype=tl.float32)
        rstd, h_factor = (), ()
        for part in tl.static_range(PARTS):
            d = _dot(_factor(W1[part], PRECISION), _for_groups(emb, G), PRECISION)  # (G, U, B)
            _keep(d_ptr + part * UNITS * BLOCK_B, d, LANES)
            var = tl.sum(d * d, axis=2, keep_dims=True) / (B - 1)
            rstd += (tl.rsqrt(var + eps),)
            # tanh(a) = 1 - 2 / (exp(2a) + 1)
            slope = gain[part] * TWICE_LOG2_E * rstd[part]
            root = tl.rsqrt(tl.exp2(slope * d + bias[part] * TWICE_LOG2_E) + 1.0)
            h = 1.0 - 2.0 * (root * root)
            _keep(h_ptr + part * UNITS * BLOCK_B, h, LANES)
            h_factor += (_factor(h, PRECISION),)
            z += _sum_over_units(h_factor[part], W2[part], ROWS, COLS_V, PRECISION)

        z = tl.where(v_mask[None, :], z, float("-inf"))  # (B, V)
        y = tl.load(words_ptr + b, mask=b_mask, other=0) >> (T * BITS)
        hit = (y[:, None] == v[None, :]) & v_mask[None, :]
        z -= tl.max(z, axis=1, keep_dims=True)
        p = tl.exp(z)
        s = tl.sum(p, axis=1, keep_dims=True)
        # At b + v - y with v == y: at b, by addresses that run along v as the values do.
        loss_at = loss_ptr + (done + b[:, None] + (v[None, :] - y[:, None]))
        tl.store(loss_at, tl.log(s) - z, mask=hit & b_mask[:, None])
        dz = tl.where(b_mask[:, None], (p / s - hit.to(tl.float32)) * SCALE, 0.0)
        dz = _factor(dz, PRECISION)

        # What needs one layout of a shared factor comes together: it is then read once.
        tl.debug_barrier()
        dy, q, scale = (), (), ()
        for part in tl.static_range(PARTS):
            dh = _dot(W2[part], _for_groups(_transposed(dz), G), PRECISION)  # (G, U, B)
            h = _kept(h_ptr + part * UNITS * BLOCK_B, G, BLOCK_B, LANES)
            dy += ((1.0 - h * h) * dh,)
        new_gain, new_bias = (), ()
        for part in tl.static_range(PARTS):
            d = _kept(d_ptr + part * UNITS * BLOCK_B, G, BLOCK_B, LANES)
            dbias = tl.sum(dy[part], axis=2, keep_dims=True)  # (G, U, 1)
            dgain = tl.sum(dy[part] * d, axis=2, keep_dims=True) * rstd[part]
            q_part = dy[part] - dbias / B - d * (rstd[part] * dgain / (B - 1))
            q += (_factor(q_part, PRECISION),)
            scale += (gain[part] * rstd[part],)
            new_gain += (gain[part] + rate * dgain,)
            new_bias += (bias[part] + rate * dbias,)
        gain, bias = new_gain, new_bias
        W2 = ()
        for part in tl.static_range(PARTS):
            dW2 = _dot(h_factor[part], _for_groups(dz, G), PRECISION)
            W2_part = _kept(W2_ptr + part * UNITS * BLOCK_V, G, BLOCK_V, LANES) + rate * dW2
            _keep(W2_ptr + part * UNITS * BLOCK_V, W2_part, LANES)
            W2 += (_factor(W2_part, PRECISION),)
        W1 = ()
        demb = tl.zeros((BLOCK_B, BLOCK_F), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            W1 += (_kept(W1_ptr + part * UNITS * BLOCK_F, G, BLOCK_F, LANES),)
            W1_factor = _factor(W1[part] * scale[part], PRECISION)
            demb += SCALE_DEMB * _sum_over_units(q[part], W1_factor, ROWS, COLS_F, PRECISION)
        new_W1 = ()
        for part in tl.static_range(PARTS):
            dW1 = _dot(q[part], _for_groups(_transposed(emb), G), PRECISION)
            new_W1 += (W1[part] + (rate * scale[part]) * dW1,)
            _keep(W1_ptr + part * UNITS * BLOCK_F, new_W1[part], LANES)
        W1 = new_W1

        high = demb.to(high_ptr.dtype.element_ty)
        tl.store(high_ptr + demb_at, high)
        if PRECISION == "fp16x3":
            low = (demb - high.to(tl.float32)) * LOW
            tl.store(low_ptr + demb_at, low.to(tl.float16))
        tl.debug_barrier()
        rows_high = tl.load(high_ptr + rows_at, mask=rows_mask, other=0.0)  # (T*B, E)
        rows_low = tl.load(low_ptr + rows_at, mask=rows_mask, other=0.0)
        of_row = tl.load(words_ptr + example, mask=r_mask, other=0)
        of_row = tl.where(r_mask, (of_row >> (position * BITS)) & CHARACTER, -1)
        onehot = v[:, None] == of_row[None, :]  # (V, T*B)
        C = tl.load(C_at, mask=C_mask, other=0.0)  # (V, E)
        C += (rate / SCALE_DEMB) * _select_rows(onehot, rows_high, rows_low, LOW, PRECISION)
        tl.store(C_at, C, mask=C_mask)
        tl.debug_barrier()
        word = ahead
        words_ptr += B
        done += B

    for part in tl.static_range(PARTS):
        affine = tl.where(col % 2 == 0, gain[part], bias[part])
        _keep(affine_ptr + part * UNITS * COLS, affine, LANES)


def plan(C: torch.Tensor, W1: torch.Tensor, n_context: int, n_batch: int) -> tuning.MLPTrainPlan:
    """How a program holds such a model on C's device; ValueError where it cannot."""
    memory = 232448 if _lanes() == 32 else 65536  # H100 or MI300, where there is no device to ask
    if not tuning.has_matrix_units(C.device):
        raise ValueError(
            "one multiprocessor trains a network by tensor cores of compute capability 8.0 or "
            "later, or the matrix cores of AMD's MI100 or later, which this GPU does not have; use "
            "'graph'"
        )
    if C.is_cuda:
        properties = triton.runtime.driver.active.utils.get_device_properties(C.device.index)
        memory = properties["max_shared_mem"]
    E, H, V = C.shape[-1], W1.shape[-1], C.shape[-2]
    return tuning.mlp_train(n_context, E, H, V, n_batch, memory, _lanes())


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
    precision: str = tuning.MLP_TRAIN_PRECISION,
) -> torch.Tensor:
    """K steps of M models. Updates the parameters; returns the mean loss of each step, (M, K).

    Takes contiguous float32 parameters C (M, V, E), W1 (M, T*E, H), W2 (M, H, V), b2 (M, V),
    gain and bias (M, H); the examples x (N, T) and y (N,); the rows of them that are minibatches,
    index (S, K, B); and lr (M,). Model m takes the minibatches index[m % S] and steps by lr[m].
    Raises ValueError where one program cannot hold the model, and for 2**31 examples or more.

    Bytes: x and y are read and written as N words of 4 bytes (8 where T+1 characters need more than
    31 bits); of each step and stream index is read, 8*B bytes, and the B words that the minibatch
    gathers are written, and read once by each of its models; of each step and model 4*B bytes of
    losses are written twice and read once; the parameters are read and written a few times a call,
    to pad and to order them. The least is a read of the minibatches and a write of M*K losses
    beside the parameters. In every step one multiprocessor writes and reads, at the default sizes,
    128 KB of W1, W2, d and h, and 5 KB of C and demb: they stay in the cache. Launches: 3*T + 2 to
    pack, 1 to gather, 1 to fill, about 20 to order the parameters and back, 1 to train, 1 for the
    means.
    """
    n_models, V, E = C.shape
    n_streams, n_steps, B = index.shape
    T, H = x.shape[1], W1.shape[2]
    assert n_models % n_streams == 0 and W1.shape[1] == T * E
    if n_steps * B >= 2**31:
        raise ValueError(
            f"one launch numbers up to 2147483647 examples of minibatches, got {n_steps} steps of "
            f"{B}; take the steps in several calls"
        )
    p = plan(C, W1, T, B)
    words = _pack(x, y, p.bits)[index]  # (S, K, B)
    losses = C.new_full((n_models, n_steps, B), float("nan"))  # stays of a target out of range
    dtype = torch.float16 if precision.startswith("fp16") else torch.float32
    demb = torch.empty(n_models, 2, p.BLOCK_B, p.BLOCK_F, dtype=dtype, device=C.device)
    units = p.groups * p.parts * p.units
    d_h = C.new_empty(n_models, 2 * units * p.BLOCK_B)
    W1_kept = _in_order(W1.transpose(1, 2), p, p.BLOCK_F)
    W2_kept = _in_order(torch.cat((W2, b2.unsqueeze(1)), 1), p, p.BLOCK_V)
    affine = F.pad(torch.stack((gain, bias), 2), (0, 0, 0, 1))
    affine[:, H, 1] = 20.0  # tanh(20) is 1
    affine_kept = _in_order(affine, p, _lanes() // 4)
    sizes = W1_kept.shape[1], W2_kept.shape[1], affine_kept.shape[1], d_h.shape[1]
    kept = torch.cat((W1_kept, W2_kept, affine_kept, d_h), 1)
    _mlp_train_kernel[(n_models,)](
        C, kept, words, lr, losses, demb, n_steps, n_streams, eps,
        T=T, E=E, V=V, B=B, LANES=_lanes(), BITS=p.bits, PARTS=p.parts, G=p.groups, U=p.units,
        BLOCK_B=p.BLOCK_B, BLOCK_F=p.BLOCK_F, BLOCK_V=p.BLOCK_V, BLOCK_E=p.BLOCK_E,
        BLOCK_T=p.BLOCK_T, ROWS=p.rows, COLS_V=p.columns(p.BLOCK_V), COLS_F=p.columns(p.BLOCK_F),
        PRECISION=precision, num_warps=p.num_warps, num_stages=1,
        enable_fp_fusion=True, **p.options,
    )  # fmt: skip
    W1_kept, W2_kept, affine_kept, _ = kept.split(sizes, 1)
    W1.copy_(_out_of_order(W1_kept, p)[:, :H, : T * E].transpose(1, 2))
    W2_b2 = _out_of_order(W2_kept, p)
    W2.copy_(W2_b2[:, :H, :V])
    b2.copy_(W2_b2[:, H, :V])
    affine = _out_of_order(affine_kept, p)
    gain.copy_(affine[:, :H, 0])
    bias.copy_(affine[:, :H, 1])
    return losses.mean(2)


def _lanes() -> int:
    return 64 if torch.version.hip else 32


def _in_order(x: torch.Tensor, p: tuning.MLPTrainPlan, n: int) -> torch.Tensor:
    """x (M, H, N) padded to all units and n columns, as the kernel's `_keep` orders each part"""
    x = F.pad(x, (0, n - x.shape[2], 0, p.groups * p.parts * p.units - x.shape[1]))
    if _lanes() == 32:
        x = x.view(-1, p.groups, p.parts, 2, 8, n // 8, 4, 2).permute(0, 2, 5, 1, 4, 6, 3, 7)
    else:
        x = x.view(-1, p.groups, p.parts, 16, n // 16, 4, 4).permute(0, 2, 4, 1, 5, 3, 6)
    return x.flatten(1)


def _out_of_order(x: torch.Tensor, p: tuning.MLPTrainPlan) -> torch.Tensor:
    """(M, units, n) of what `_in_order` made"""
    units = p.groups * p.parts * p.units
    if _lanes() == 32:
        x = x.view(len(x), p.parts, -1, p.groups, 8, 4, 2, 2).permute(0, 3, 1, 6, 4, 2, 5, 7)
    else:
        x = x.view(len(x), p.parts, -1, p.groups, 4, 16, 4).permute(0, 3, 1, 5, 2, 4, 6)
    return x.reshape(len(x), units, -1)


def _pack(x: torch.Tensor, y: torch.Tensor, bits: int) -> torch.Tensor:
    """x (N, T) and y (N,) as words (N,): T characters from the lowest bits up, then the target."""
    T = x.shape[1]
    dtype = torch.int32 if (T + 1) * bits <= 31 else torch.int64
    words = y.to(dtype) << (T * bits)
    for j in range(T):
        words |= x[:, j].to(dtype) << (j * bits)
    return words
