"""Instructions that read and write memory, and asynchronous copies."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.emulator.memory import Array
from tests.emulator.numeric import bytes_of
from tests.emulator.ptx import TYPES, Instruction, names_in
from tests.emulator.threads import Mask, Run, Threads, in_cluster

_SPACES = {
    "global": "global", "shared": "shared", "shared_cta": "shared", "shared_cluster": "cluster",
}  # fmt: skip


def _load(t: Threads, i: Instruction) -> Run:
    kind, to = TYPES[i.kind()], names_in(i.operands[0])
    if "param" in i.parts:
        name = i.operands[1].strip("[] ")
        if name not in t.parameters:
            raise NotImplementedError(str(i))
        value = np.broadcast_to(t.parameters[name].view(kind), t.n)
        return lambda mask: t.put(i.operands[0], value, mask)
    space, address = _space(i), t.address(i.operands[1])

    def run(mask: Mask) -> None:
        on = t.on(mask)
        values = t.load(space, address()[on], kind.itemsize * len(to), on, i).view(kind)
        for k, name in enumerate(to):
            t.put(name, t.among_all(on, values[:, k]), mask)

    return run


def _store(t: Threads, i: Instruction) -> Run:
    space, address = _space(i), t.address(i.operands[0])
    sources = [t.source(name, TYPES[i.kind()]) for name in names_in(i.operands[1])]

    def run(mask: Mask) -> None:
        on = t.on(mask)
        values = np.stack([source()[on] for source in sources], 1)
        t.store(space, address()[on], bytes_of(values), on, i)

    return run


def _add(t: Threads, i: Instruction) -> Run:
    """Atomic additions of whole numbers: atom says what was there, red does not."""
    kind = TYPES[i.kind()]
    if i.parts[1:-1] != ("global", "gpu", "relaxed", "add") or kind.kind != "u":
        raise NotImplementedError(str(i))
    *to, at, by = i.operands
    address, number = t.address(at), t.source(by, kind)

    def run(mask: Mask) -> None:
        on = t.on(mask)
        found = t.add("global", address()[on], number()[on], on, i)
        for name in to:
            t.put(name, t.among_all(on, found), mask)

    return run


def _space(i: Instruction) -> str:
    for part in i.parts:
        if part in _SPACES:
            return _SPACES[part]
    raise NotImplementedError(str(i))


def _address_in_cluster(t: Threads, i: Instruction) -> Run:
    if i.parts[1:] != ("shared_cluster", "u32"):
        raise NotImplementedError(str(i))
    at, rank = (t.source(o, TYPES["u32"]) for o in i.operands[1:])
    return lambda mask: t.put(i.operands[0], in_cluster(at(), rank()), mask)


# 8 rows of 8 halves are a matrix; lane 8 k + r of a warp has the address of row r of matrix k.


def _load_matrices(t: Threads, i: Instruction) -> Run:
    to, address = names_in(i.operands[0]), t.address(i.operands[1])

    def run(mask: Mask) -> None:
        on = _whole_warps(t, mask, i)
        at, lanes = address()[on].reshape(-1, 4, 8), on.reshape(-1, 4, 8)
        for k, name in enumerate(to):
            got = t.load("shared", at[:, k].ravel(), 16, lanes[:, k].ravel(), i)
            matrices = got.view(np.uint16).reshape(-1, 8, 8)
            if "trans" in i.parts:
                matrices = np.ascontiguousarray(matrices.transpose(0, 2, 1))
            t.put(name, t.among_all(on, matrices.reshape(-1, 64).view(np.uint32).ravel()), mask)

    return run


def _store_matrices(t: Threads, i: Instruction) -> Run:
    address = t.address(i.operands[0])
    sources = [t.source(name, TYPES["b32"]) for name in names_in(i.operands[1])]

    def run(mask: Mask) -> None:
        on = _whole_warps(t, mask, i)
        at, lanes = address()[on].reshape(-1, 4, 8), on.reshape(-1, 4, 8)
        for k, source in enumerate(sources):
            matrices = source()[on].view(np.uint16).reshape(-1, 8, 8)
            if "trans" in i.parts:
                matrices = matrices.transpose(0, 2, 1)
            values = bytes_of(matrices.reshape(-1, 8))
            t.store("shared", at[:, k].ravel(), values, lanes[:, k].ravel(), i)

    return run


def _whole_warps(t: Threads, mask: Mask, i: Instruction) -> Array:
    """The threads that execute an instruction of matrices."""
    if "m8n8" not in i.parts or i.kind() != "b16":
        raise NotImplementedError(str(i))
    t.together(mask, i)
    return t.on(mask)


@dataclass
class _Copy:
    """What some threads have begun to copy from global to shared memory."""

    instruction: Instruction
    size: int
    on: Array  # threads, and beside them:
    to: Array
    start: Array
    read: Array  # whether; else zeros are written
    groups: Array  # how many the thread had committed before

    def part(self, which: Array) -> "_Copy":
        parts = (x[which] for x in (self.on, self.to, self.start, self.read, self.groups))
        return _Copy(self.instruction, self.size, *parts)


class Copies:
    """Asynchronous copies (cp.async): they arrive as late as they may, or with `early` at once.

    A kernel that reads before it has waited finds old bytes late; one that overwrites what is still
    being read finds its bytes gone early. Then the race checks of the memory see to the rest: a
    copy writes when it arrives, as the thread that began it.
    """

    def __init__(self, t: Threads, early: bool) -> None:
        self.t, self.early = t, early
        self.pending: list[_Copy] = []
        self.groups = np.zeros(t.n, np.int64)  # that a thread has committed

    def compile(self, t: Threads, i: Instruction) -> Run:
        if i.parts[1] != "async" or "bulk" in i.parts:
            raise NotImplementedError(str(i))
        if "commit_group" in i.parts:
            return self._commit
        if "wait_group" in i.parts:
            left = int(i.operands[0])
            return lambda mask: self._arrive(mask, left)
        if "shared" not in i.parts:
            raise NotImplementedError(str(i))
        return self._begin(i)

    def _commit(self, mask: Mask) -> None:
        self.groups[self.t.on(mask)] += 1

    def _begin(self, i: Instruction) -> Run:
        to, start = self.t.address(i.operands[0]), self.t.address(i.operands[1])
        size = int(i.operands[2], 0)
        # Triton's fourth operand, the bytes to read, is `size` or 0.
        read = self.t.source(i.operands[3] if len(i.operands) > 3 else f"{size}", TYPES["u32"])

        def run(mask: Mask) -> None:
            on = self.t.on(mask)
            count = read()[on]
            if not np.isin(count, (0, size)).all():
                raise NotImplementedError(str(i))
            begun = _Copy(i, size, on, to()[on], start()[on], count > 0, self.groups[on])
            self.pending.append(begun)
            if self.early:
                self._arrive(mask, -1)

        return run

    def _arrive(self, mask: Mask, left: int) -> None:
        """Those of all groups but the last `left` of the threads in mask."""
        pending, self.pending = self.pending, []
        for copy in pending:
            done = copy.groups < self.groups[copy.on] - left
            if mask is not None:
                done &= mask[copy.on]
            self._carry_out(copy.part(done))
            if not done.all():
                self.pending.append(copy.part(~done))

    def _carry_out(self, copy: _Copy) -> None:
        values = np.zeros((len(copy.on), copy.size), np.uint8)
        read, i = copy.read, copy.instruction
        values[read] = self.t.load("global", copy.start[read], copy.size, copy.on[read], i)
        self.t.store("shared", copy.to, values, copy.on, i)


INSTRUCTIONS: dict[str, Callable[[Threads, Instruction], Run]] = {
    "ld": _load, "st": _store, "ldmatrix": _load_matrices, "stmatrix": _store_matrices,
    "mapa": _address_in_cluster, "atom": _add, "red": _add,
}  # fmt: skip
