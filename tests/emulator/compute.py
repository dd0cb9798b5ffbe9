"""Instructions from registers to registers."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tests.emulator import numeric
from tests.emulator.memory import Array
from tests.emulator.ptx import TYPES, Instruction
from tests.emulator.threads import Mask, Run, Threads

Function = Callable[..., Array]
_REAL = ("f16", "bf16", "f32", "f64")
_COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
_MOVES = ("mov", "selp", "neg", "abs", "copysign")  # which keep a NaN's bits, or all but its sign
_JOIN: dict[str, Function] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_ROUND: dict[str, Function] = {"rmi": np.floor, "rpi": np.ceil, "rni": np.rint, "rzi": np.trunc}


def _assign(t: Threads, i: Instruction, function: Function, to: str, kinds: Sequence[str]) -> Run:
    """Operand 0 = function(the others, of the types `kinds`), a number of type `to`."""
    if to not in TYPES or not all(kind in TYPES for kind in kinds):
        raise NotImplementedError(str(i))
    flush = "ftz" in i.parts
    sources = [t.source(o, TYPES[kind]) for o, kind in zip(i.operands[1:], kinds, strict=True)]

    def value_of(source: Callable[[], Array], kind: str) -> Array:
        value = source()
        if kind == "bf16":
            return numeric.from_bf16(value)
        return numeric.flushed(value) if flush and kind == "f32" else value

    def run(mask: Mask) -> None:
        value = function(*(value_of(s, kind) for s, kind in zip(sources, kinds, strict=True)))
        if to == "bf16" and value.dtype == np.float32:
            value = numeric.to_bf16(value)
        elif value.dtype == np.float32 and i.name() not in _MOVES:
            value = numeric.with_one_nan(numeric.flushed(value) if flush else value)
        t.put(i.operands[0], value, mask)

    return run


def _plain(function: Function, t: Threads, i: Instruction) -> Run:
    """All operands are of the instruction's type."""
    return _assign(t, i, function, i.kind(), [i.kind()] * (len(i.operands) - 1))


def _shift(function: Function, t: Threads, i: Instruction) -> Run:
    return _assign(t, i, function, i.kind(), [i.kind(), "u32"])


def _product(t: Threads, i: Instruction) -> Run:
    """mul, mad: as wide as the factors, twice as wide, or the upper half."""
    kind, mad = i.kind(), i.name() == "mad"
    if "wide" in i.parts:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        dtype = TYPES[wide]

        def multiply(a: Array, b: Array, c: Array | int = 0) -> Array:
            return a.astype(dtype) * b.astype(dtype) + c

        return _assign(t, i, multiply, wide, [kind, kind] + [wide] * mad)
    if mad:
        if "lo" not in i.parts:
            raise NotImplementedError(str(i))
        return _plain(lambda a, b, c: a * b + c, t, i)
    return _plain(numeric.high_product if "hi" in i.parts else np.multiply, t, i)


def _extreme(t: Threads, i: Instruction) -> Run:
    """min, max: of numbers and a NaN the number, with .NaN the NaN."""
    propagate = "NaN" in i.parts or i.kind() not in _REAL
    functions = (np.minimum, np.maximum) if propagate else (np.fmin, np.fmax)
    function = functions[i.name() == "max"]
    return _plain(lambda a, *rest: function(function(a, rest[0]), rest[-1]), t, i)


def _divide(t: Threads, i: Instruction) -> Run:
    return _plain(np.divide if i.kind() in _REAL else numeric.divided, t, i)


def _select(t: Threads, i: Instruction) -> Run:
    kind = "b16" if i.kind() == "bf16" else i.kind()
    return _assign(t, i, _picked, kind, [kind, kind, "pred"])


def _picked(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def _move(t: Threads, i: Instruction) -> Run:
    kind = "b16" if i.kind() == "bf16" else i.kind()
    return _assign(t, i, lambda a: a, kind, [kind])


def _compare(t: Threads, i: Instruction) -> Run:
    how, join, kind = i.parts[1], _JOIN.get(i.parts[2]), i.kind()
    if "|" in i.operands[0]:
        raise NotImplementedError(str(i))

    def compare(a: Array, b: Array, *c: Array) -> Array:
        if kind not in _REAL:
            value = _COMPARE[how](a, b)
        else:
            unordered = np.isnan(a) | np.isnan(b)
            if how in ("nan", "num"):
                value = unordered == (how == "nan")
            elif len(how) == 3:  # "ltu": true where either is NaN
                value = _COMPARE[how[:2]](a, b) | unordered
            else:
                value = _COMPARE[how](a, b) & ~unordered
        return value if join is None else join(value, c[0])

    return _assign(t, i, compare, "pred", [kind, kind] + ["pred"] * (join is not None))


def _convert(t: Threads, i: Instruction) -> Run:
    to, kind = i.parts[-2:]
    if to in ("bf16x2", "f16x2"):
        half = numeric.to_bf16 if to == "bf16x2" else _f16_bits
        return _assign(t, i, lambda a, b: _beside(half(a), half(b)), "b32", [kind, kind])
    if to == "tf32":
        return _assign(t, i, numeric.to_tf32, "b32", [kind])
    if to not in TYPES:
        raise NotImplementedError(str(i))

    def convert(x: Array) -> Array:
        real = x.dtype.kind == "f"
        for part in _ROUND.keys() & i.parts if real else ():
            x = _ROUND[part](x)
        if to == "bf16":
            return numeric.to_bf16(x)
        if real and TYPES[to].kind in "iu":
            return numeric.to_whole(x, TYPES[to])
        return x.astype(TYPES[to])

    return _assign(t, i, convert, to, [kind])


def _f16_bits(x: Array) -> Array:
    return x.astype(np.float16).view(np.uint16)


def _beside(high: Array, low: Array) -> Array:
    return high.astype(np.uint32) << 16 | low


def _permute(t: Threads, i: Instruction) -> Run:
    return _assign(t, i, numeric.permuted, "b32", ["b32"] * 3)


def _field(t: Threads, i: Instruction) -> Run:
    return _assign(t, i, numeric.field, i.kind(), [i.kind(), "u32", "u32"])


_PLAIN: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "rem": numeric.remainder, "fma": numeric.fma,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "abs": np.abs, "neg": np.negative, "copysign": lambda a, b: np.copysign(b, a),
    "ex2": np.exp2, "lg2": np.log2, "tanh": np.tanh, "sqrt": np.sqrt, "rsqrt": numeric.rsqrt,
    "rcp": np.reciprocal,
}  # fmt: skip
INSTRUCTIONS: dict[str, Callable[[Threads, Instruction], Run]] = {
    **{name: partial(_plain, function) for name, function in _PLAIN.items()},
    "shl": partial(_shift, numeric.shifted_left), "shr": partial(_shift, numeric.shifted_right),
    "mul": _product, "mad": _product, "div": _divide, "min": _extreme, "max": _extreme,
    "selp": _select, "mov": _move, "setp": _compare, "cvt": _convert, "prmt": _permute,
    "bfe": _field,
}  # fmt: skip
