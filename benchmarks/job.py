"""One pass over lists of tensors, done by several providers and compared with the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.measure import interleave, ratios, spread
from benchmarks.state import SIZES, Size, State, assert_same, flatten, make_state

Step = Callable[[State], Tensor | None]
Expected = Callable[[State], tuple[list[Tensor], Tensor | None]]
OURS = "mas_ext"
QUICK_TENSORS = 1  # the most that are compiled in a quick run
VALUE_TOLERANCE = 1e-2  # wide: float32 BLAS dots over 77 M numbers are off by 2e-3


@dataclass(frozen=True)
class Provider:
    """An implementation of a job.

    Attributes:
        moved: bytes that its operations read and write per float32 parameter; a cache line that has
            to be read before it is written is not counted.
        flat: it gets the state as one tensor per list.
        most_tensors: more would take too long to compile (torch.compile emits a kernel per tensor).
        expected: as that of the job, for a variant of it; None for the job's own.
    """

    name: str
    step: Step
    moved: int
    flat: bool = False
    most_tensors: int | None = None
    expected: Expected | None = None

    def skip_reason(self, tensors: int, has_flat: bool, quick: bool = False) -> str | None:
        if self.flat and tensors == 1:
            return "the list is one flat tensor already"
        if self.flat and not has_flat:
            return "a second copy of this size would not fit small machines"
        most = self.most_tensors
        if most is not None and tensors > (min(most, QUICK_TENSORS) if quick else most):
            return f"compiling {tensors:,} tensors takes too long"
        return None


@dataclass(frozen=True)
class Job:
    """A task and its providers, ours first.

    Attributes:
        bytes_per_parameter: what one pass has to move, in float32.
        written: the tensors that the task changes.
        expected: their values after it, and the value it returns if any, from float64.
        streams: the lists that the roofline reads, those that it writes first.
        sizes, quick_sizes: keys of ``SIZES``.
    """

    name: str
    title: str
    about: str
    bytes_per_parameter: int
    providers: Sequence[Provider]
    written: Callable[[State], list[Tensor]]
    expected: Expected
    streams: Callable[[State], list[list[Tensor]]]
    sizes: Sequence[str] = tuple(SIZES)
    quick_sizes: Sequence[str] = ("mlp",)


def compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """For fixed shapes and as one graph: the most that can be asked of torch.compile."""
    return torch.compile(step, dynamic=False, fullgraph=True)


def _variants(providers: Sequence[Provider]) -> list[Expected]:
    return [provider.expected for provider in providers if provider.expected is not None]


def check(job: Job, providers: Sequence[Provider], listed: State, flat: State) -> None:
    """Verifies every provider against float64, from the same state; compiles what compiles."""
    every = {expect: expect(listed) for expect in (job.expected, *_variants(providers))}
    for provider in providers:
        expected, value = every[provider.expected or job.expected]
        state = flat if provider.flat else listed
        written = job.written(state)
        start = [t.detach().clone() for t in written]
        result, what = provider.step(state), f"{job.name}, {provider.name}"
        assert_same(written, expected, what)
        if value is not None:
            assert result is not None, f"{what}: no value"
            torch.testing.assert_close(
                result.double(), value, rtol=VALUE_TOLERANCE, atol=0.0, msg=f"{what}: the value"
            )
        with torch.no_grad():
            for tensor, value_before in zip(written, start, strict=True):
                tensor.copy_(value_before)


def measure(job: Job, size: Size, options: Options, budget: float | None = None) -> Result:
    """One size: every provider is verified, then timed in interleaved rounds."""
    torch.compiler.reset()  # the last size's graphs would count against the recompilation limit
    state = make_state(size.shapes(), device=options.device)
    count = len(state.params)
    flat = flatten(state) if count > 1 and size.has_flat else state
    reasons = {p.name: p.skip_reason(count, size.has_flat, options.quick) for p in job.providers}
    providers = [p for p in job.providers if reasons[p.name] is None]

    options.progress(f"{size.title}: verifying against float64, compiling")
    check(job, providers, state, flat)
    options.progress(f"{size.title}: timing at most {options.rounds} rounds")
    steps = {p.name: partial(p.step, flat if p.flat else state) for p in providers}
    calls = {roofline.NAME: _yardstick(job, state), **steps}
    seconds = interleave(calls, options.rounds, budget=budget)
    return {
        "title": size.title,
        "parameters": state.numel,
        "rounds": len(seconds[roofline.NAME]),
        "providers": {name: _summary(job, state.numel, seconds, name) for name in seconds},
        "skipped": {name: reason for name, reason in reasons.items() if reason},
    }


def _yardstick(job: Job, state: State) -> Callable[[], None]:
    device = state.params[0].device
    if device.type == "cpu":
        roofline.check(len(job.streams(state)))
        return roofline.make(job.streams(state))
    return roofline.copy_of(job.bytes_per_parameter * state.numel, device)


def _summary(job: Job, numel: int, seconds: dict[str, list[float]], name: str) -> Result:
    """Ratios are medians of the ratios within a round, not ratios of medians."""
    moved = {p.name: p.moved for p in job.providers} | {roofline.NAME: job.bytes_per_parameter}
    mine, limit = seconds[name], seconds[roofline.NAME]
    return {
        "seconds": spread(mine),
        "time_over_ours": spread(ratios(mine, seconds[OURS])),
        "time_over_roofline": spread(ratios(mine, limit)),
        "fraction_of_roofline": spread(ratios(limit, mine)),
        "gigabytes_per_second": job.bytes_per_parameter * numel / spread(mine)["median"] / 1e9,
        "bytes_moved": moved[name] * numel,
    }


def _run(job: Job, options: Options) -> Iterator[tuple[str, Result]]:
    asked = options.sizes or (job.quick_sizes if options.quick else job.sizes)
    names = [name for name in asked if name in job.sizes]
    for name in names:
        yield name, measure(job, SIZES[name], options, options.seconds / len(names))


def benchmark_of(job: Job) -> Benchmark:
    return Benchmark(
        job.name, job.title, job.about, partial(_run, job), seconds=(5 * len(job.sizes), 1)
    )
