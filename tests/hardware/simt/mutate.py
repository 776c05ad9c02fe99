"""Plants a bug in the kernels, one after the other, and shows that the tests notice, and how.

python -m tests.hardware.simt.mutate [NAME...]    those whose name contains one of NAMEs; all without
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hardware.simt import build
from tests.hardware.simt.mutant import CSRC, Mutant
from tests.hardware.simt.mutants import MUTANTS

# What the programs say, and what that is called in the table.
SIGNS = {
    r"simt: in block .*: (threads wait .*) at different places": r"shim: \1 at different places",
    r"simt: in block .*: .*(mask \S+), which leaves it out": r"shim: \1 leaves a caller out",
    r"simt: in block .*: (misaligned \w+)": r"shim: \1",
    r"simt: (the case took too long)": r"\1",
    r"SUMMARY: (AddressSanitizer: [\w-]+)": r"\1",
    r"SUMMARY: (ThreadSanitizer: data race)": r"\1",
    r"runtime error: (.*?) (?:0x\w+ |-?\d+ )?(?:for|within|of|in|out) .*": r"UBSan: \1",
    r"runtime error: (.*)": r"UBSan: \1",
    r"^wrong value in (.*?): .*": r"wrong value in \1",
}
MISSED, NOT_COMPILED = "NOT CAUGHT", "does not compile"


def diagnosis(status: int, output: str) -> str | None:
    """What was noticed, in a few words."""
    if status == 0:
        return None
    for pattern, words in SIGNS.items():
        found = re.search(pattern, output, re.MULTILINE)
        if found:
            return found.expand(words)
    return f"exit status {status}"


def caught_by(mutant: Mutant) -> str:
    program, sanitizer, only = mutant.run
    with tempfile.TemporaryDirectory(prefix="mutant") as folder:
        root, binary = Path(folder), Path(folder, program)
        shutil.copytree(CSRC, root / "csrc")
        (root / "csrc" / mutant.file).write_text(mutant.apply(mutant.original()))
        try:
            build.compile_program(program, sanitizer, root, binary, *fast(only))
            noticed = diagnosis(*build.run(binary, "--fail-fast", timeout=120))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return NOT_COMPILED
        except subprocess.TimeoutExpired:
            return "time limit"
        return noticed or MISSED


def fast(only: str) -> list[str]:
    """Flags for what runs once: whatever the compiler warns of, and for some of the cases."""
    return ["-O0", "-w", *([f"-DSIMT_ONLY={only}"] if only else [])]


def main(names: list[str]) -> int:
    chosen = [m for m in MUTANTS if not names or any(name in m.name for name in names)]
    start, bad = time.monotonic(), 0
    print("| file | mutant | caught by |\n|---|---|---|")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, noticed in zip(chosen, pool.map(caught_by, chosen), strict=True):
            bad += noticed in (MISSED, NOT_COMPILED)
            print(f"| `{mutant.file}` | {mutant.name} | {noticed} |", flush=True)
    print(f"\n{len(chosen) - bad} of {len(chosen)} caught, in {time.monotonic() - start:.0f} s")
    return 1 if bad or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
