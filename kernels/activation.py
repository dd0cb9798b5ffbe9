"""Device functions: activations, their derivatives, and what the interpreter does not have."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh(x) = sign(x) * (1 - e) / (1 + e), e = exp(-2|x|); near 0 its Taylor series

    as 1 - e cancels there. Where the two meet, both are good to 3 units in the last place.
    """
    near_0: tl.constexpr = 0.01 if x.dtype == tl.float64 else 0.2
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    x2 = x * x
    tail = -1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))
    return tl.where(tl.abs(x) < near_0, x + x * x2 * tail, tl.where(x < 0.0, -far, far))


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), with an exponent that is never positive"""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """tanh, relu, gelu (z * Phi(z)) or silu (z * sigmoid(z)); None is the identity"""
    if ACTIVATION == "tanh":
        return tanh(z)
    elif ACTIVATION == "relu":
        return tl.where(z > 0.0, z, z * 0.0)  # z * 0 keeps a NaN
    elif ACTIVATION == "gelu":
        return z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return z * _sigmoid(z)
    else:
        return z


@triton.jit
def pull_back(dy, z, ACTIVATION: tl.constexpr):
    """dy * f'(z): dy times 1 - tanh^2, Phi(z) + z * phi(z), or s * (1 + z * (1 - s)) with s =
    sigmoid(z); behind relu dy itself or 0, whatever dy is. A NaN counts as positive, as in torch's
    """
    if ACTIVATION == "tanh":
        t = tanh(z)
        return dy * (1.0 - t * t)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, dy)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return dy * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density)
    else:
        s = _sigmoid(z)
        return dy * (s * (1.0 + z * (1.0 - s)))


@triton.jit
def pull_back_from_output(dy, y, ACTIVATION: tl.constexpr):
    """The same from y = f(z), for tanh and relu"""
    if ACTIVATION == "tanh":
        return dy * (1.0 - y * y)
    else:
        return tl.where(y <= 0.0, 0.0, dy)
