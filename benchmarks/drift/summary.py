"""Statistics of the study: means over seeds, the best λ of the grid, and the distance from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.benchmark import Result
from benchmarks.measure import deviation
from mas_ext._strength.auto import DEFAULT_DRIFT

FREE = "fine-tuning"
CLOSE = 0.03  # goal: the default drift's accuracy comes that close to the best λ's
Runs = Sequence[Mapping[str, float] | None]  # a run per seed; None: did not stay finite


def accuracy(runs: Runs) -> float | None:
    """Mean over seeds of the average accuracy; None if a network did not stay finite."""
    return _mean(runs, "average_accuracy")


def forgetting(runs: Runs) -> float | None:
    return _mean(runs, "forgetting")


def _mean(runs: Runs, figure: str) -> float | None:
    values = [run[figure] for run in runs if run is not None]
    return statistics.mean(values) if len(values) == len(runs) else None


def deviation_of(runs: Runs) -> float:
    """Sample standard deviation over seeds of the average accuracy."""
    return deviation([run["average_accuracy"] for run in runs if run is not None])


def curve(problem: Result, kind: str) -> dict[float, float]:
    """``"lambda"`` or ``"drift"`` → mean accuracy, if all networks stayed finite."""
    means = {float(value): accuracy(runs) for value, runs in problem[kind].items()}
    return {value: mean for value, mean in sorted(means.items()) if mean is not None}


def best(problem: Result) -> tuple[float, float]:
    """The λ of the grid with the highest accuracy, and that accuracy."""
    found = curve(problem, "lambda")
    value = max(found, key=lambda number: found[number])
    return value, found[value]


def at_default(problem: Result) -> Runs:
    runs: Runs = problem["drift"][f"{DEFAULT_DRIFT:g}"]
    return runs


def behind(problem: Result) -> float:
    """Accuracy of the best λ of the grid minus that of the default drift."""
    return best(problem)[1] - (accuracy(at_default(problem)) or 0.0)


def gain(problem: Result) -> float:
    """Accuracy of the default drift minus that of fine-tuning."""
    return (accuracy(at_default(problem)) or 0.0) - (accuracy(problem[FREE]) or 0.0)
