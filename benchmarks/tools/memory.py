"""Peak memory: the high-water mark of resident memory, which Linux lets a process reset.

Not what torch's profiler adds up: that sees torch's tensors only, neither what oneDNN and BLAS
allocate for themselves nor scratch memory inside a kernel, ours included.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_available() -> bool:
    return _CLEAR.exists()


def resident() -> int:
    """Bytes now."""
    return _bytes("VmRSS")


def settle() -> None:
    """Gives back to the system what is free, so that the next peak is of what is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_of(call: Callable[[], object]) -> int:
    """Resident bytes at the peak of a call."""
    _CLEAR.write_text("5")
    call()
    return _bytes("VmHWM")


def growth_of(call: Callable[[], object]) -> int | None:
    """Bytes that a call adds at its peak to what is resident before; None where nothing tells."""
    if not is_available():
        return None
    settle()
    before = resident()
    return max(0, peak_of(call) - before)


def _bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) * 1024
