"""Reads machine code (SASS) of a cubin: loops, widths of accesses, tensor-core and asynchronous instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_LABEL = re.compile(r"^\s*(\.L\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REGISTER = re.compile(r"\bR(\d+)\b")
LOOP_TOP = 12  # instructions of a loop in which a wait counts as one at its top


@dataclass(frozen=True)
class Instruction:
    """One instruction: `name` with its modifiers ("LDG.E.128"), and its operands as text."""

    name: str
    operands: str

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bits(self) -> int:
        """Width of a memory access a thread."""
        parts = self.name.split(".")[1:]
        widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
        return next((widths[part] for part in parts if part in widths), 32)

    def registers(self, text: str, count: int = 1) -> set[int]:
        return {int(number) + i for number in _REGISTER.findall(text) for i in range(count)}

    @property
    def written(self) -> set[int]:
        """Registers that a load fills."""
        return self.registers(self.operands.split(",")[0], max(1, self.bits // 32))


@dataclass(frozen=True)
class Loop:
    """A backward branch: instructions first..last inclusive, and how deep the loop is nested (1: outermost)."""

    first: int
    last: int
    depth: int


@dataclass(frozen=True)
class Sass:
    """The machine code of one kernel."""

    code: Sequence[Instruction]
    labels: dict[str, int]

    @cached_property
    def loops(self) -> list[Loop]:
        """All loops, the outer before the inner; several branches back to one label are one loop."""
        ends: dict[int, int] = {}
        for place, instruction in enumerate(self.code):
            if instruction.base != "BRA":
                continue
            target = next((self.labels[name] for name in re.findall(r"\.L\w+", instruction.operands)), None)
            # The code ends in a branch to itself, which is no loop.
            if target is not None and target < place:
                ends[target] = max(ends.get(target, 0), place)
        spans = sorted(ends.items(), key=lambda span: (span[0], -span[1]))
        return [Loop(a, b, sum(c <= a and b <= d for c, d in spans)) for a, b in spans]

    def body(self, loop: Loop) -> Sequence[Instruction]:
        return self.code[loop.first : loop.last + 1]

    def count(self, *bases: str) -> int:
        return sum(instruction.base in bases for instruction in self.code)

    def widths(self, *bases: str) -> dict[int, int]:
        """Instructions by width in bits, of some kinds of access."""
        return dict(sorted(Counter(i.bits for i in self.code if i.base in bases).items()))

    @property
    def innermost(self) -> list[Loop]:
        return [
            loop
            for loop in self.loops
            if not any(loop.first <= o.first and o.last <= loop.last for o in self.loops if o is not loop)
        ]

    @property
    def barriers_in_loops(self) -> int:
        """Barriers of the loop that has most."""
        bodies = [self.body(loop) for loop in self.innermost]
        return max((sum(i.base == "BAR" for i in body) for body in bodies), default=0)

    @property
    def waits_for_all_at_a_loop_top(self) -> bool:
        """Whether a loop begins by waiting for all its asynchronous copies, which leaves nothing to overlap."""
        tops = [self.body(loop)[:LOOP_TOP] for loop in self.loops]
        return any(re.fullmatch(r"DEPBAR\.LE", i.name) and "0x0" in i.operands for top in tops for i in top)

    @property
    def loads_in_flight(self) -> int:
        """Most global loads of the widest kind that are under way before an instruction needs one of their results."""
        widest = max(self.widths("LDG"), default=0)
        most, flying = 0, {}
        for place, instruction in enumerate(self.code):
            is_store = instruction.base in ("STG", "STS")
            text = instruction.operands if is_store else instruction.operands.partition(",")[2]
            count = max(1, instruction.bits // 32) if is_store else 1
            if flying.keys() & instruction.registers(text, count):
                flying = {}
            if instruction.base == "LDG" and instruction.bits == widest:
                flying |= dict.fromkeys(instruction.written, place)
                most = max(most, len(set(flying.values())))
        return most


def read(cubin: bytes, tools: Path, kernel: str = "") -> Sass:
    """Disassemble a cubin by `nvdisasm` of the folder `tools`; with `kernel`, the function whose name contains it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return parse(text, kernel)


def parse(text: str, kernel: str = "") -> Sass:
    """The one function of a listing of `nvdisasm -c`, or the one whose section's name contains `kernel`."""
    sections = re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]
    found = [section for section in sections if kernel in section.partition(",")[0]]
    if len(found) != 1:
        raise ValueError(f"one kernel named {kernel!r} is expected in a cubin, there are {len(found)}.")
    code, labels = [], {}
    for line in found[0].splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.search(line):
            code.append(Instruction(instruction[2], instruction[3].strip()))
    return Sass(code, labels)
