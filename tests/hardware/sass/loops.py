"""Loops of a kernel: what lies between a branch back and the address that it goes back to.

The compiler keeps a loop together. Its own instructions are those that are not in a loop inside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.hardware.sass.listing import Instruction

JUMPS = ("BRA", "JMP")
INDIRECT = ("BRX", "JMX", "BRXU", "JMXU")


@dataclass(frozen=True)
class Loop:
    """The address a loop begins at, and its own instructions in the order of their addresses."""

    address: int
    code: tuple[Instruction, ...]


def target(jump: Instruction) -> int:
    addresses = re.findall(r"0x[0-9a-f]+", jump.operands)
    if jump.base in INDIRECT or not addresses:
        raise ValueError(f"cannot follow {jump}: the loops of this kernel are not known")
    return int(addresses[-1], 16)


def loops(code: list[Instruction]) -> list[Loop]:
    """Without the one behind the end of every kernel, a jump to itself that pads it."""
    ends: dict[int, int] = {}  # of loops, by the address that they begin at
    for jump in code:
        if jump.base in (*JUMPS, *INDIRECT) and target(jump) < jump.address:
            ends[target(jump)] = jump.address
    return [Loop(begin, tuple(own(code, begin, end, ends))) for begin, end in sorted(ends.items())]


def own(code: list[Instruction], begin: int, end: int, ends: dict[int, int]) -> list[Instruction]:
    inside = [(b, e) for b, e in ends.items() if begin <= b and e <= end and (b, e) != (begin, end)]
    return [
        instruction
        for instruction in code
        if begin <= instruction.address <= end
        and not any(b <= instruction.address <= e for b, e in inside)
    ]
