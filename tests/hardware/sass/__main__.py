"""python -m tests.hardware.sass [LIBRARY]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.hardware.sass import table
from tests.hardware.sass.listing import read
from tests.hardware.sass.proof import missing, prove

PACKAGE = Path(__file__).parents[3] / "mas_ext"


def built_library() -> Path:
    found = sorted(PACKAGE.glob("_kernels*.so"))
    if len(found) != 1:
        raise SystemExit(f"{len(found)} libraries _kernels*.so in {PACKAGE}; `make install`")
    return found[0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hardware.sass", description=__doc__)
    parser.add_argument("library", type=Path, nargs="?", help="default: the one in mas_ext/")
    arguments = parser.parse_args()
    library = arguments.library or built_library()
    proofs, problems = prove(read(library))
    problems += missing(proofs)
    if proofs:
        print(table.text(proofs), table.NOTES, sep="\n\n", end="\n\n")
    for problem in problems:
        print(f"WRONG: {problem}")
    good = "no spills, no atomics, 16-byte accesses in every hot loop"
    verdict = f"{len(problems)} things wrong" if problems else good
    there = ", ".join(f"sm_{a}" for a in sorted({proof.kernel.architecture for proof in proofs}))
    print(f"{library.name}: {len(proofs)} kernels for {there}: {verdict}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
