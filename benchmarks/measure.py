"""Time in interleaved rounds, and peak memory.

Memory is the high-water mark of the process's resident memory, which Linux lets a process reset.
torch's profiler would only see torch's tensors: neither what oneDNN and BLAS allocate nor scratch
memory inside a kernel, ours included.
"""

from __future__ import annotations

import ctypes
import gc
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

SHORTEST_SAMPLE = 0.005  # seconds; shorter calls are repeated within a sample
LONG = 0.5  # seconds; one call that takes longer is enough to warm up
FEWEST_ROUNDS = 3  # even beyond the time limit, or there would be no quartiles
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def spread(values: Sequence[float]) -> dict[str, float]:
    """First quartile, median and third quartile."""
    if len(values) < 2:
        return dict.fromkeys(("q1", "median", "q3"), values[0])
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return dict(zip(("q1", "median", "q3"), quartiles, strict=True))


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Round by round, because what slows down the machine for a while slows down both."""
    return [x / y for x, y in zip(a, b, strict=True)]


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(ratios(a, b))


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """If CUDA is in use, until the device has done what it was given."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    begin = perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (perf_counter() - begin) / calls


def _warm_up(call: Callable[[], object]) -> tuple[int, float]:
    """How many calls a sample takes, and about how many seconds those take."""
    once = seconds_per_call(call, 1)
    if once > LONG:
        return 1, once
    once = seconds_per_call(call, 1)
    calls = max(1, round(SHORTEST_SAMPLE / once + 0.5))
    return calls, calls * once


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    every: Mapping[str, int] | None = None,
    budget: float | None = None,
    sample: Callable[[Any, int], Any] = seconds_per_call,
) -> dict[str, list[Any]]:
    """Times every call once per round, in a new random order each round.

    Args:
        calls: what is timed, by name.
        rounds: the largest number of rounds.
        every: name → n, for a call that only takes part in every n-th round, from the first on.
        budget: time limit of all rounds in seconds; at least three rounds are made.
        sample: times a number of calls; its results are kept.

    Returns:
        For each name, one sample per round (seconds per call by default).
    """
    every = every or {}
    warm = {name: _warm_up(call) for name, call in calls.items()}
    if budget is not None:
        per_round = sum(seconds / every.get(name, 1) for name, (_, seconds) in warm.items())
        rounds = min(rounds, max(FEWEST_ROUNDS, int(budget / per_round)))
    samples: dict[str, list[Any]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.freeze()  # or every collection below would walk through all imported modules
    gc.disable()
    try:
        for number in range(rounds):
            gc.collect()  # here, and not within a sample
            shuffle(order)
            for name in order:
                if number % every.get(name, 1) == 0:
                    samples[name].append(sample(calls[name], warm[name][0]))
    finally:
        gc.enable()
        gc.unfreeze()
    return samples


def can_measure_memory() -> bool:
    return _CLEAR.exists()


def resident_bytes() -> int:
    return _memory("VmRSS")


def return_free_memory() -> None:
    """Gives free memory back to the system, so that the next peak only contains what is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_of(call: Callable[[], object]) -> int:
    """Resident bytes at the peak of a call."""
    _CLEAR.write_text("5")
    call()
    return _memory("VmHWM")


def _memory(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) * 1024
