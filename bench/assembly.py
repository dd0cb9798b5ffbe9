"""Reads compiled kernels: instructions, loops, and how wide the accesses to global memory are.

Takes the text of `cuobjdump --dump-sass` for NVIDIA and Triton's amdgcn for AMD.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
_SASS_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_GCN_LINE = re.compile(r"^(?:(\.LBB\w+):|\s+([a-z]\w+)(?:\s+([^;\n]*))?)", re.M)
_GCN_BYTES = {
    "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4,
    "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1, "byte": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    opcode: str
    target: int | None = None  # index of the instruction that a branch goes to
    falls_through: bool = True  # whether the next instruction may follow


@dataclass(frozen=True)
class Code:
    """A stretch of instructions: the whole kernel, or one of its loops."""

    instructions: int
    barriers: int
    loads: dict[int, int]  # bytes a thread and access: how many accesses to global memory
    stores: dict[int, int]

    @property
    def moved(self) -> int:
        """Bytes a thread loads and stores if everything runs once."""
        return sum(width * n for m in (self.loads, self.stores) for width, n in m.items())


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of the one kernel in a SASS listing."""
    lines = [(int(line[0], 16), *line[1:]) for line in _SASS_LINE.findall(text)]
    index = {line[0]: i for i, line in enumerate(lines)}
    instructions = []
    for _, predicate, opcode, operands in lines:
        goal = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        leaves = opcode.startswith(("BRA", "EXIT", "RET"))
        # A branch may also carry its condition as an operand: BRA P0, 0x80.
        conditional = predicate or re.search(r"\bU?P[0-9]", operands)
        instructions.append(
            Instruction(
                opcode,
                index.get(int(goal[1], 16)) if goal else None,
                bool(conditional) or not leaves,
            )
        )
    return instructions


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions of the one kernel in an AMD assembly file."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for label, opcode, rest in _GCN_LINE.findall(text):
        if label:
            labels[label] = len(found)
        elif not opcode.startswith("amd"):
            found.append((opcode, rest))
    return [
        Instruction(
            op,
            labels.get(rest.strip()) if "branch" in op else None,
            op not in ("s_branch", "s_endpgm"),
        )
        for op, rest in found
    ]


def inner_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The loops that contain no other loop, in their order in the code."""
    n = len(instructions)
    targets = {i.target for i in instructions if i.target is not None}
    starts = [
        i
        for i in range(n)
        if i == 0
        or i in targets
        or instructions[i - 1].target is not None
        or not instructions[i - 1].falls_through
    ]
    block_of = {start: block for block, start in enumerate(starts)}
    blocks = [instructions[a:b] for a, b in zip(starts, starts[1:] + [n], strict=True)]
    edges: set[tuple[int, int]] = set()
    for block, code in enumerate(blocks):
        if code[-1].target is not None:
            edges.add((block, block_of[code[-1].target]))
        if code[-1].falls_through and block + 1 < len(blocks):
            edges.add((block, block + 1))
    loops = _innermost(set(range(len(blocks))), edges)
    # A lone jump to itself is the trap behind a kernel's end, no loop.
    found = [
        [i for block in sorted(loop) for i in blocks[block]] for loop in sorted(loops, key=min)
    ]
    return [loop for loop in found if len(loop) > 1]


def _innermost(blocks: set[int], edges: set[tuple[int, int]]) -> list[set[int]]:
    """The innermost cycles: components whose blocks all reach each other, opened at their entry."""
    reach: dict[int, set[int]] = {block: set() for block in blocks}
    for a, b in edges:
        reach[a].add(b)
    grown = True
    while grown:
        before = sum(map(len, reach.values()))
        for block, reached in reach.items():
            reach[block] = reached.union(*(reach[b] for b in reached))
        grown = sum(map(len, reach.values())) > before
    loops, left = [], {block for block in blocks if block in reach[block]}
    while left:
        first = min(left)
        loop = {b for b in left if b in reach[first] and first in reach[b]}
        left -= loop
        entries = {b for a, b in edges if b in loop and a not in loop} or {first}
        inside = {(a, b) for a, b in edges if a in loop and b in loop and b not in entries}
        loops += _innermost(loop, inside) or [loop]
    return loops


def summary(instructions: Iterable[Instruction]) -> Code:
    """What a stretch of instructions does with memory."""
    opcodes = [i.opcode for i in instructions]
    return Code(
        sum(op != "NOP" and op != "s_nop" for op in opcodes),
        sum(op.startswith(("BAR.", "UCGABAR_WAIT", "s_barrier")) for op in opcodes),
        _widths(opcodes, ("LDG", "LDGSTS"), ("global_load_", "buffer_load_")),
        _widths(opcodes, ("STG",), ("global_store_", "buffer_store_")),
    )


def _widths(opcodes: list[str], sass: tuple[str, ...], gcn: tuple[str, ...]) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for op in opcodes:
        parts = op.split(".")
        if parts[0] in sass:
            widths[next((_SASS_BYTES[p] for p in parts if p in _SASS_BYTES), 4)] += 1
        elif op.startswith(gcn):
            widths[_GCN_BYTES[op.split("_")[2]]] += 1
    return dict(sorted(widths.items(), reverse=True))
