"""Memory that knows who used which of its bytes, and when."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
WARP = 32
# A thread's time: how many barriers of its cluster (the upper bits), its block and its warp it has
# passed.
BARRIERS = {"warp": 1, "block": 1 << 16, "cluster": 1 << 40}
_NOBODY = np.iinfo(np.int64).max
_ATOMIC = -1  # in the place of the thread that wrote


class Fault(Exception):
    """A GPU would have refused it, or done anything."""


@dataclass(frozen=True)
class Access:
    """Who accesses memory: a thread each, numbered through all blocks, at its time."""

    threads: Array
    times: Array
    what: object  # for messages

    def __post_init__(self) -> None:
        assert self.threads.shape == self.times.shape


class Memory:
    """Bytes that raise Fault when they are used wrongly.

    Every access must be aligned to its width and lie within what `allow` has allowed. Two accesses
    of a byte of which one writes must be one thread's, or have a barrier between them: of their
    cluster, of their block where both are of one, or of their warp. So accesses of two blocks are
    never in order, unless they are one cluster's.

    With `updates`, a thread may also write what its own block has read, if its own warp has: Triton
    lets all threads load a value of which one stores the update, and only that one's load counts.
    Other blocks may not have read it.

    Two threads may write the same value at once, in one instruction. Atomic operations are in order
    among themselves, and with no other access in the launch.
    """

    def __init__(
        self, name: str, size: int, threads: int, updates: bool = False, cluster: int = 1
    ) -> None:
        """`threads` to a block, `cluster` blocks to a cluster."""
        self.name, self.threads, self.updates = name, threads, updates
        self.cluster = cluster
        self.bytes = np.zeros(size, np.uint8)
        self._allowed = np.zeros(size, bool)
        # Thread + 1 (0: none): the last that wrote a byte, and the lowest and highest of those that
        # read it since; their times; the warps of these, a bit each.
        self._writer, self._wrote, self._low, self._high, self._read = np.zeros((5, size), np.int64)
        self._low[:] = _NOBODY
        self._warps = np.zeros(size if updates else 0, np.int64)

    def allow(self, start: int, size: int) -> None:
        self._allowed[start : start + size] = True

    def load(self, at: Array, width: int, access: Access) -> Array:
        """(accesses, width) bytes."""
        where, me, now = self._checked(at, width, access)
        if self._unordered(self._writer[where], self._wrote[where], me, now).any():
            raise Fault(f"{self.name} memory written and read without a barrier: {access.what}")
        low, high, read = self._low[where], self._high[where], self._read[where]
        fresh = (high == 0) | self._before(low, read, me, now) & self._before(high, read, me, now)
        self._low[where[fresh]], self._high[where[fresh]] = _NOBODY, 0
        np.minimum.at(self._low, where, me)
        np.maximum.at(self._high, where, me)
        self._read[where] = now
        if self.updates:
            self._warps[where[fresh]] = 0
            np.bitwise_or.at(self._warps, where, self._warp_bit(me))
        return self.bytes[where]

    def store(self, at: Array, values: Array, access: Access) -> None:
        """values (accesses, width) bytes."""
        where, me, now = self._checked(at, values.shape[1], access)
        low, high, read = self._low[where], self._high[where], self._read[where]
        readers = self._unordered(low, read, me, now) | self._unordered(high, read, me, now)
        if self.updates:
            elsewhere = (self._block(low) != self._block(me)) | (
                self._block(high) != self._block(me)
            )
            readers &= elsewhere | (self._warps[where] & self._warp_bit(me) == 0)
        readers &= high != 0
        if (readers | self._unordered(self._writer[where], self._wrote[where], me, now)).any():
            raise Fault(f"{self.name} memory used and written without a barrier: {access.what}")
        self._writer[where], self._wrote[where] = me, now
        self.bytes[where] = values
        if (self.bytes[where] != values).any():
            raise Fault(f"{self.name} memory written differently by two threads: {access.what}")

    def add(self, at: Array, numbers: Array, access: Access) -> Array:
        """Adds, one thread after the other, a whole number each; what each has found."""
        where, _, _ = self._checked(at, numbers.itemsize, access)
        if self._high[where].any() or not np.isin(self._writer[where], (0, _ATOMIC)).all():
            raise Fault(f"{self.name} memory used and added to: {access.what}")
        self._writer[where] = _ATOMIC
        found = np.empty_like(numbers)
        for k, place in enumerate(where):
            found[k] = self.bytes[place].view(numbers.dtype)[0]
            self.bytes[place] = (found[k : k + 1] + numbers[k]).view(np.uint8)
        return found

    def end(self, start: Array, size: int, access: Access) -> None:
        """A thread's block ends, and with it `size` bytes from `start`: a block each."""
        where, me, now = start[:, None] + np.arange(size), access.threads + 1, access.times
        me, now = me[:, None], now[:, None]
        for who, when in (
            (self._low[where], self._read[where]),
            (self._high[where], self._read[where]),
            (self._writer[where], self._wrote[where]),
        ):
            used = (who > 0) & (who < _NOBODY) & (self._block(who) != self._block(me))
            if (used & ~self._before(who, when, me, now)).any():
                raise Fault(
                    f"{self.name} memory of a block that ends while others use it: {access.what}"
                )

    def _checked(self, at: Array, width: int, access: Access) -> tuple[Array, Array, Array]:
        """The bytes (accesses, width), the threads and times beside them."""
        if (at % width).any():
            raise Fault(f"misaligned access of {width} bytes to {self.name} memory: {access.what}")
        where = at[:, None] + np.arange(width)
        size = len(self.bytes)
        if at.size and (at.min() < 0 or at.max() + width > size or not self._allowed[where].all()):
            raise Fault(f"access outside of {self.name} memory: {access.what}")
        return where, access.threads[:, None] + 1, access.times[:, None]

    def _block(self, thread: Array) -> Array:
        return (thread - 1) // self.threads

    def _warp_bit(self, thread: Array) -> Array:
        return 1 << (thread - 1) % self.threads // WARP

    def _before(self, who: Array, when: Array, me: Array, now: Array) -> Array:
        """Whether barriers put `who` at `when` before `me` at `now`."""
        size = {"warp": WARP, "block": self.threads, "cluster": self.threads * self.cluster}

        def passed(level: str) -> Array:
            same = (who - 1) // size[level] == (me - 1) // size[level]
            return same & (when // BARRIERS[level] < now // BARRIERS[level])

        before = passed("block") | passed("warp")
        return before | passed("cluster") if self.cluster > 1 else before

    def _unordered(self, who: Array, when: Array, me: Array, now: Array) -> Array:
        """Whether `who` is another thread, whose access at `when` is not before mine."""
        return (who != 0) & (who != me) & ~self._before(who, when, me, now)
