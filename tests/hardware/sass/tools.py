"""NVIDIA's disassembler, and names as C++ spells them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path


def cuobjdump() -> str:
    """The one that triton brings, which every CUDA build of torch installs; else a toolkit's."""
    triton = find_spec("triton")
    packages = triton.submodule_search_locations if triton else None
    folders = [Path(package, "backends", "nvidia", "bin") for package in packages or []]
    if home := os.getenv("CUDA_HOME"):
        folders.append(Path(home, "bin"))
    path = os.pathsep.join([*map(str, folders), os.getenv("PATH", "")])
    found = shutil.which("cuobjdump", path=path)
    if found is None:
        raise FileNotFoundError("no cuobjdump: install triton or a CUDA toolkit, or set CUDA_HOME")
    return found


def dump(library: Path, what: str) -> str:
    """What `cuobjdump` prints: `what` is -sass, -res-usage or -elf."""
    command = [cuobjdump(), what, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def demangle(symbol: str) -> str:
    """By the C++ runtime, which torch has loaded anyway."""
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    name = runtime.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not name:
        raise ValueError(f"not a C++ name: {symbol}")
    try:
        return ctypes.string_at(name).decode()
    finally:
        runtime.free(ctypes.c_void_p(name))
