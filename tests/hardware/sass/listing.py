"""From `cuobjdump`'s text to kernels: their resources and their instructions.

A library holds many cubins, one for each source file and architecture. A kernel is known by its
cubin and its symbol, as a template may be instantiated in several files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from tests.hardware.sass.tools import demangle, dump

# The memory that an opcode goes to. LD and ST find out which it is when they run.
SPACES = {
    "LDG": "global", "STG": "global", "LDGSTS": "global",
    "LDS": "shared", "STS": "shared", "LDSM": "shared",
    "LDL": "local", "STL": "local",
    "LD": "generic", "ST": "generic",
}  # fmt: skip
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def registers(operands: str) -> frozenset[int]:
    return frozenset(int(number) for number in re.findall(r"\bR(\d+)", operands))


@dataclass(frozen=True)
class Instruction:
    """`@!P0 LDG.E.128 R4, desc[UR14][R2.64]` and where it is."""

    address: int
    guard: str  # "" or the predicate, as in "!P0"
    opcode: str
    operands: str

    @cached_property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def space(self) -> str | None:
        return SPACES.get(self.base)

    @property
    def is_load(self) -> bool:
        return self.base.startswith("LD") and self.space is not None

    @property
    def is_store(self) -> bool:
        return self.base.startswith("ST") and self.space is not None

    @cached_property
    def width(self) -> int:
        """Bytes a thread reads or writes with one access."""
        parts = self.opcode.split(".")[1:]
        if self.base == "LDSM":  # one, two or four matrices, of which a thread has 4 bytes each
            return 4 * next((int(part) for part in parts if part in ("2", "4")), 1)
        return max((WIDTHS[part] for part in parts if part in WIDTHS), default=4)

    @cached_property
    def registers(self) -> frozenset[int]:
        """Those that are named; of a vector, the first."""
        return registers(self.operands)

    @cached_property
    def loaded(self) -> frozenset[int]:
        """All that a load fills: what it names ahead of the address, and the neighbours."""
        first = registers(self.operands.split("[")[0])
        each = max(self.width // 4 // max(len(first), 1), 1)
        return frozenset(register + i for register in first for i in range(each))


@dataclass(frozen=True)
class Kernel:
    """One kernel, as compiled for one architecture."""

    architecture: int  # 90 for sm_90
    symbol: str
    registers: int
    stack: int
    shared: int
    local: int
    threads: int  # a block, by __launch_bounds__
    code: list[Instruction] = field(repr=False)

    @cached_property
    def name(self) -> str:
        return demangle(self.symbol)


def cubins(listing: str) -> Iterator[tuple[int, str]]:
    """The architecture and the text of every cubin; PTX, which is not code yet, is left out."""
    for section in re.split(r"^Fatbin ", listing, flags=re.MULTILINE):
        if section.startswith("elf code"):
            yield int(re.search(r"^arch = sm_(\d+)", section, re.MULTILINE)[1]), section


Key = tuple[int, str]  # which cubin of the file, and a symbol


def instructions(listing: str) -> dict[Key, list[Instruction]]:
    """By kernel, from `cuobjdump -sass`."""
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
    found: dict[Key, list[Instruction]] = {}
    for cubin, (_, text) in enumerate(cubins(listing)):
        for function in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
            symbol, *lines = function.splitlines()
            parts = [match.groups("") for match in map(line.match, lines) if match]
            found[cubin, symbol.strip()] = [Instruction(int(a, 16), *rest) for a, *rest in parts]
    return found


def resources(listing: str) -> dict[Key, dict[str, int]]:
    """REG, STACK, SHARED and LOCAL by kernel, from `cuobjdump -res-usage`."""
    function = re.compile(r"^\s*Function (\S+):\s*\n\s*(.*)$", re.MULTILINE)
    return {
        (cubin, symbol): {name: int(n) for name, n in re.findall(r"([A-Z]+):(\d+)", usage)}
        for cubin, (_, text) in enumerate(cubins(listing))
        for symbol, usage in function.findall(text)
    }


def block_sizes(listing: str) -> dict[Key, int]:
    """What __launch_bounds__ promised, from `cuobjdump -elf`."""
    bound = re.compile(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(\S+) (\S+) (\S+)")
    found = {}
    for cubin, (_, text) in enumerate(cubins(listing)):
        for section in re.split(r"^\.nv\.info\.", text, flags=re.MULTILINE)[1:]:
            if match := bound.search(section):
                x, y, z = (int(n, 16) for n in match.groups())
                found[cubin, section.split(maxsplit=1)[0]] = x * y * z
    return found


def assemble(sass: str, usage: str, elf: str) -> list[Kernel]:
    """Three listings of one file, put together."""
    architectures = [architecture for architecture, _ in cubins(usage)]
    code, threads = instructions(sass), block_sizes(elf)
    kernels = []
    for (cubin, symbol), used in resources(usage).items():
        kernel = Kernel(
            architectures[cubin], symbol, used["REG"], used["STACK"], used["SHARED"], used["LOCAL"],
            threads.get((cubin, symbol), 0), code.get((cubin, symbol), []),
        )  # fmt: skip
        if not kernel.code or not kernel.threads:
            raise ValueError(f"sm_{kernel.architecture} {kernel.name}: no code, or no launch bound")
        kernels.append(kernel)
    return kernels


def read(library: Path) -> list[Kernel]:
    """Every kernel in a library, fatbin or object file."""
    with ThreadPoolExecutor() as pool:  # of processes that do the work
        return assemble(*pool.map(partial(dump, library), ("-sass", "-res-usage", "-elf")))
