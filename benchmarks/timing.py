"""Correctness first, then interleaved rounds: one process, every provider once a round."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.providers import Benchmark, Provider
from benchmarks.shapes import Size
from benchmarks.state import State, assert_same, flatten, make_state

ROOFLINE = "roofline"
VALUE_TOLERANCE = 2e-3  # wide: float32 BLAS dots over GPT-2's shapes are off by 2.5e-4
SHORTEST_SAMPLE = 0.005  # seconds; shorter ones are repeated within a measurement


@dataclass
class Measurement:
    """Seconds a call for each round and provider, in the order of the rounds."""

    title: str
    tensors: int
    parameters: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def ratios(self, name: str, to: str) -> list[float]:
        """Round by round: what disturbs the machine for a while disturbs both."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def assert_value(result: Tensor | None, expected: Tensor, what: str) -> None:
    assert result is not None, f"{what}: no value"
    actual = result.double()
    torch.testing.assert_close(
        actual, expected, rtol=VALUE_TOLERANCE, atol=0.0, msg=lambda text: f"{what}: {text}"
    )


def check(benchmark: Benchmark, providers: list[Provider], listed: State, flat: State) -> None:
    """Every provider against float64, from the same start; this also compiles what compiles."""
    expected, value = benchmark.expected(listed)
    for provider in providers:
        state = flat if provider.flat else listed
        written = benchmark.written(state)
        start = [t.detach().clone() for t in written]
        result = provider.step(state)
        what = f"{benchmark.name}, {provider.name}"
        assert_same(written, expected, what)
        if value is not None:
            assert_value(result, value, what)
        torch._foreach_copy_(written, start)


def _calls_per_sample(call: Callable[[], object]) -> int:
    call()
    begin = perf_counter()
    call()
    return max(1, round(SHORTEST_SAMPLE / (perf_counter() - begin) + 0.5))


def _sample(call: Callable[[], object], calls: int) -> float:
    begin = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - begin) / calls


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, every: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Times every call once a round, in a new order each round: no one always follows another.

    ``every``: name → n, for a call that takes part in each n-th round only, from the first.
    """
    every = every or {}
    inner = {name: _calls_per_sample(call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            gc.collect()  # or cycles that a call leaves pile up
            shuffle(order)
            for name in order:
                if number % every.get(name, 1) == 0:
                    seconds[name].append(_sample(calls[name], inner[name]))
    finally:
        gc.enable()
    return seconds


def measure(
    benchmark: Benchmark, size: Size, rounds: int, report: Callable[[str], None]
) -> Measurement:
    """One size: builds the state, checks every provider, then times them."""
    torch.compiler.reset()  # the last size's graphs would count against the recompilation limit
    state = make_state(size.shapes())
    flat = flatten(state) if len(state.params) > 1 else state
    result = Measurement(size.title, len(state.params), state.numel)
    reasons = {p.name: p.skip_reason(state) for p in benchmark.providers}
    result.skipped = {name: reason for name, reason in reasons.items() if reason}
    providers = [p for p in benchmark.providers if p.name not in result.skipped]

    report("checking against float64, compiling")
    roofline.check(len(benchmark.streams(state)))
    check(benchmark, providers, state, flat)
    report(f"timing {rounds} rounds")
    calls: dict[str, Callable[[], object]] = {ROOFLINE: roofline.make(benchmark.streams(state))}
    for p in providers:
        calls[p.name] = lambda step=p.step, s=(flat if p.flat else state): step(s)
    result.seconds = interleave(calls, rounds)
    return result
