"""Device functions: activations, their derivatives, and what the interpreter does not have.

Batch norm and cross-entropy are launched with enable_fp_fusion=False, and every a * b + c rounded
once is written as one: left to the compiler, the lanes that add up a row come to different sums
(one rounds its product before the addition, its partner does not), and which is stored is a race.
"""

import triton
import triton.language as tl


@triton.jit
def plus(x, t, c: tl.constexpr):
    """x * t + c, rounded once; c, a number, is as exact as x"""
    return tl.fma(x, t, tl.full(x.shape, c, x.dtype))


@triton.jit
def exp(x):
    """exp(x); in float32 by the one instruction for 2^x, without its detour for tiny results"""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _decay(x, rate):
    """exp(-2 |x| rate)"""
    if x.dtype == tl.float64:
        return tl.exp(tl.abs(x) * (rate * -2.0))
    else:
        return tl.exp2(tl.abs(x) * (rate * -2.8853900817779268))


@triton.jit
def reciprocal(x):
    """1 / x of numbers of at least 1, 0 from 2^64 on; in float32 as (x^2)^-1/2, two instructions
    and at least as exact, where a division takes eight, most of them for other numbers"""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        return tl.rsqrt(x * x)


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap) = sign(x) * cap * (1 - e) / (1 + e), e = exp(-2|x| / cap)

    near 0 its Taylor series, as 1 - e cancels there. Where the two meet, both are good to 4 units
    in the last place. Without x / cap, which would be another division.
    """
    per_cap = 1.0 / cap
    near_0: tl.constexpr = 0.05 if x.dtype == tl.float64 else 0.3
    e = _decay(x, per_cap)
    far = cap * ((1.0 - e) * reciprocal(1.0 + e))
    u = x * per_cap
    u2 = u * u
    tail = plus(u2, tl.full(x.shape, 62.0 / 2835.0, x.dtype), -17.0 / 315.0)
    tail = plus(u2, plus(u2, tail, 2.0 / 15.0), -1.0 / 3.0)
    near = tl.fma(u2 * tail, x, x)
    return tl.where(tl.abs(u) < near_0, near, tl.where(u < 0.0, -far, far))


@triton.jit
def tanh(x):
    return soft_cap(x, 1.0)


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), with an exponent that is never positive"""
    e = exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """tanh, relu, gelu (z * Phi(z)) or silu (z * sigmoid(z)); None is the identity"""
    if ACTIVATION == "tanh":
        return tanh(z)
    elif ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
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

    1 - tanh^2 is sech^2, sech = 2 h / (1 + h^2), h = exp(-|z|): no difference, so that it keeps its
    digits where tanh is near 1, and half of tanh's instructions.
    """
    if ACTIVATION == "tanh":
        h = _decay(z, 0.5)
        sech = (h + h) * reciprocal(plus(h, h, 1.0))
        return dy * (sech * sech)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, dy)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * exp(-0.5 * z * z)
        return dy * tl.fma(z, density, 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)))
    else:
        s = _sigmoid(z)
        return dy * (s * plus(z, 1.0 - s, 1.0))


@triton.jit
def pull_back_from_output(dy, y, ACTIVATION: tl.constexpr):
    """The same from y = f(z), for tanh and relu"""
    if ACTIVATION == "tanh":
        return dy * plus(-y, y, 1.0)
    else:
        return tl.where(y <= 0.0, 0.0, dy)
