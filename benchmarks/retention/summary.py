"""The lowest perplexity on the new text that a method reaches within a limit of the drift.

Along a curve, between two tests, the logarithm of the perplexity is taken to be linear in the root
of the drift, which grows with the distance from the start.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.benchmark import Result
from benchmarks.measure import deviation
from benchmarks.retention.methods import BY_EWC, BY_MAS, METHODS, STEPS, TRAININGS, Method
from benchmarks.retention.texts import WATCHED

LIMITS = (0.02, 0.05, 0.1)  # of the drift on held-out text, in nats per prediction
TYPICAL = 0.05  # the limit at which the other figures are shown
PLAIN = "plain"


@dataclass(frozen=True)
class Figures:
    """What was measured at a point of a curve, or lies between two.

    Attributes:
        distance: the root of the drift.
        losses: logarithms of the perplexities, by text.
        answered: the share of questions.
    """

    distance: float
    losses: dict[str, float]
    answered: float

    @classmethod
    def of(cls, point: Result) -> Figures:
        losses = {name: math.log(value) for name, value in point["perplexity"].items()}
        return cls(math.sqrt(max(0.0, point["drift"])), losses, point["answered"])

    def towards(self, other: Figures, share: float) -> Figures:
        def mixed(a: float, b: float) -> float:
            return a + share * (b - a)

        losses = {name: mixed(loss, other.losses[name]) for name, loss in self.losses.items()}
        return Figures(
            mixed(self.distance, other.distance), losses, mixed(self.answered, other.answered)
        )

    def over(self, start: Figures, name: str) -> float:
        """The perplexity relative to that at the start."""
        return math.exp(self.losses[name] - start.losses[name])


def start(result: Result) -> Figures:
    return Figures.of(result["trainings"][PLAIN][0]["before"])


def within(result: Result, method: Method, limit: float) -> list[Figures]:
    """For each seed, the point of the method's curves that is best within a limit."""
    return [
        min(_reached(run, method.way, limit), key=lambda point: point.losses["new"])
        for run in result["trainings"][method.training]
    ]


def _reached(run: Result, way: str, limit: float) -> Iterator[Figures]:
    """The points of a curve within a limit, and where it crosses the limit."""
    most, points = math.sqrt(limit), list(map(Figures.of, _curve(run, way)))
    yield from (point for point in points if point.distance <= most)
    for a, b in pairwise(points):
        if min(a.distance, b.distance) <= most < max(a.distance, b.distance):
            yield a.towards(b, (most - a.distance) / (b.distance - a.distance))


def _curve(run: Result, way: str) -> list[Result]:
    """From the start to the end of training."""
    steps = run["curves"][STEPS]
    if way == STEPS:
        return [run["before"], *steps]
    return [run["before"], *run["curves"][way], steps[-1]]


def perplexity(result: Result, method: Method, limit: float) -> tuple[float, float]:
    """Mean and standard deviation over seeds, on the new text."""
    values = [math.exp(point.losses["new"]) for point in within(result, method, limit)]
    return statistics.mean(values), deviation(values)


def left(result: Result, method: Method, limit: float = TYPICAL) -> dict[str, float]:
    """Within a limit: perplexities relative to the start, and the questions answered."""
    points, begun = within(result, method, limit), start(result)
    ratios = {n: statistics.mean(point.over(begun, n) for point in points) for n in WATCHED}
    return {**ratios, "answered": statistics.mean(point.answered for point in points)}


def methods_of(result: Result) -> dict[str, Method]:
    """Those of which there are runs."""
    return {n: m for n, m in METHODS.items() if m.training in result["trainings"]}


def best(result: Result, limit: float) -> str:
    """The method with the lowest perplexity."""
    methods = methods_of(result)
    return min(methods, key=lambda name: perplexity(result, methods[name], limit)[0])


def seconds(result: Result, method: Method) -> float:
    """Of one training run and the measurement of Ω, relative to plain training."""
    needed = {method.way, TRAININGS[method.training].regularizer}
    measured = sum(result["measured"][name]["seconds"] for name in needed & {BY_MAS, BY_EWC})
    mine = _mean_cost(result, method.training, "seconds") + measured
    return mine / _mean_cost(result, PLAIN, "seconds")


def extra_bytes(result: Result, method: Method) -> float:
    """At the peak of training, beyond plain training."""
    mine, plain = (_mean_cost(result, n, "peak_bytes") for n in (method.training, PLAIN))
    return mine - plain


def _mean_cost(result: Result, name: str, figure: str) -> float:
    return statistics.mean(run["cost"][figure] for run in result["trainings"][name])
