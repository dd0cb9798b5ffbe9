"""Runs PTX on the CPU with NumPy: the threads of a launch side by side, one instruction at a time.

It knows the part of PTX that Triton generates for this package's kernels and raises
NotImplementedError, naming the instruction, for the rest (wgmma, atomics but for additions of whole
numbers, ...). It is stricter than a GPU. Fault is raised by

- an access outside of the tensors given, or of a block's shared memory, or a misaligned one
  (`memory.py`; inside a tensor's storage, but outside of the view passed, is not noticed);
- two threads that touch the same bytes, one of them writing, without a barrier between them;
- a block of a cluster that ends before a barrier tells that no other block reads its memory;
- a barrier, or another instruction of a whole warp, at which only some of its threads are, or at
  which they wait for others that never come.

What it is not: nothing of ptxas is in it, so neither its contraction of multiplications and
additions, nor its order of instructions, nor registers and spills. ex2.approx and its like are
rounded correctly, where the hardware is right to some units of the last place. The sums of mma are
rounded once. The blocks of a grid run in lockstep with those beside them, as many as make
MOST_THREADS, and one such group after the other: one order of the many that a GPU may take.
"""

from collections.abc import Sequence

import numpy as np

from tests.emulator import accesses, compute, warps
from tests.emulator.memory import Array, Fault, Memory
from tests.emulator.ptx import Instruction, Kernel
from tests.emulator.threads import Run, Threads

MOST_THREADS = 1 << 14
_INSTRUCTIONS = {**compute.INSTRUCTIONS, **accesses.INSTRUCTIONS, **warps.INSTRUCTIONS}
# They say nothing of values: hints to caches, and fences, on which the race checks do not rely.
_WITHOUT_EFFECT = {
    "createpolicy", "fence", "membar", "prefetch", "griddepcontrol", "discard", "applypriority",
}  # fmt: skip


def run(
    kernel: Kernel,
    parameters: Sequence[Array],
    grid: tuple[int, int, int],
    shared: int,
    memory: Memory,
    early: bool = False,
) -> None:
    """A launch: parameters are arrays of one number each, `shared` the bytes a block.

    `early`: asynchronous copies arrive at once, rather than when they are waited for.
    """
    total = int(np.prod(grid))
    step = max(1, MOST_THREADS // kernel.threads // kernel.cluster) * kernel.cluster
    for first in range(0, total, step):
        blocks = range(first, min(first + step, total))
        threads = Threads(kernel, parameters, grid, blocks, shared, memory)
        _Machine(kernel, threads, early).run()


class _Machine:
    """Control flow of some blocks."""

    def __init__(self, kernel: Kernel, threads: Threads, early: bool) -> None:
        self.kernel, self.threads = kernel, threads
        self.copies = accesses.Copies(threads, early)
        self.code = [[(i, self._compile(i)) for i in block] for block in kernel.blocks]

    def _compile(self, i: Instruction) -> Run:
        if i.name() in _WITHOUT_EFFECT or i.name() in ("bra", "ret"):
            return lambda mask: None
        compiler = self.copies.compile if i.name() == "cp" else _INSTRUCTIONS.get(i.name())
        if compiler is None:
            raise NotImplementedError(str(i))
        done = compiler(self.threads, i)
        return lambda mask: done(self.threads.guarded(i, mask))

    def run(self) -> None:
        end = len(self.code)
        at = np.zeros(self.threads.n, np.int64)  # the basic block where a thread is
        with np.errstate(all="ignore"):
            while (at < end).any():
                block, here = self._next(at)
                at = np.where(here, self._run_block(block, here), at)

    def _next(self, at: Array) -> tuple[int, Array]:
        """The first basic block with threads that can go on, and which these are."""
        for block in np.unique(at[at < len(self.code)]):
            here = at == block
            level = self.code[block][0][0].waits_for() if self.code[block] else None
            if level:
                size = self.threads.sizes[level]
                here &= np.repeat(here.reshape(-1, size).all(1), size)
            if here.any():
                return int(block), here
        waiting = self.code[at.min()][0][0]
        raise Fault(f"threads wait for others that do not come: {waiting}")

    def _run_block(self, block: int, here: Array) -> Array:
        """Where the threads `here` go on."""
        after = np.full(self.threads.n, block + 1)
        mask = None if here.all() else here
        for i, instruction in self.code[block]:
            if i.name() in ("bra", "ret"):  # the last
                gone = self.threads.on(self.threads.guarded(i, mask))
                if i.name() == "ret":
                    self.threads.end(gone, i)
                    after[gone] = len(self.code)
                else:
                    after[gone] = self.kernel.labels[i.operands[0]]
            else:
                instruction(mask)
        return after
