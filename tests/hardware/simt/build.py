"""Compiles and runs the programs of this folder.

python -m tests.hardware.simt.build PROGRAM [SANITIZER]    prints where the program is; `none` for a debugger
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PROGRAMS = (
    "works",
    "faults",
    "tables",
    "multi_tensor",
    "compressed",
    "steps",
    "abs_matmul",
    "vast",
)
SANITIZERS = {
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
    "none": ["-O0", "-g"],
}
FLAGS = [
    "-std=c++20",
    "-fno-omit-frame-pointer",
    "-fno-strict-aliasing",  # the kernels read memory as vectors, as nvcc lets them
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
    "-pthread",
]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
TIME_LIMIT = 600  # seconds; a case has a limit of its own (harness/program.h)


def command(program: str, sanitizer: str, root: Path, output: Path, *flags: str) -> list[str]:
    """The compiler's command for a program with the kernels in root/csrc."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    torch_headers = Path(torch.__file__).parent / "include"
    folders = [f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{root}", f"-isystem{torch_headers}"]
    all_flags = [*FLAGS, *SANITIZERS[sanitizer], *flags, *folders]
    return [compiler, *all_flags, str(HERE / f"{program}.cpp"), "-o", str(output)]


def compile_program(program: str, sanitizer: str, root: Path, output: Path, *flags: str) -> None:
    line = command(program, sanitizer, root, output, *flags)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{program} does not compile:\n{done.stderr}")


def fingerprint(program: str, sanitizer: str) -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    digest.update(" ".join(command(program, sanitizer, ROOT, Path())).encode())
    for folder in (ROOT / "csrc", HERE):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".cpp")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(program: str, sanitizer: str = "address") -> Path:
    """The program, compiled if its sources or its command are new; once among many processes."""
    folder = ROOT / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{program}-{sanitizer}"
    output = folder / f"{name}-{fingerprint(program, sanitizer)}"
    with FileLock(folder / f"{name}.lock"):
        if not output.exists():
            for old in folder.glob(f"{name}-*"):
                old.unlink()
            part = folder / f"{name}.part"
            compile_program(program, sanitizer, ROOT, part)
            part.rename(output)
    return output


def run(program: Path, *arguments: str, timeout: float = TIME_LIMIT) -> tuple[int, str]:
    """The exit status and all that was printed."""
    environment = {**os.environ, **ENVIRONMENT}
    line = [str(program), *arguments]
    for prefix in ([], ["setarch", "-R"]):
        done = subprocess.run(
            [*prefix, *line],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            env=environment,
            timeout=timeout,
        )
        # Where addresses are very random, ThreadSanitizer finds no room for its own.
        if "unexpected memory mapping" not in done.stdout:
            break
    return done.returncode, done.stdout


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
