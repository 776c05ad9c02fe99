"""One workload: correctness first, then interleaved rounds, then memory in separate processes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from benchmarks.per_sample import memory
from benchmarks.per_sample.providers import (
    BATCH,
    BATCH_MEANS,
    BY_HAND,
    OURS,
    SINGLY,
    UNCHUNKED,
    VMAP,
    Prepare,
    Step,
    Unsupported,
    providers,
    take,
    vmapped,
)
from benchmarks.per_sample.workloads import WORKLOADS, Workload
from benchmarks.tools.timing import interleave
from mas_ext import estimate_importance

TOLERANCE = 1e-3  # float32
MOST_ROUNDS_LEFT_OUT = 4  # a slow provider takes part in every fourth round, or more often
WEIGHED = (OURS, BY_HAND, SINGLY)  # a process each, most of whose time is its start
FRESH_MODELS = 3  # whose first call is timed


@dataclass
class Measurement:
    """Seconds a call by provider; the n-th call was in round n · every[provider]."""

    workload: Workload
    parameters: int
    chunk: int  # the best for vmap
    chunk_seconds: dict[int, float]  # a sample, by chunk
    rounds: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    every: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    kept: float = 1.0  # the share of Ω that batch-mean finds
    coverage: dict[str, int] = field(default_factory=dict)  # path → number of parameters
    first_call: float = 0.0  # seconds
    used: dict[str, int | None] = field(default_factory=dict)  # bytes at the peak

    @property
    def reference(self) -> str:
        """The faster of the two inexact estimates."""
        return min(BATCH_MEANS, key=lambda name: statistics.median(self.seconds[name]))

    def ratios(self, name: str, to: str) -> list[float]:
        """Round by round; ``to`` takes part in every round."""
        return [
            a / b
            for a, b in zip(self.seconds[name], self.seconds[to][:: self.every[name]], strict=True)
        ]


def error(omega: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The worst parameter's ‖Ω − expected‖₁ / ‖expected‖₁, with a floor for those that are zero."""
    assert omega.keys() == expected.keys(), omega.keys() ^ expected.keys()
    floor = 1e-6 * max(e.mean().item() for e in expected.values())

    def of(name: str) -> float:
        e = expected[name].double()
        return ((omega[name].double() - e).abs().mean() / e.mean().clamp_min(floor)).item()

    return max((of(name), name) for name in expected)


def _mass(omega: Mapping[str, Tensor]) -> float:
    return sum(o.double().sum().item() for o in omega.values())


def _once(step: Step) -> tuple[float, Mapping[str, Tensor]]:
    begin = perf_counter()
    omega = step()
    return perf_counter() - begin, omega


def best_chunk(workload: Workload, candidates: Iterable[int]) -> tuple[int, dict[int, float]]:
    """The chunk that gives vmap the least time a sample, and every candidate's."""
    model, batch, seconds = workload.model(), workload.batch(), {}
    for length in candidates:
        step = vmapped(model, take(batch, 0, length), length)
        step()
        seconds[length] = min(_once(step)[0] for _ in range(2)) / length
    return min(seconds, key=seconds.__getitem__), seconds


def _chunk_candidates(batch_size: int, quick: bool) -> list[int]:
    every = [2**power for power in range(batch_size.bit_length()) if 2**power <= batch_size]
    return [c for c in every if c in (4, 16)] if quick else every


def check(
    result: Measurement, ways: Mapping[str, Prepare], tell: Callable[[str], None]
) -> tuple[dict[str, Step], dict[str, float]]:
    """What can be timed, and about how long a call takes: all that agree with batch size 1."""
    steps, seconds = {}, {}
    expected = ways[SINGLY](result.workload.model(), result.workload.batch())()
    for name, prepare in ways.items():
        tell(f"checking {name}")
        try:
            step = prepare(result.workload.model(), result.workload.batch())
            seconds[name], omega = _once(step)
            _check_against(result, name, omega, expected)
        except Exception as reason:
            if name in (OURS, SINGLY, *BATCH_MEANS):
                raise
            result.skipped[name] = _in_a_line(reason)
            continue
        steps[name] = step
    return steps, seconds


def _check_against(
    result: Measurement, name: str, omega: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    if name in BATCH_MEANS:
        kept = _mass(omega) / _mass(expected)
        assert kept <= 1 + TOLERANCE, f"{name} is {kept} of Ω, of which it can only be a part"
        assert name == BY_HAND or abs(kept - result.kept) <= TOLERANCE, (kept, result.kept)
        result.kept = kept
        return
    result.errors[name], worst = error(omega, expected)
    if not result.errors[name] <= TOLERANCE:
        raise Unsupported(f"wrong by {result.errors[name]:.0%} of Ω of {worst}")


def _in_a_line(reason: Exception) -> str:
    text = " ".join(str(reason).split())
    if isinstance(reason, Unsupported):
        return text
    return f"{type(reason).__name__}: {text[:100]}{'…' if len(text) > 100 else ''}"


def _every(seconds: Mapping[str, float], rounds: int) -> dict[str, int]:
    """Slow ones in fewer rounds; ours and what it is compared with in all."""
    fastest = min(seconds.values())
    most = min(MOST_ROUNDS_LEFT_OUT, max(1, (rounds - 1) // 2))
    every = {name: min(most, max(1, int(s / fastest / 4))) for name, s in seconds.items()}
    return {**every, OURS: 1, BY_HAND: 1, BATCH: 1}


def first_call(workload: Workload) -> tuple[float, dict[str, int]]:
    """Ours on a model that it has not seen, in a process that is warm; and which path served."""
    batch, seconds = workload.batch(), []
    for _ in range(FRESH_MODELS):
        model = workload.model()
        begin = perf_counter()
        importance = estimate_importance(model, [batch])
        seconds.append(perf_counter() - begin)
    return statistics.median(seconds), dict(Counter(importance.coverage.values()))


def weigh(name: str, chosen: Iterable[str], chunk: int) -> dict[str, int | None]:
    """Bytes at the peak of the providers, of vmap in one go, and of what all have to do.

    Two processes at a time: it is not their time that is measured.
    """
    if not memory.is_available():
        return {}
    weighed = (memory.PLAIN, *chosen, UNCHUNKED)
    with ThreadPoolExecutor(2) as pool:
        used = pool.map(lambda provider: memory.used_by(name, provider, chunk), weighed)
        return dict(zip(weighed, used, strict=True))


def measure(
    name: str, rounds: int, quick: bool, tell: Callable[[str], None], budget: float | None = None
) -> Measurement:
    workload = WORKLOADS[name]
    parameters = sum(p.numel() for p in workload.model().parameters())
    tell(f"looking for the best chunk of {VMAP}")
    candidates = _chunk_candidates(workload.batch_size, quick)
    chunk, chunk_seconds = best_chunk(workload, candidates)
    result = Measurement(workload, parameters, chunk, chunk_seconds, rounds)
    steps, estimates = check(result, providers(chunk), tell)
    tell(f"timing at most {rounds} rounds")
    result.every = _every({name: estimates[name] for name in steps}, rounds)
    result.seconds = interleave(steps, rounds, result.every, budget)
    result.rounds = len(result.seconds[OURS])
    result.first_call, result.coverage = first_call(workload)
    tell("peak memory, a process each")
    result.used = {} if quick else weigh(name, WEIGHED, chunk)
    return result
