"""Arithmetic as PTX defines it, on arrays."""

import numpy as np

from tests.emulator.memory import Array

_TINY = np.finfo(np.float32).tiny


def to_bf16(x: Array) -> Array:
    """Rounds float32 to bfloat16's bits, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_tf32(x: Array) -> Array:
    """float32's bits, rounded to TF32's: half of its last place is added, the rest cut off."""
    return (x.view(np.uint32) + 0x1000) & 0xFFFFE000


def bytes_of(x: Array) -> Array:
    """(n, ...) as (n, bytes)"""
    size = x.itemsize * int(np.prod(x.shape[1:]))
    return np.ascontiguousarray(x).view(np.uint8).reshape(len(x), size)


def flushed(x: Array) -> Array:
    """Subnormal numbers of float32 as zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


def with_one_nan(x: Array) -> Array:
    """float32 whose NaNs have the bits that all results have which are one."""
    is_nan = np.isnan(x)
    if not is_nan.any():
        return x
    return np.where(is_nan, np.uint32(0x7FFFFFFF), x.view(np.uint32)).view(np.float32)


def divided(a: Array, b: Array) -> Array:
    """Whole numbers, towards 0."""
    b = np.where(b == 0, 1, b).astype(a.dtype)  # not defined
    if a.dtype.kind == "u":
        return a // b
    q = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -q, q).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    return (a - b * divided(a, b)).astype(a.dtype)


def shifted_left(x: Array, by: Array) -> Array:
    bits = x.dtype.itemsize * 8
    within = np.minimum(by, bits - 1).astype(x.dtype)
    return np.where(by >= bits, 0, x << within).astype(x.dtype)


def shifted_right(x: Array, by: Array) -> Array:
    """Signed numbers by their sign."""
    last = x.dtype.itemsize * 8 - 1
    if x.dtype.kind == "i":
        return x >> np.minimum(by, last).astype(x.dtype)
    return np.where(by > last, 0, x >> np.minimum(by, last).astype(x.dtype)).astype(x.dtype)


def fma(a: Array, b: Array, c: Array) -> Array:
    """Rounded through twice the precision: in all but a few ties of ties the right result.

    float64 through long double: nothing is gained where a machine's is float64.
    """
    wide = np.longdouble if a.dtype == np.float64 else np.float64
    return (a.astype(wide) * b + c).astype(a.dtype)


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the whole product."""
    whole = a.astype(object) * b.astype(object)
    return (whole >> (8 * a.dtype.itemsize)).astype(a.dtype)


def rsqrt(x: Array) -> Array:
    return (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """prmt: bytes of a and b picked by the selector's nibbles, or their signs."""
    pool = np.concatenate([bytes_of(a), bytes_of(b)], 1)
    out = np.zeros((len(pool), 4), np.uint8)
    for k in range(4):
        nibble = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = pool[np.arange(len(pool)), (nibble & 7).astype(int)]
        out[:, k] = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
    return out.view(np.uint32)[:, 0]


def field(x: Array, start: Array, length: Array) -> Array:
    """bfe: `length` bits from bit `start`; signed numbers are extended by the field's sign."""
    bits = 8 * x.dtype.itemsize
    return shifted_right(shifted_left(x, bits - start - length), bits - length)


def to_whole(x: Array, target: np.dtype) -> Array:
    """Saturated; NaN as 0."""
    info = np.iinfo(target)
    low, high = x <= float(info.min), x >= float(info.max)
    inside = np.where(low | high | np.isnan(x), 0, x).astype(target)
    return np.where(low, info.min, np.where(high, info.max, inside)).astype(target)
