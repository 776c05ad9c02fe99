"""compute-sanitizer: each of its tools over exercise.py, and over a bug that it must find."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.hardware.gpu.checks import DidNotRun, NeedsGpu, Session
from tests.hardware.gpu.steps import ROOT

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
EACH_AT_MOST = 75  # seconds
FOUND = 86  # the exit code of compute-sanitizer when a tool found something


def run(session: Session) -> None:
    if session.check("the program without a sanitizer", run_bare, session.device):
        for tool in TOOLS:
            session.check(f"{tool} finds nothing", finds_nothing, tool, session.device)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "planted")
        if session.check("the planted bugs compile", compile_planted, program, session.device):
            for tool in TOOLS:
                name = f"{tool} finds a bug that was planted"
                session.check(name, finds_planted, tool, program, session.device)


def exercise(device: str) -> list[str]:
    return [sys.executable, "-m", "tests.hardware.gpu.exercise", device]


def run_bare(device: str) -> str:
    done = run_program(exercise(device))
    assert done.returncode == 0, last_lines(done)
    return "every result is right"


def finds_nothing(tool: str, device: str) -> str:
    done = sanitize(tool, exercise(device), device)
    found = errors_in(tool, done.stdout)
    assert found == 0, f"{found} errors: {first_error(done.stdout)}"
    assert done.returncode == 0, last_lines(done)
    return "0 errors"


def finds_planted(tool: str, program: Path, device: str) -> str:
    done = sanitize(tool, [str(program), tool], device)
    found = errors_in(tool, done.stdout)
    assert found, f"it found nothing: {last_lines(done)}"
    return f"{found} errors"


def compile_planted(program: Path, device: str) -> str:
    nvcc = shutil.which("nvcc") or str(toolkit() / "bin/nvcc")
    if not Path(nvcc).is_file():
        raise DidNotRun("there is no nvcc")
    architecture = "80"
    if device != "cpu":
        architecture = "{}{}".format(*torch.cuda.get_device_capability())
    source = ROOT / "tests/hardware/gpu/planted.cu"
    command = [nvcc, f"-arch=sm_{architecture}", "-o", str(program), str(source)]
    done = run_program(command)
    assert done.returncode == 0, last_lines(done)
    return ""


def sanitize(tool: str, command: list[str], device: str) -> subprocess.CompletedProcess[str]:
    if device == "cpu":
        raise NeedsGpu
    sanitizer = find()
    if sanitizer is None:
        places = ", ".join(str(place) for place in candidates())
        raise DidNotRun(f"compute-sanitizer not found on the PATH or in {places}")
    words = [str(sanitizer), "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5"]
    # torch asks the driver for functions that it may not have, which is no error of anyone.
    return run_program([*words, "--report-api-errors", "no", *command])


def run_program(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Without torch's cache of memory every tensor is an allocation whose ends are guarded."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # A rehearsal shares its machine with other work: there only the limit of the step holds.
    limit = EACH_AT_MOST if torch.cuda.is_available() else None
    # Into a file: what a sanitizer leaves behind when its time is up would keep a pipe open.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
        output.seek(0)
        text = output.read()
    print(text, flush=True)
    return subprocess.CompletedProcess(command, done.returncode, text)


def errors_in(tool: str, output: str) -> int:
    """The count in the summary that every tool ends with; without one nothing was checked."""
    summary = {
        "racecheck": r"RACECHECK SUMMARY: (\d+) hazards? displayed",
    }.get(tool, r"ERROR SUMMARY: (\d+) errors?")
    counts = re.findall(summary, output)
    if not counts:
        raise RuntimeError(f"{tool} ended without a summary: {output.strip()[-200:]}")
    return sum(map(int, counts))


def first_error(output: str) -> str:
    lines = [line.lstrip("= ") for line in output.splitlines() if line.startswith("=========")]
    return "; ".join(line for line in lines[1:5] if line)


def last_lines(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit code {done.returncode}: " + " | ".join(done.stdout.strip().splitlines()[-3:])


def find() -> Path | None:
    on_path = shutil.which("compute-sanitizer")
    if on_path:
        return Path(on_path)
    return next((place for place in candidates() if place.is_file()), None)


def candidates() -> Iterator[Path]:
    """Of the toolkits that may be here, beside the link in bin/ the folder that it points to."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    for home in (toolkit(), Path("/usr/local/cuda"), *sorted(packages.glob("cu*"))):
        yield home / "bin/compute-sanitizer"
        yield home / "compute-sanitizer/compute-sanitizer"


def toolkit() -> Path:
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    nvcc = shutil.which("nvcc")
    return Path(nvcc).resolve().parents[1] if nvcc else Path("/usr/local/cuda")
