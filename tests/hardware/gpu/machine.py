"""What results mean nothing without: the card, its driver, the versions."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from tests.hardware.gpu.checks import DidNotRun, NeedsGpu, Session


def run(session: Session) -> None:
    session.figures.update(description())
    if session.rehearsal:
        session.check("a GPU that torch can use", needs_gpu)
    else:
        session.check("a GPU that torch can use", there_is_a_gpu)


def needs_gpu() -> str:
    raise NeedsGpu("a rehearsal on the CPU")


def there_is_a_gpu() -> str:
    if not torch.cuda.is_available():
        built = "a build without CUDA" if torch.version.cuda is None else "a CUDA build"
        raise DidNotRun(
            f"torch {torch.__version__}, {built}, finds no GPU that it can use; "
            "--device cpu is a rehearsal without one"
        )
    torch.ones(1, device="cuda").add_(1).item()
    return torch.cuda.get_device_name()


def description() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "nvcc": nvcc_version(),
        "driver": driver(),
        "devices": [device(i) for i in range(torch.cuda.device_count())],
    }


def device(index: int) -> str:
    p = torch.cuda.get_device_properties(index)
    memory, l2 = p.total_memory / 1e9, getattr(p, "L2_cache_size", 0) / 1e6
    return (
        f"{p.name}, sm_{p.major}{p.minor}, {memory:.1f} GB, "
        f"{p.multi_processor_count} multiprocessors, {l2:.0f} MB L2"
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def nvcc_version() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "not on the PATH"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release [\d.]+, V([\d.]+)", said.stdout)
    return release[1] if release else "unknown"


def driver() -> str:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "unknown (no nvidia-smi)"
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return "unknown (nvidia-smi does not answer)"
    return said.stdout.split("\n")[0].strip() or "unknown"
