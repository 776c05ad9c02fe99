"""Plants bugs in the kernels, one at a time, and shows which run of test_simt.py notices each.

python -m tests.hardware.simt.mutate [NAME...]    only those whose name contains one of NAMEs
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hardware.simt import build
from tests.hardware.simt.mutants import CSRC, MUTANTS, Mutant

# The line in which a program says what it noticed.
SIGN = re.compile(r"(simt: .*|SUMMARY: .*|runtime error: .*|wrong value in .*)$", re.MULTILINE)
MISSED, NOT_COMPILED = "NOT CAUGHT", "does not compile"

# A mutant's program runs once: no optimization, no warnings, no debug information, and of UBSan's
# checks only those that notice mutants. They compile in half the time.
FAST = {
    "none": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all"],
}
# Everything that the programs include and no mutant changes, compiled once.
UNCHANGED = """
#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>
#include <torch/headeronly/core/ScalarType.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
#include "harness/memory.h"
#include "harness/program.h"
"""


def flags(sanitizer: str) -> list[str]:
    return ["-O0", "-w", *FAST[sanitizer]]


def precompile(sanitizer: str, folder: Path) -> None:
    header = folder / f"{sanitizer}.h"
    header.write_text(UNCHANGED)
    build.compile_file(header, Path(f"{header}.gch"), folder, *flags(sanitizer), "-xc++-header")


def diagnosis(status: int, output: str) -> str | None:
    """What was noticed."""
    if status == 0:
        return None
    found = SIGN.search(output)
    return found[1][:90] if found else f"exit status {status}"


def caught_by(mutant: Mutant, headers: Path) -> str:
    program, sanitizer, only = mutant.run
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        root, binary = Path(folder), Path(folder, program)
        shutil.copytree(CSRC, root / "csrc")
        (root / "csrc" / mutant.file).write_text(mutant.planted())
        part = [f"-DSIMT_ONLY={only}"] if only else []
        words = *flags(sanitizer), f"-include{headers / sanitizer}.h", *part
        try:
            build.compile_file(build.HERE / f"{program}.cpp", binary, root, *words)
            return diagnosis(*build.run(binary, "--fail-fast", timeout=120)) or MISSED
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return NOT_COMPILED
        except subprocess.TimeoutExpired:
            return "time limit"


def plant(mutants: Sequence[Mutant]) -> int:
    """Prints a table; the number of those that were not caught."""
    bad = 0
    with (
        tempfile.TemporaryDirectory(prefix="headers") as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        headers = Path(folder)
        list(pool.map(lambda s: precompile(s, headers), {m.run.sanitizer for m in mutants}))
        print("| file | mutant | caught by |\n|---|---|---|")
        noticed = pool.map(lambda mutant: caught_by(mutant, headers), mutants)
        for mutant, sign in zip(mutants, noticed, strict=True):
            bad += sign in (MISSED, NOT_COMPILED)
            print(f"| `{mutant.file}` | {mutant.name} | {sign} |", flush=True)
    return bad


def main(names: list[str]) -> int:
    chosen = [m for m in MUTANTS if not names or any(name in m.name for name in names)]
    start = time.monotonic()
    bad = plant(chosen)
    print(f"\n{len(chosen) - bad} of {len(chosen)} caught, in {time.monotonic() - start:.0f} s")
    return 1 if bad or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
