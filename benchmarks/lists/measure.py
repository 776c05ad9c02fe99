"""One size of one job: correctness first, then interleaved rounds, then peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.entry import Tell
from benchmarks.lists import roofline
from benchmarks.lists.providers import Job, Provider
from benchmarks.lists.shapes import Size
from benchmarks.lists.state import State, assert_same, flatten, make_state
from benchmarks.tools import memory
from benchmarks.tools.timing import interleave, ratios

ROOFLINE = "roofline"
VALUE_TOLERANCE = 1e-2  # wide: float32 BLAS dots over 77 M numbers are off by 2e-3


@dataclass
class Measurement:
    """Seconds a call for each round and provider, in the order of the rounds."""

    title: str
    tensors: int
    parameters: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    extra_bytes: dict[str, int | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def ratios(self, name: str, to: str) -> list[float]:
        return ratios(self.seconds[name], self.seconds[to])


def assert_value(result: Tensor | None, expected: Tensor, what: str) -> None:
    assert result is not None, f"{what}: no value"
    actual = result.double()
    torch.testing.assert_close(
        actual, expected, rtol=VALUE_TOLERANCE, atol=0.0, msg=lambda text: f"{what}: {text}"
    )


def check(job: Job, providers: list[Provider], listed: State, flat: State) -> None:
    """Every provider against float64, from the same start; this also compiles what compiles."""
    expected, value = job.expected(listed)
    for provider in providers:
        state = flat if provider.flat else listed
        written = job.written(state)
        start = [t.detach().clone() for t in written]
        result = provider.step(state)
        what = f"{job.name}, {provider.name}"
        assert_same(written, expected, what)
        if value is not None:
            assert_value(result, value, what)
        with torch.no_grad():
            torch._foreach_copy_(written, start)


def measure(
    job: Job, size: Size, rounds: int, tell: Tell, budget: float | None = None, quick: bool = False
) -> Measurement:
    """Builds the state, checks every provider, times them, and weighs them."""
    torch.compiler.reset()  # the last size's graphs would count against the recompilation limit
    state = make_state(size.shapes())
    count = len(state.params)
    flat = flatten(state) if count > 1 and size.has_flat else state
    result = Measurement(size.title, count, state.numel)
    reasons = {p.name: p.skip_reason(count, size.has_flat, quick) for p in job.providers}
    result.skipped = {name: reason for name, reason in reasons.items() if reason}
    providers = [p for p in job.providers if p.name not in result.skipped]

    tell("checking against float64, compiling")
    roofline.check(len(job.streams(state)))
    check(job, providers, state, flat)
    tell(f"timing at most {rounds} rounds")
    steps = {p.name: bind(p, flat if p.flat else state) for p in providers}
    calls = {ROOFLINE: roofline.make(job.streams(state)), **steps}
    result.seconds = interleave(calls, rounds, budget=budget)
    result.extra_bytes = {name: memory.growth_of(step) for name, step in steps.items()}
    return result


def bind(provider: Provider, state: State) -> Callable[[], object]:
    return lambda: provider.step(state)
