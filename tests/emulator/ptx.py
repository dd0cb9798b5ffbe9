"""Reads PTX: the part that Triton generates, one kernel to a text."""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

TYPES = {
    "pred": np.dtype(bool), "b8": np.dtype("u1"), "u8": np.dtype("u1"), "s8": np.dtype("i1"),
    "b16": np.dtype("u2"), "u16": np.dtype("u2"), "s16": np.dtype("i2"), "f16": np.dtype("f2"),
    "b32": np.dtype("u4"), "u32": np.dtype("u4"), "s32": np.dtype("i4"), "f32": np.dtype("f4"),
    "b64": np.dtype("u8"), "u64": np.dtype("u8"), "s64": np.dtype("i8"), "f64": np.dtype("f8"),
    "bf16": np.dtype("u2"),  # NumPy has no such numbers: their bits
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    line: int  # of the text
    source: str  # "batch_norm.py:79", from the line table; empty where there is none
    guard: str | None  # "%p1", "!%p1"
    parts: tuple[str, ...]  # of the name, split at dots
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        text = f"{guard}{'.'.join(self.parts)} {', '.join(self.operands)}".rstrip()
        return f"{self.source or 'no source line'}, line {self.line} of the PTX: {text}"

    def name(self) -> str:
        return self.parts[0]

    def kind(self) -> str:
        """The last type of its name."""
        return self.parts[-1]

    def waits_for(self) -> str | None:
        """Who has to have arrived before it is carried out: a level of BARRIERS, or nobody."""
        if self.parts[:2] == ("barrier", "cluster"):
            return "cluster" if self.parts[2] == "wait" else None
        if self.parts[0] in ("bar", "barrier"):
            return "warp" if self.parts[1] == "warp" else "block"
        return "warp" if "sync" in self.parts else None


@dataclass(frozen=True)
class Kernel:
    parameters: tuple[str, ...]
    registers: dict[str, tuple[int | None, str]]  # prefix: how many (None: one, so called), type
    threads: int  # a block
    cluster: int  # blocks
    # Control enters at the first instruction of a basic block; what waits is always the first.
    blocks: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]  # of basic blocks


@cache
def parse(text: str) -> Kernel:
    header, body = text.split("\n{", 1)
    threads = re.search(r"\.(?:req|max)ntid (\d+)", header)
    if threads is None:
        raise NotImplementedError("a kernel that does not say how many threads it has")
    cluster = re.search(r"\.reqnctapercluster (\d+)", header)
    parameters = tuple(re.findall(r"\.param [^\n]*?(\w+)[,\n]", header))
    registers: dict[str, tuple[int | None, str]] = {}
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    source = ""
    for number, line in enumerate(body.splitlines(), header.count("\n") + 2):
        code, _, comment = line.partition("//")
        code = code.strip()
        if code.startswith(".section"):
            break
        if code.startswith(".loc"):
            found = re.search(r"(\S+\.py:\d+)", comment)
            source = found[1] if found else ""
            continue
        if label := re.match(r"(\$\w+):", code):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
            code = code[label.end() :]
        for statement in (s.strip().lstrip("{ ") for s in code.split(";")):
            if declared := re.match(r"\.reg \.(\w+)\s+(%?\w+)(?:<(\d+)>)?$", statement):
                kind, name, count = declared.groups()
                registers[name] = int(count) if count else None, kind
            elif statement and statement[0] not in ".}$":
                i = _instruction(number, source, statement)
                if i.waits_for() == "cluster":
                    _check_nothing_is_between(blocks[-1], i)
                if i.waits_for() and blocks[-1]:
                    blocks.append([])
                blocks[-1].append(i)
                if i.name() in ("bra", "ret"):
                    blocks.append([])
    return Kernel(
        parameters, registers, int(threads[1]), int(cluster[1]) if cluster else 1,
        tuple(map(tuple, blocks)), labels,
    )  # fmt: skip


def _check_nothing_is_between(before: list[Instruction], wait: Instruction) -> None:
    """What a thread does after it has arrived and before it waits would be in nobody's order."""
    arrived = bool(before) and before[-1].parts[:3] == ("barrier", "cluster", "arrive")
    if not arrived or before[-1].guard or wait.guard or "relaxed" in before[-1].parts:
        raise NotImplementedError(f"a wait that does not follow an arrival: {wait}")


def _instruction(number: int, source: str, statement: str) -> Instruction:
    found = re.match(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
    if found is None:
        raise NotImplementedError(f"line {number} of the PTX: {statement}")
    guard, name, rest = found.groups()
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
    parts = tuple(name.replace("::", "_").split("."))
    return Instruction(number, source, guard, parts, tuple(o.strip() for o in operands))


def names_in(operand: str) -> list[str]:
    """ "{%r1, %r2}" or "%r1": the registers."""
    return [name.strip() for name in operand.strip("{} ").split(",")]
