"""compute-sanitizer: each of its tools over unit tests.

The device gets copies of what the tests make on the CPU, so next to nothing of torch's is launched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.hardware.gpu.device import REHEARSAL, needs_gpu
from tests.hardware.gpu.steps import PYTEST, REDIRECT, ROOT

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
EACH_AT_MOST = None if REHEARSAL else 75  # seconds
FOUND = 86  # the exit code of compute-sanitizer when a tool found something
# Every operator, dtype and path of the kernels, few bytes.
CHOSEN = "float64_oracle and (15_16_17 or 8191 or mixed or transposed_omega)"
EXERCISE = [sys.executable, "-m", "pytest", "-q", *PYTEST, *REDIRECT, "-k", CHOSEN]


class Done(NamedTuple):
    code: int
    output: str


def test_the_program_is_right_without_a_sanitizer() -> None:
    done = run(EXERCISE)
    assert done.code == 0, done.output[-300:]


@needs_gpu
@pytest.mark.parametrize("tool", TOOLS)
def test_finds_nothing(tool: str) -> None:
    done = sanitize(tool, EXERCISE)
    assert errors_in(tool, done.output) == 0, done.output[:2000]
    assert done.code == 0, done.output[-300:]


def sanitize(tool: str, command: list[str]) -> Done:
    sanitizer = next((place for place in candidates() if place.is_file()), None)
    assert sanitizer, f"compute-sanitizer not found in {', '.join(map(str, candidates()))}"
    words = [str(sanitizer), "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5"]
    # torch asks the driver for functions that it may not have, which is no error of anyone.
    return run([*words, "--report-api-errors", "no", *command])


def run(command: list[str]) -> Done:
    """Without torch's cache of memory every tensor is an allocation whose ends are guarded."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Into a file: what a sanitizer leaves behind when its time is up would keep a pipe open.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=EACH_AT_MOST,
            check=False,
        )
        output.seek(0)
        return Done(done.returncode, output.read())


def errors_in(tool: str, output: str) -> int:
    """The count in the summary that every tool ends with; without one nothing was checked."""
    racecheck = tool == "racecheck"
    summary = r"RACECHECK SUMMARY: (\d+) hazards?" if racecheck else r"ERROR SUMMARY: (\d+) errors?"
    counts = re.findall(summary, output)
    assert counts, f"{tool} ended without a summary: {output.strip()[-200:]}"
    return sum(map(int, counts))


def candidates() -> Iterator[Path]:
    """On the PATH, and in the toolkits that may be here, beside bin/ the folder it points to."""
    if on_path := shutil.which("compute-sanitizer"):
        yield Path(on_path)
    nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve()
    packages = Path(torch.__file__).parents[1] / "nvidia"
    toolkits = nvcc.parents[1], Path("/usr/local/cuda"), *sorted(packages.glob("cu*"))
    for home in (Path(os.environ.get("CUDA_HOME", toolkits[0])), *toolkits):
        yield home / "bin/compute-sanitizer"
        yield home / "compute-sanitizer/compute-sanitizer"
