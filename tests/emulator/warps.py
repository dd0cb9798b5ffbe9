"""Instructions that the threads of a warp or a block carry out together."""

from collections.abc import Callable

import numpy as np

from tests.emulator.memory import WARP, Array
from tests.emulator.numeric import from_bf16
from tests.emulator.ptx import TYPES, Instruction, names_in
from tests.emulator.threads import Mask, Run, Threads

_REDUCE: dict[str, np.ufunc] = {
    "min": np.minimum, "max": np.maximum, "add": np.add, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _barrier(t: Threads, i: Instruction) -> Run:
    if i.parts[1:3] == ("cluster", "arrive"):
        return lambda mask: None  # the wait, next, is the barrier
    known = i.parts[1] in ("warp", "cluster") or (i.parts[1] == "sync" and i.operands == ("0",))
    if not known:
        raise NotImplementedError(str(i))
    return lambda mask: t.pass_barrier(mask, i)


def _shuffle(t: Threads, i: Instruction) -> Run:
    how = i.parts[2]
    to, _, inside_to = i.operands[0].partition("|")
    value, by, clamp = (t.source(o, TYPES["b32"]) for o in i.operands[1:4])
    lane = np.arange(t.n) % WARP
    first = np.arange(t.n) - lane

    def run(mask: Mask) -> None:
        t.together(mask, i)
        b, c = by().astype(int) & 31, clamp().astype(int)
        segment = (c >> 8) & 31
        least = lane & segment
        most = least | (c & 31 & ~segment)
        source = {
            "bfly": lane ^ b,
            "idx": least | (b & ~segment),
            "up": lane - b,
            "down": lane + b,
        }[how]
        inside = source >= most if how == "up" else source <= most
        t.put(to, value()[first + np.where(inside, source, lane)], mask)
        if inside_to:
            t.put(inside_to, inside, mask)

    return run


def _reduce(t: Threads, i: Instruction) -> Run:
    function, source = _REDUCE[i.parts[2]], t.source(i.operands[1], TYPES[i.kind()])

    def run(mask: Mask) -> None:
        t.together(mask, i)
        value = source()
        total = function.reduce(value.reshape(-1, WARP), 1, dtype=value.dtype)
        t.put(i.operands[0], np.repeat(total, WARP), mask)

    return run


def _vote(t: Threads, i: Instruction) -> Run:
    how, source = i.parts[2], t.source(i.operands[1], TYPES["pred"])
    if how not in ("ballot", "any", "all"):
        raise NotImplementedError(str(i))

    def run(mask: Mask) -> None:
        t.together(mask, i)
        p = source().reshape(-1, WARP)
        value: Array = np.asarray(p.any(1) if how == "any" else p.all(1))
        if how == "ballot":
            value = np.packbits(p, 1, bitorder="little").view(np.uint32)[:, 0]
        t.put(i.operands[0], np.repeat(value, WARP), mask)

    return run


def _multiply_matrices(t: Threads, i: Instruction) -> Run:
    """D = A B + C: A (16, k), B (k, 8), C and D (16, 8) lie in a warp's registers as PTX defines.

    Of 8 groups of 4 lanes, group g has rows g and g + 8 of A, C and D and column g of B; a register
    of A and B holds `words` adjacent numbers, which are multiplied exactly and added in float64.
    """
    shape, kinds = i.parts[3], i.parts[6:]
    if i.parts[1:3] != ("sync", "aligned") or i.parts[4:6] != ("row", "col"):
        raise NotImplementedError(str(i))
    words = {"f16": 2, "bf16": 2, "tf32": 1}.get(kinds[1], 0)  # numbers a register
    known = shape.startswith("m16n8k") and kinds == ("f32", kinds[1], kinds[1], "f32")
    if not (known and words):
        raise NotImplementedError(str(i))
    k, width = int(shape.removeprefix("m16n8k")), 4 * words
    to = names_in(i.operands[0])
    a, b, c = ([t.source(r, TYPES["b32"]) for r in names_in(o)] for o in i.operands[1:])

    def numbers(bits: Array) -> Array:
        """(warps, 8 groups, width)"""
        if kinds[1] == "tf32":
            value = (bits & np.uint32(0xFFFFE000)).view(np.float32)
        elif kinds[1] == "f16":
            value = bits.view(np.float16).astype(np.float32)
        else:
            value = from_bf16(bits.view(np.uint16))
        return value.reshape(-1, 8, width)

    def run(mask: Mask) -> None:
        t.together(mask, i)
        on = t.on(mask)
        warps = len(on) // WARP
        left, right = np.zeros((warps, 16, k)), np.zeros((warps, k, 8))
        for r, source in enumerate(a):
            rows, columns = r % 2 * 8, r // 2 * width
            left[:, rows : rows + 8, columns : columns + width] = numbers(source()[on])
        for r, source in enumerate(b):
            right[:, r * width : (r + 1) * width] = numbers(source()[on]).transpose(0, 2, 1)
        product = (left @ right).reshape(warps, 2, 8, 4, 2)
        sums = [
            product[:, r // 2, :, :, r % 2].ravel() + source().view(np.float32)[on]
            for r, source in enumerate(c)
        ]
        for name, total in zip(to, sums, strict=True):
            t.put(name, t.among_all(on, total.astype(np.float32)), mask)

    return run


INSTRUCTIONS: dict[str, Callable[[Threads, Instruction], Run]] = {
    "bar": _barrier, "barrier": _barrier, "shfl": _shuffle, "redux": _reduce, "vote": _vote,
    "mma": _multiply_matrices,
}  # fmt: skip
