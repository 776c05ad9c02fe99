"""Interleaved rounds: one process, every provider once a round, in a new order each round."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

SHORTEST_SAMPLE = 0.005  # seconds; shorter ones are repeated within a measurement
LONG = 0.5  # seconds; what takes longer is warm after a call
FEWEST_ROUNDS = 3  # whatever the budget, or there are no quartiles

Calls = Mapping[str, Callable[[], object]]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def spread(values: list[float]) -> dict[str, float]:
    first, median, third = quartiles(values)
    return {"q1": first, "median": median, "q3": third}


def _sample(call: Callable[[], object], calls: int) -> float:
    """Seconds a call, over some calls."""
    begin = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - begin) / calls


def _warm(call: Callable[[], object]) -> tuple[int, float]:
    """How often to call within a measurement, and about how many seconds that takes."""
    once = _sample(call, 1)
    if once > LONG:
        return 1, once
    once = _sample(call, 1)
    calls = max(1, round(SHORTEST_SAMPLE / once + 0.5))
    return calls, calls * once


def interleave(
    calls: Calls,
    rounds: int,
    every: Mapping[str, int] | None = None,
    budget: float | None = None,
    sample: Callable[[Any, int], Any] = _sample,
) -> dict[str, list[Any]]:
    """Times every call once a round, in a new order each round: no one always follows another.

    Args:
        calls: name → what is timed.
        rounds: at most.
        every: name → n, for a call that takes part in each n-th round only, from the first.
        budget: seconds that the rounds may take; fewer rounds if need be, but three.
        sample: times a call so many times; what it returns is kept, seconds a call or several.

    Returns:
        Name → seconds a call, a round after the other.
    """
    every = every or {}
    warm = {name: _warm(call) for name, call in calls.items()}
    if budget is not None:
        a_round = sum(seconds / every.get(name, 1) for name, (_, seconds) in warm.items())
        rounds = min(rounds, max(FEWEST_ROUNDS, int(budget / a_round)))
    seconds: dict[str, list[Any]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            gc.collect()  # or cycles that a call leaves pile up
            shuffle(order)
            for name in order:
                if number % every.get(name, 1) == 0:
                    seconds[name].append(sample(calls[name], warm[name][0]))
    finally:
        gc.enable()
    return seconds


def ratios(a: list[float], b: list[float]) -> list[float]:
    """Round by round: what disturbs the machine for a while disturbs both."""
    return [x / y for x, y in zip(a, b, strict=True)]


def differences(a: list[float], b: list[float]) -> list[float]:
    """Round by round."""
    return [x - y for x, y in zip(a, b, strict=True)]
