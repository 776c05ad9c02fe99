"""Loops of a kernel: natural loops of its control flow graph.

A loop is what lies between a branch back and the block it goes back to, where that block is on
every way in. Its own instructions are those that are not in a loop inside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.hardware.sass.listing import Instruction

JUMPS = ("BRA", "JMP")
INDIRECT = ("BRX", "JMX", "BRXU", "JMXU")
ENDS = ("EXIT", "RET", "KILL")

Graph = dict[int, set[int]]  # a block, by the address it starts at, and the blocks that may follow


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


def is_conditional(jump: Instruction) -> bool:
    """A predicate stands before the jump, or among its operands (BRA.U !UP0, 0x80)."""
    return bool(jump.guard) or "," in jump.operands


def basic_blocks(code: list[Instruction]) -> dict[int, list[Instruction]]:
    """Runs of instructions that are entered at the first and left at the last."""
    starts = {code[0].address}
    for instruction, following in zip(code, [*code[1:], None], strict=True):
        if instruction.base in (*JUMPS, *INDIRECT):
            starts.add(target(instruction))
        if following and instruction.base in (*JUMPS, *ENDS):
            starts.add(following.address)
    blocks: dict[int, list[Instruction]] = {}
    for instruction in code:
        if instruction.address in starts:
            blocks[instruction.address] = block = []
        block.append(instruction)
    return blocks


def flow(blocks: dict[int, list[Instruction]]) -> Graph:
    """A call comes back, so it is followed by the next instruction like any other."""
    graph: Graph = {}
    for (start, block), following in zip(blocks.items(), [*list(blocks)[1:], None], strict=True):
        last = block[-1]
        graph[start] = {target(last)} if last.base in JUMPS else set()
        goes_on = last.base not in (*JUMPS, *ENDS) or is_conditional(last)
        if following is not None and goes_on:
            graph[start].add(following)
    return graph


def predecessors(graph: Graph) -> Graph:
    before: Graph = {block: set() for block in graph}
    for block, after in graph.items():
        for successor in after:
            before[successor].add(block)
    return before


def dominators(graph: Graph) -> Graph:
    """For every block, those that are on every way to it, itself among them.

    Blocks without a predecessor are entries too: functions that are called.
    """
    before = predecessors(graph)
    on_every_way = {block: set(graph) if before[block] else {block} for block in graph}
    on_every_way[min(graph)] = {min(graph)}
    changed = True
    while changed:
        changed = False
        for block, ways in before.items():
            if not ways or block == min(graph):
                continue
            now = {block} | set.intersection(*(on_every_way[way] for way in ways))
            changed |= now != on_every_way[block]
            on_every_way[block] = now
    return on_every_way


def bodies(graph: Graph) -> Graph:
    """Every loop's blocks, by the block it begins with."""
    before, dominating = predecessors(graph), dominators(graph)
    found: Graph = {}
    for block, after in graph.items():
        for header in after & dominating[block]:
            body, waiting = {header}, [block]
            while waiting:
                member = waiting.pop()
                if member not in body:
                    body.add(member)
                    waiting += before[member]
            found.setdefault(header, set()).update(body)
    return found


def loops(code: list[Instruction]) -> list[Loop]:
    """Without the one behind the end of every kernel, a jump to itself that pads it."""
    blocks = basic_blocks(code)
    found = bodies(flow(blocks))
    result = []
    for header, body in sorted(found.items()):
        inside = [other for start, other in found.items() if start != header and other < body]
        own = body.difference(*inside)
        instructions = [instruction for block in sorted(own) for instruction in blocks[block]]
        if len(instructions) > 1:
            result.append(Loop(header, tuple(instructions)))
    return result
