"""Compares kernels with what is expected of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from tests.hardware.sass.expectations import (
    ARCHITECTURES,
    DTYPES,
    EXPECTATIONS,
    VECTOR_BYTES,
    Dtype,
    Expectation,
    Product,
    Streams,
    accesses,
    expectation_of,
)
from tests.hardware.sass.listing import Instruction, Kernel
from tests.hardware.sass.loops import Loop, loops
from tests.hardware.sass.occupancy import LIMITS, bytes_that_saturate, threads

ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG")
FLOAT64 = ("DADD", "DMUL", "DFMA", "DSETP")


@dataclass(frozen=True)
class Traffic:
    """The loads, or the stores, of one kind of memory in one turn of a loop."""

    found: tuple[Instruction, ...]

    @property
    def vectors(self) -> int:
        """Accesses of 16 bytes; one of 32 counts as two."""
        return self.widths[VECTOR_BYTES]

    @property
    def widths(self) -> Counter[int]:
        """The number of accesses by their bytes."""
        counted: Counter[int] = Counter()
        for one in self.found:
            counted[min(one.width, VECTOR_BYTES)] += max(one.width // VECTOR_BYTES, 1)
        return counted

    def narrow(self, but: Iterable[int] = ()) -> tuple[str, ...]:
        """Accesses of fewer than 16 bytes, except of the widths given.

        What a warp loads as a matrix (LDSM) is spread over its threads, however little each gets.
        """
        known = {VECTOR_BYTES, *but}
        narrow = (i for i in self.found if min(i.width, VECTOR_BYTES) not in known)
        return tuple(i.opcode for i in narrow if i.base != "LDSM")


def traffic(code: Iterable[Instruction], space: str, stores: bool = False) -> Traffic:
    return Traffic(
        tuple(i for i in code if i.space == space and (i.is_store if stores else i.is_load))
    )


def bytes_in_flight(code: Iterable[Instruction]) -> int:
    """The most a loop loads from global memory before anything waits for one of the loads."""
    most = now = 0
    pending: set[int] = set()
    for instruction in code:
        if pending & instruction.registers:
            pending, now = set(), 0
        if instruction.space == "global" and instruction.is_load:
            pending |= instruction.loaded
            now += instruction.width
            most = max(most, now)
    return most


@dataclass(frozen=True)
class Proof:
    """A kernel, what is expected of it, and what is wrong with it."""

    kernel: Kernel
    expectation: Expectation

    @cached_property
    def loops(self) -> list[Loop]:
        return loops(self.kernel.code)

    @cached_property
    def hot(self) -> Loop | None:
        """The loop that does the work: it moves most vectors, or multiplies most."""
        best = max(self.loops, key=self.work, default=None)
        return best if best and self.work(best) else None

    def work(self, loop: Loop) -> int:
        wanted = self.expectation.hot
        if isinstance(wanted, Product):
            return count(loop.code, wanted.instruction)
        if isinstance(wanted, Streams):
            return vectors(loop)
        return 0

    @property
    def dtype(self) -> Dtype:
        return DTYPES[self.expectation.dtype]

    @property
    def hot_code(self) -> tuple[Instruction, ...]:
        return self.hot.code if self.hot else ()

    @property
    def reads(self) -> Traffic:
        return traffic(self.hot_code, "global")

    @property
    def writes(self) -> Traffic:
        return traffic(self.hot_code, "global", stores=True)

    @property
    def shared_reads(self) -> Traffic:
        return traffic(self.hot_code, "shared")

    @cached_property
    def in_flight(self) -> int:
        return bytes_in_flight(self.hot_code)

    @property
    def in_flight_together(self) -> int:
        """On a multiprocessor, by all the threads it holds."""
        return self.in_flight * threads(self.kernel)

    @property
    def products(self) -> int:
        """Multiplications in one turn of the hot loop."""
        return self.work(self.hot) if self.hot and isinstance(self.expectation.hot, Product) else 0

    @property
    def spills(self) -> int:
        """Bytes of stack, and loads and stores of local memory."""
        return self.kernel.stack + self.kernel.local + count(self.kernel.code, "LDL", "STL")

    @property
    def title(self) -> str:
        return f"sm_{self.kernel.architecture} {self.expectation.title}"

    @cached_property
    def problems(self) -> list[str]:
        return [f"{self.title}: {problem}" for problem in self.find_problems()]

    def find_problems(self) -> Iterator[str]:
        yield from self.anywhere()
        wanted = self.expectation.hot
        if wanted and not self.hot:
            yield f"no loop with {wanted.work}"
        elif isinstance(wanted, Streams):
            yield from self.in_the_hot_loop()
            yield from self.streaming(wanted)
        elif isinstance(wanted, Product):
            yield from self.in_the_hot_loop()
            yield from self.multiplying(wanted)

    def anywhere(self) -> Iterator[str]:
        kernel = self.kernel
        if self.spills:
            yield (
                f"{kernel.stack} bytes of stack, {kernel.local} bytes of local memory,"
                f" {count(kernel.code, 'LDL')} loads from it, {count(kernel.code, 'STL')} stores"
            )
        if count(kernel.code, *ATOMICS):
            yield "atomics, so that results depend on the order of threads"

    def in_the_hot_loop(self) -> Iterator[str]:
        generic = [i.opcode for i in self.hot_code if i.space == "generic"]
        if generic:
            yield f"the hot loop does not know which memory it goes to: {listed(generic)}"
        if self.dtype.accumulates != "double" and count(self.hot_code, *FLOAT64):
            yield "the hot loop computes in float64"

    def streaming(self, wanted: Streams) -> Iterator[str]:
        omega = self.expectation.omega
        reads = accesses(wanted.reads, self.dtype, omega)
        writes = accesses(wanted.writes, self.dtype, omega)
        narrow = self.reads.narrow(but=reads) + self.writes.narrow(but=writes)
        if narrow:
            yield f"the hot loop has accesses of less than 16 bytes: {listed(narrow)}"
        turns = self.reads.vectors // reads[VECTOR_BYTES]
        for width in sorted(reads | writes, reverse=True):
            found = self.reads.widths[width], self.writes.widths[width]
            if not turns or found != (turns * reads[width], turns * writes[width]):
                yield (
                    f"the hot loop has {found[0]} + {found[1]} accesses of {width} bytes,"
                    f" no multiple of {reads[width]} + {writes[width]}"
                )
        needed = bytes_that_saturate(self.kernel.architecture)
        if self.in_flight_together < needed:
            yield (
                f"{self.in_flight_together} bytes under way on a multiprocessor,"
                f" {needed:.0f} keep the memory busy"
            )

    def multiplying(self, wanted: Product) -> Iterator[str]:
        if narrow := self.shared_reads.narrow():
            yield f"the hot loop reads shared memory by {listed(narrow)}"
        if not self.shared_reads.found:
            yield "the hot loop reads nothing from shared memory"
        if wanted.in_vectors and not any(vectors(loop) for loop in self.loops):
            yield "no loop with 16-byte accesses brings the factors there"


def count(code: Iterable[Instruction], *bases: str) -> int:
    return sum(instruction.base in bases for instruction in code)


def vectors(loop: Loop) -> int:
    """Accesses of 16 bytes to global memory."""
    return traffic(loop.code, "global").vectors + traffic(loop.code, "global", True).vectors


def listed(opcodes: Iterable[str]) -> str:
    return ", ".join(f"{number} {opcode}" for opcode, number in Counter(opcodes).items())


def prove(kernels: list[Kernel]) -> tuple[list[Proof], list[str]]:
    """Everything that can be said of each kernel alone, and all that is wrong."""
    for kernel in kernels:
        if kernel.architecture not in LIMITS:
            raise ValueError(f"sm_{kernel.architecture}: no LIMITS in occupancy.py")
    expected = [(kernel, expectation_of(kernel.name)) for kernel in kernels]
    proofs = [Proof(kernel, found) for kernel, found in expected if found]
    unknown = [f"{kernel.name}: not in expectations.py" for kernel, found in expected if not found]
    return proofs, [*unknown, *(problem for proof in proofs for problem in proof.problems)]


def missing(proofs: list[Proof]) -> list[str]:
    """Kernels that a whole library must hold, and does not."""
    there = {(proof.expectation, proof.kernel.architecture) for proof in proofs}
    return [
        f"sm_{architecture} {expectation.title}: not in there"
        for expectation in EXPECTATIONS
        for architecture in ARCHITECTURES
        if (expectation, architecture) not in there
    ]
