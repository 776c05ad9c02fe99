"""Seconds a call: CUDA events on a card, the clock in a rehearsal; every provider once a round."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

import torch

Call = Callable[[], object]
SHORTEST_SAMPLE = 0.002  # seconds; shorter calls are repeated within a sample


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def sample(call: Call, calls: int, device: str) -> float:
    """Seconds a call, of so many behind one another."""
    if device == "cpu":
        begin = perf_counter()
        for _ in range(calls):
            call()
        return (perf_counter() - begin) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def calls_in_a_sample(call: Call, device: str) -> int:
    sample(call, 1, device)
    return max(1, min(1000, round(SHORTEST_SAMPLE / sample(call, 1, device) + 0.5)))


def interleaved(calls: Mapping[str, Call], rounds: int, device: str) -> dict[str, list[float]]:
    """In a new order each round, so that no one always follows another."""
    inner = {name: calls_in_a_sample(call, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                seconds[name].append(sample(calls[name], inner[name], device))
    finally:
        gc.enable()
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median of the rounds' ratios: what disturbs the machine for a while disturbs both."""
    pairs = zip(seconds[name], seconds[to], strict=True)
    return statistics.median(a / b for a, b in pairs)
