"""The threads of a launch: their registers, what an instruction's operands mean, and memory."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.emulator.memory import BARRIERS, WARP, Access, Array, Fault, Memory
from tests.emulator.numeric import bytes_of
from tests.emulator.ptx import TYPES, Instruction, Kernel

Mask = Array | None  # of the threads that execute; None: all
Run = Callable[[Mask], None]
Source = Callable[[], Array]  # an operand's value, (threads,)
_ALL = slice(None)
_RANK = 1 << 24  # more than a block has of shared memory


class Threads:
    """Those of the blocks `blocks` of a grid, side by side.

    Values are arrays over all threads. Shared memory of all blocks is one array, too, and every
    access is checked against its own block's part.
    """

    def __init__(
        self,
        kernel: Kernel,
        parameters: Sequence[Array],
        grid: tuple[int, int, int],
        blocks: range,
        shared: int,
        memory: Memory,
    ) -> None:
        self.block_size, self.n = kernel.threads, len(blocks) * kernel.threads
        self.cluster = kernel.cluster
        self.sizes = {
            "warp": WARP, "block": kernel.threads, "cluster": kernel.threads * kernel.cluster
        }  # fmt: skip
        self.parameters = dict(zip(kernel.parameters, parameters, strict=True))
        self.registers = {
            name: np.zeros(self.n, TYPES[kind])
            for prefix, (count, kind) in kernel.registers.items()
            for name in ([prefix] if count is None else [f"{prefix}{i}" for i in range(count)])
        }
        every = np.arange(self.n)
        lane, block = every % self.block_size, every // self.block_size + blocks.start
        self.number, self.times = every + blocks.start * self.block_size, 0 * every
        self.memory = memory
        self._shared_size = -(-shared // 16) * 16
        self._shared = Memory(
            "shared", self._shared_size * len(blocks), self.block_size, cluster=kernel.cluster
        )
        self._shared.allow(0, self._shared_size * len(blocks))
        self._shared_start = every // self.block_size * self._shared_size
        x, y, z = grid
        special: dict[str, Array | int] = {
            "tid.x": lane, "tid.y": 0, "tid.z": 0, "laneid": lane % WARP,
            "ntid.x": self.block_size, "ntid.y": 1, "ntid.z": 1,
            "ctaid.x": block % x, "ctaid.y": block // x % y, "ctaid.z": block // (x * y),
            "nctaid.x": x, "nctaid.y": y, "nctaid.z": z,
            "cluster_ctarank": block % kernel.cluster, "cluster_nctarank": kernel.cluster,
        }  # fmt: skip
        self._special = {f"%{k}": np.broadcast_to(v, self.n) for k, v in special.items()}

    # Who executes

    def guarded(self, i: Instruction, mask: Mask) -> Mask:
        """Those of mask for which the instruction's guard holds."""
        if not i.guard:
            return mask
        guard = self.source(i.guard, TYPES["pred"])()
        return guard.copy() if mask is None else mask & guard

    def on(self, mask: Mask) -> Array:
        """Their indices."""
        return np.arange(self.n) if mask is None else np.flatnonzero(mask)

    def among_all(self, on: Array, values: Array) -> Array:
        """Values of the threads `on` in their places; 0 in those of others."""
        whole = np.zeros(self.n, values.dtype)
        whole[on] = values
        return whole

    def together(self, mask: Mask, i: Instruction, level: str = "warp") -> None:
        """Raises Fault where some of a warp, or of another level, execute and some not."""
        if mask is not None:
            groups = mask.reshape(-1, self.sizes[level])
            if (groups.any(1) != groups.all(1)).any():
                raise Fault(f"only some threads of a {level} are here: {i}")

    def pass_barrier(self, mask: Mask, i: Instruction) -> None:
        level = i.waits_for()
        assert level is not None
        self.together(mask, i, level)
        on = _ALL if mask is None else mask
        self.times[on] += BARRIERS[level]

    def end(self, on: Array, i: Instruction) -> None:
        """The threads `on` have come to their end: others may not need their shared memory."""
        if self.cluster > 1 and self._shared_size:
            first = np.unique(on // self.block_size, return_index=True)[1]  # one of each block
            one = on[first]
            access = Access(self.number[one], self.times[one], i)
            self._shared.end(self._shared_start[one], self._shared_size, access)

    # Operands

    def source(self, operand: str, kind: np.dtype[Any]) -> Source:
        """An operand as numbers of a kind."""
        if operand[0] == "{":
            names = operand[1:-1].split(",")
            part = np.dtype(f"u{kind.itemsize // len(names)}")
            parts = [self.source(name.strip(), part) for name in names]
            return lambda: np.stack([p() for p in parts], 1).view(kind)[:, 0]
        if operand in self._special:
            special = self._special[operand].astype(kind)
            return lambda: special
        if operand.lstrip("!") in self.registers:
            register = self.registers[operand.lstrip("!")]
            if operand[0] == "!":
                return lambda: np.logical_not(register)
            if kind == register.dtype:
                return lambda: register
            if kind.itemsize == register.itemsize:
                return lambda: register.view(kind)
            assert kind.itemsize < register.itemsize, operand
            return lambda: bytes_of(register)[:, : kind.itemsize].copy().view(kind)[:, 0]
        constant = np.broadcast_to(_constant(operand, kind), self.n)
        return lambda: constant

    def put(self, operand: str, value: Array, mask: Mask) -> None:
        """Into a register, or in parts into those of {...}."""
        if operand[0] == "{":
            names = operand[1:-1].split(",")
            raw = bytes_of(np.broadcast_to(value, self.n))
            width = raw.shape[1] // len(names)
            for k, name in enumerate(n.strip() for n in names):
                if name != "_":
                    part = raw[:, k * width : (k + 1) * width].copy().view(f"u{width}")[:, 0]
                    self.put(name, part, mask)
            return
        register = self.registers[operand]
        if value.dtype.itemsize == register.itemsize:
            value = value.view(register.dtype)
        else:
            assert value.dtype.kind in "iu" and value.dtype.itemsize < register.itemsize, operand
            value = value.astype(register.dtype)  # extended by its own sign
        np.copyto(register, value, where=True if mask is None else mask)

    def address(self, operand: str) -> Source:
        """[%r1+16], [global_smem+16]"""
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if found is None:
            raise NotImplementedError(f"an address {operand}")
        offset = int(found[2] or 0)
        start = self.source(found[1], self.registers.get(found[1], np.zeros(0, np.int64)).dtype)
        return lambda: start().astype(np.int64) + offset

    # Memory

    def load(self, space: str, at: Array, width: int, on: Array, i: Instruction) -> Array:
        """(accesses, width) bytes for the threads `on`, at an address each.

        `space` is "global", "shared", or "cluster": addresses of `in_cluster`.
        """
        memory, at = self._place(space, at, width, on, i)
        return memory.load(at, width, Access(self.number[on], self.times[on], i))

    def store(self, space: str, at: Array, values: Array, on: Array, i: Instruction) -> None:
        memory, at = self._place(space, at, values.shape[1], on, i)
        memory.store(at, values, Access(self.number[on], self.times[on], i))

    def add(self, space: str, at: Array, numbers: Array, on: Array, i: Instruction) -> Array:
        memory, at = self._place(space, at, numbers.itemsize, on, i)
        return memory.add(at, numbers, Access(self.number[on], self.times[on], i))

    def _place(
        self, space: str, at: Array, width: int, on: Array, i: Instruction
    ) -> tuple[Memory, Array]:
        if space == "global":
            return self.memory, at
        block = on // self.block_size
        if space == "cluster":
            rank, at = at // _RANK - 1, at % _RANK
            if ((rank < 0) | (rank >= self.cluster)).any():
                raise Fault(f"no block of the cluster: {i}")
            block = block // self.cluster * self.cluster + rank
        if ((at < 0) | (at + width > self._shared_size)).any():
            raise Fault(f"access outside of shared memory: {i}")
        return self._shared, at + block * self._shared_size


def in_cluster(at: Array, rank: Array) -> Array:
    """The address in the cluster of what is at `at` in the shared memory of the block `rank`."""
    return (at + (rank + 1) * _RANK).astype(np.uint32)


def _constant(operand: str, kind: np.dtype[Any]) -> Array:
    if found := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", operand):
        return np.array(int(found[1], 16), f"u{len(found[1]) // 2}").view(kind)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
        number = int(operand.rstrip("U"), 0)
        if kind == TYPES["pred"]:
            return np.array(number != 0)
        return np.array(number % 2 ** (8 * kind.itemsize), f"u{kind.itemsize}").view(kind)
    if operand == "global_smem":  # begins where shared memory does
        return np.array(0, kind)
    raise NotImplementedError(f"an operand {operand}")
