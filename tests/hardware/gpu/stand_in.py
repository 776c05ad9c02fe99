"""A stand-in for a card, for rehearsals: as little of torch.cuda as the steps use.

Nothing is shown about CUDA, but hardly a line of the steps runs for the first time on a card.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch

KERNEL = 1.0  # seconds that a long kernel takes
MEMORY = 1 << 40

_busy_until = 0.0
_mode = "default"


class Event:
    def record(self) -> None:
        """Comes behind all that the device was given."""

    def query(self) -> bool:
        return time.perf_counter() >= _busy_until


def _sleep(cycles: int) -> None:
    global _busy_until
    _busy_until = time.perf_counter() + KERNEL


def synchronize() -> None:
    global _busy_until
    _busy_until = 0.0


def set_sync_debug_mode(mode: str) -> None:
    global _mode
    _mode = mode


def item(tensor: torch.Tensor) -> Any:
    if _mode == "error":
        raise RuntimeError("called a synchronizing CUDA operation")
    return torch._C.TensorBase.item(tensor)


def install() -> None:
    for name, replacement in {
        "Event": Event,
        "Stream": nullcontext,
        "stream": lambda stream: stream,
        "_sleep": _sleep,
        "synchronize": synchronize,
        "set_sync_debug_mode": set_sync_debug_mode,
        "mem_get_info": lambda: (MEMORY, MEMORY),
        "empty_cache": lambda: None,
    }.items():
        setattr(torch.cuda, name, replacement)
    torch.Tensor.item = item
