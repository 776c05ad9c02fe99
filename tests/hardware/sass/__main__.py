"""python -m tests.hardware.sass [LIBRARY]

Prints a line for each kernel and architecture: the registers of a thread, the share of a
multiprocessor's threads that there is room for, the shared memory of a block, and of the hot loop
the accesses to memory, or the multiplications, in one turn, and the KiB that all threads on a
multiprocessor load before they wait for any of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.hardware.sass.expectations import Product, Streams
from tests.hardware.sass.listing import read
from tests.hardware.sass.occupancy import occupancy, shared_bytes
from tests.hardware.sass.proof import Proof, missing, prove

PACKAGE = Path(__file__).parents[3] / "mas_ext"


def built_library() -> Path:
    found = sorted(PACKAGE.glob("_kernels*.so"))
    if len(found) != 1:
        raise SystemExit(f"{len(found)} libraries _kernels*.so in {PACKAGE}; `make install`")
    return found[0]


def line(proof: Proof) -> str:
    kernel = proof.kernel
    uses = f"{kernel.registers:3} registers {occupancy(kernel):5.0%} {shared_bytes(kernel):6} B"
    return f"{proof.title:64} {uses}  {hot_loop(proof)}".rstrip()


def hot_loop(proof: Proof) -> str:
    wanted = proof.expectation.hot
    if isinstance(wanted, Streams):
        reads = ", ".join(f"{n} of {w}" for w, n in sorted(proof.reads.widths.items()))
        flying = proof.in_flight_together // 1024
        return f"reads {reads}; writes {proof.writes.vectors}; {flying} KiB in flight"
    if isinstance(wanted, Product):
        return f"{len(proof.shared_reads.found)} loads for {proof.products} {wanted.instruction}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hardware.sass", description=__doc__)
    parser.add_argument("library", type=Path, nargs="?", help="default: the one in mas_ext/")
    library = parser.parse_args().library or built_library()
    proofs, problems = prove(read(library))
    problems += missing(proofs)
    print(*sorted(map(line, proofs)), *(f"WRONG: {problem}" for problem in problems), sep="\n")
    good = "no spills, no atomics, 16-byte accesses in every hot loop"
    verdict = f"{len(problems)} things wrong" if problems else good
    there = ", ".join(f"sm_{a}" for a in sorted({proof.kernel.architecture for proof in proofs}))
    print(f"{library.name}: {len(proofs)} kernels for {there}: {verdict}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
