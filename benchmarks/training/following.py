"""What it costs that λ follows a drift budget: a measurement, over the steps between two."""

from __future__ import annotations

from benchmarks.benchmark import Result
from benchmarks.measure import interleave, spread
from benchmarks.models import Workload
from benchmarks.training.providers import Step, attached
from benchmarks.training.setting import Setting, make
from mas_ext import MAS, DriftBudget
from mas_ext._drift.tracker import REGULAR

EVERY_STEP, NEVER = 1, 10**9


def step(workload: Workload, every: int) -> Step:
    """A proximal training step that measures the drift in every so many steps."""
    s: Setting = make(workload)
    s.mas = MAS(s.model, budget=DriftBudget(every=every))
    s.mas.consolidate([s.inputs], estimator="batch")
    return attached(s, "proximal")


def measure(workload: Workload, rounds: int, budget: float) -> Result:
    """The time of a measurement, by steps with and without one, and its share of the training."""
    calls = {"with": step(workload, EVERY_STEP), "without": step(workload, NEVER)}
    for _ in range(REGULAR):  # the measurements at the beginning of a task
        calls["without"]()
    seconds = interleave(calls, rounds, budget=budget)
    pairs = list(zip(seconds["with"], seconds["without"], strict=True))
    return {
        "every": REGULAR,
        "rounds": len(pairs),
        "seconds": spread([a - b for a, b in pairs]),
        "share": spread([(a - b) / (REGULAR * b) for a, b in pairs]),
    }
