"""The processor and the versions, without which times mean nothing."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from typing import Any

import torch

import mas_ext
from mas_ext._environment import cpu_model, installed_version

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
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mas_ext": build["version"],
        "native": build["native"],
        "simd": build["simd"],
        "peers": {name: installed_version(name) for name in COMPETITORS},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two machines agree in everything but the date, so that times can be compared."""
    return {**one, "date": ""} == {**other, "date": ""}


def describe(info: dict[str, Any]) -> str:
    threads = f"{info['threads']} thread{'s' * (info['threads'] > 1)}"
    return (
        f"{info['cpu']}, {info['cores']} cores, {threads}, "
        f"torch {info['torch']}, mas_ext {info['mas_ext']} ({info['simd']}), {info['date'][:10]}"
    )
