"""What a bug report needs to say: what was compiled, the machine, and the libraries around it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mas_ext._operators.native import build_info

#: Those that mas_ext reads or writes files with, or works together with.
LIBRARIES = (
    "numpy",
    "safetensors",
    "transformers",
    "accelerate",
    "peft",
    "lightning",
    "avalanche-lib",
    "bitsandbytes",
    "torchao",
)


def environment() -> dict[str, Any]:
    """What ``mas-ext info`` shows: ``build_info()``, the machine, and versions of libraries."""
    return {
        **build_info(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
        "libraries": {name: installed_version(name) or "not installed" for name in LIBRARIES},
    }


def cpu_model() -> str:
    """The processor's name, as precisely as the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpus() -> list[str]:
    """Each GPU that torch sees, or the error that it gives instead."""
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [_gpu(torch.cuda.get_device_properties(i)) for i in range(count)]
    except RuntimeError as error:  # a report is needed most where something is broken
        return ["cannot be read: " + str(error).partition("\n")[0]]


def _gpu(card: Any) -> str:
    memory = card.total_memory / 2**30
    return f"{card.name} (compute capability {card.major}.{card.minor}, {memory:.0f} GiB)"


def installed_version(distribution: str) -> str | None:
    """The version of a distribution, or None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
