"""The processor and the versions, without which times mean nothing."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mas_ext

COMPETITORS = (
    "avalanche-lib",
    "opacus",
    "backpack-for-pytorch",
    "nngeometry",
    "torchvision",
    "transformers",
)


def machine() -> dict[str, Any]:
    build = mas_ext.build_info()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mas_ext": build["version"],
        "native": build["native"],
        "simd": build["simd"],
        "peers": {name: _version(name) for name in COMPETITORS},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two machines agree in everything but the date, so that times can be compared."""
    return {**one, "date": ""} == {**other, "date": ""}


def describe(info: dict[str, Any]) -> str:
    return (
        f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads, "
        f"torch {info['torch']}, mas_ext {info['mas_ext']} ({info['simd']}), {info['date'][:10]}"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
