"""What results mean nothing without: the card, its driver, the versions."""

from __future__ import annotations

import platform
import re
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
    return first_match(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text())


def nvcc_version() -> str:
    return first_match(r"release [\d.]+, V([\d.]+)", output_of("nvcc", "--version"))


def driver() -> str:
    words = "--query-gpu=driver_version", "--format=csv,noheader"
    return first_match(r"^(\S+)$", output_of("nvidia-smi", *words))


def first_match(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else "unknown"


def output_of(*command: str) -> str:
    """Nothing where the program is missing or does not answer."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout
