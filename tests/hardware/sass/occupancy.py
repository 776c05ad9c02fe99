"""How many threads a multiprocessor holds at once, and how much they must have under way."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from tests.hardware.sass.listing import Kernel

WARP = 32
REGISTERS = 65536  # a multiprocessor
REGISTER_UNIT = 256  # a warp is given registers by this many
QUARTERS = 4  # a multiprocessor's parts, which share its warps evenly
SHARED_UNIT = 128
RESERVED = 1024  # bytes of shared memory in every block that are the system's


LATENCY = 1e-6  # seconds from a load to its value while memory is busy: a cautious round figure


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor (CUDA C++ Programming Guide, technical specifications), and its share
    of the memory's bytes a second on the largest GPU of the architecture (its data sheet)."""

    warps: int
    blocks: int
    shared: int
    bandwidth: float


LIMITS = {
    80: Limits(64, 32, 164 * 1024, 2.04e12 / 108),  # A100
    90: Limits(64, 32, 228 * 1024, 4.8e12 / 132),  # H200
    100: Limits(64, 32, 228 * 1024, 8.0e12 / 148),  # B200
    120: Limits(48, 24, 100 * 1024, 1.79e12 / 170),  # RTX 5090
}


def shared_bytes(kernel: Kernel) -> int:
    """A block's own. From 9.0 on the listing has the system's share in it."""
    listed_reserve = RESERVED if kernel.architecture >= 90 else 0
    return max(kernel.shared - listed_reserve, 0)


def blocks(kernel: Kernel) -> int:
    """A multiprocessor."""
    limits = LIMITS[kernel.architecture]
    warps = ceil(kernel.threads / WARP)
    registers = ceil(kernel.registers * WARP / REGISTER_UNIT) * REGISTER_UNIT
    room = REGISTERS // registers // QUARTERS * QUARTERS
    shared = ceil((shared_bytes(kernel) + RESERVED) / SHARED_UNIT) * SHARED_UNIT
    return min(limits.blocks, limits.warps // warps, room // warps, limits.shared // shared)


def threads(kernel: Kernel) -> int:
    """A multiprocessor."""
    return blocks(kernel) * kernel.threads


def occupancy(kernel: Kernel) -> float:
    """Of the threads that a multiprocessor can hold, the share it does."""
    return threads(kernel) / (LIMITS[kernel.architecture].warps * WARP)


def bytes_that_saturate(architecture: int) -> float:
    """Under way on a multiprocessor, they keep the memory busy (Little's law)."""
    return LIMITS[architecture].bandwidth * LATENCY
