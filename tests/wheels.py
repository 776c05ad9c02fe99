"""``python -m tests.wheels WHEEL...``: uses wheels as their users will, who have no compiler.

For each Python that the wheels are for, ``python3.N`` on the PATH, there is a fresh virtual
environment. In it, each wheel is installed with a torch from the package index, the README's
example and the tests of the operators run with what was installed, and the wheel is uninstalled
again. A wheel that is not compiled runs in plain PyTorch, which the example alone then shows.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")

# What the README's example leaves to its reader, and what it must have done.
BEFORE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def MyNetwork():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))

def task(shift):
    x = torch.randn(64, 8)
    return DataLoader(TensorDataset(x + shift, x[:, :3].argmax(1)), batch_size=16)

def train(model, optimizer, task):
    for x, y in 5 * list(task):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

tasks = [task(0), task(2)]
"""
AFTER = """
import sys

info = mas_ext.build_info()
print(info)
assert mas_ext.__file__.startswith(sys.prefix), mas_ext.__file__
assert info["native"] is {native}
assert mas.num_tasks == 2
assert all(omega.isfinite().all() and omega.any() for omega in mas.importance.values())
"""


def is_native(wheel: Path) -> bool:
    return not wheel.name.endswith("-none-any.whl")


def check_contents(wheel: Path) -> None:
    """All of the package is in it, and nothing else: neither tests nor a library of torch's."""
    names = set(ZipFile(wheel).namelist())
    kernels = {n for n in names if n.startswith(("mas_ext/_kernels", "mas_ext/_C"))}
    files = (p for p in (ROOT / "mas_ext").rglob("*") if p.suffix in (".py", ".html", ".typed"))
    missing = {str(p.relative_to(ROOT)) for p in files} - names
    assert not missing, missing
    assert len(kernels) == (2 if is_native(wheel) else 0), kernels
    metadata = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"mas_ext", metadata}


def readme_program(native: bool) -> str:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert example
    return BEFORE + example[1] + AFTER.format(native=native)


class Environment:
    """A virtual environment, and a folder to work in, away from the source."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder.resolve(), work
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "MAS_EXT", "CUDA"))
        }
        self.variables |= {"PATH": f"{self.folder}/bin", "CC": "/bin/false", "CXX": "/bin/false"}
        for name in ("tests", "benchmarks"):  # a few tests measure memory with the latter
            shutil.copytree(ROOT / name, self.work / name)
        shutil.copy(ROOT / "pyproject.toml", self.work)  # how pytest is set up

    def python(self, *arguments: str | Path) -> None:
        """Runs it where neither a compiler nor the source can be found."""
        found = [name for name in COMPILERS if shutil.which(name, path=self.variables["PATH"])]
        assert not found, found
        program = [self.folder / "bin/python", *arguments]
        subprocess.run(program, cwd=self.work, env=self.variables, check=True)

    def pip(self, command: str, *arguments: str | Path) -> None:
        self.python("-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments)

    def check(self, wheel: Path, torch: str, tests: Iterable[str]) -> None:
        check_contents(wheel)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        self.pip("install", "--no-compile", wheel.resolve(), torch)
        self.python("-c", readme_program(is_native(wheel)))
        if is_native(wheel):
            self.run_tests(tests)
        self.pip("uninstall", "--yes", "mas_ext")
        left = [str(path) for path in self.folder.rglob("*mas[-_]ext*")]
        assert not left, left

    def run_tests(self, tests: Iterable[str]) -> None:
        self.pip("install", "--no-compile", "pytest", "pytest-xdist", "hypothesis")
        # For a CPU, torch's inductor writes C++.
        quick = ("-q", "-n", "auto", "--maxprocesses", "4", "-k", "not inductor")
        self.python("-m", "pytest", *quick, *tests)


def by_python(wheels: Iterable[Path]) -> dict[str, list[Path]]:
    """The wheels by the Python that they are for: cp312 for python3.12, py3 for this one."""
    groups = defaultdict(list)
    for wheel in wheels:
        version = re.search(r"-cp3(\d+)-", wheel.name)
        groups[f"python3.{version[1] if version else sys.version_info.minor}"].append(wheel)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.wheels", description=__doc__)
    parser.add_argument("wheels", type=Path, nargs="+", metavar="WHEEL")
    parser.add_argument("--torch", default="torch", help="such as torch==2.13.0; or the newest")
    parser.add_argument("--tests", nargs="+", default=["tests/unit/operators"], metavar="PATH")
    parser.add_argument("--venv", type=Path, help="an environment with torch, not a fresh one")
    options = parser.parse_args()
    for python, wheels in by_python(options.wheels).items():
        with tempfile.TemporaryDirectory() as folder:
            if not options.venv:
                subprocess.run([python, "-m", "venv", f"{folder}/venv"], check=True)
            environment = Environment(options.venv or Path(folder, "venv"), Path(folder, "work"))
            for wheel in wheels:
                environment.check(wheel, options.torch, options.tests)
    print("All wheels work.")


if __name__ == "__main__":
    main()
