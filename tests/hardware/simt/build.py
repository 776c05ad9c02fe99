"""Compiles and runs the programs of this folder.

python -m tests.hardware.simt.build PROGRAM [SANITIZER]

prints where the program is; SANITIZER is `none` for a debugger.
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


def command(source: Path, output: Path, root: Path, *flags: str) -> list[str]:
    """The compiler's command for a program, or a header, with the kernels in root/csrc."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    torch_headers = Path(torch.__file__).parent / "include"
    folders = [f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{root}", f"-isystem{torch_headers}"]
    return [compiler, *FLAGS, *flags, *folders, str(source), "-o", str(output)]


def compile_file(source: Path, output: Path, root: Path, *flags: str) -> None:
    line = command(source, output, root, *flags)
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")


def fingerprint(program: str, sanitizer: str) -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    line = command(Path(program), Path(), ROOT, *SANITIZERS[sanitizer])
    digest.update(" ".join(line).encode())
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
            compile_file(HERE / f"{program}.cpp", part, ROOT, *SANITIZERS[sanitizer])
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
