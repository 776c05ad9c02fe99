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
LEVEL = 0.01  # perplexities that differ by less, relatively, are called level
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
    runs = [result["trainings"][name] for name in method.trainings if name in result["trainings"]]
    return [
        min(
            (point for run in of_seed for point in _reached(run, method.way, limit)),
            key=lambda point: point.losses["new"],
        )
        for of_seed in zip(*runs, strict=True)
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


def left(result: Result, method: Method) -> dict[str, float]:
    """At the typical limit: perplexities relative to the start, and the questions answered."""
    points, begun = within(result, method, TYPICAL), start(result)
    ratios = {n: statistics.mean(point.over(begun, n) for point in points) for n in WATCHED}
    return {**ratios, "answered": statistics.mean(point.answered for point in points)}


def methods_of(result: Result) -> dict[str, Method]:
    """Those of which there are runs."""
    found = result["trainings"]
    return {n: m for n, m in METHODS.items() if any(name in found for name in m.trainings)}


def best(result: Result, limit: float, ours: bool | None = None) -> str:
    """The method with the lowest perplexity; only of ours, or of the others, if asked for."""
    chosen = methods_of(result)
    names = [n for n, method in chosen.items() if ours is None or method.ours == ours]
    return min(names, key=lambda name: perplexity(result, chosen[name], limit)[0])


def seconds(result: Result, method: Method) -> float:
    """Of one training run and the measurement of Ω, relative to plain training."""
    plain = _mean_cost(result, PLAIN, "seconds")
    mine = max(_mean_cost(result, name, "seconds") for name in _present(result, method))
    measured = {name: result["measured"][name]["seconds"] for name in (BY_MAS, BY_EWC)}
    names = {method.way, *_regularizers(method)}
    return (mine + sum(measured[name] for name in names if name in measured)) / plain


def extra_bytes(result: Result, method: Method) -> float:
    """At the peak of training, beyond plain training."""
    peaks = [_mean_cost(result, name, "peak_bytes") for name in _present(result, method)]
    return max(peaks) - _mean_cost(result, PLAIN, "peak_bytes")


def _regularizers(method: Method) -> set[str | None]:
    return {TRAININGS[name].regularizer for name in method.trainings}


def _present(result: Result, method: Method) -> list[str]:
    return [name for name in method.trainings if name in result["trainings"]]


def _mean_cost(result: Result, name: str, figure: str) -> float:
    return statistics.mean(run["cost"][figure] for run in result["trainings"][name])
