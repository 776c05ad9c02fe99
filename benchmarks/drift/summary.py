"""Statistics of the study: means over seeds, the best λ of the grid, and the recipes beside it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.benchmark import Result
from benchmarks.measure import deviation

FREE = "fine-tuning"
BOTH = "both"  # the penalty in training, and settling: the default recipe
RECIPES = ("auto", "penalty", "settling", "interpolation", BOTH)
# What each Ω gives with a recipe: heading → the name in the results.
METHODS = {
    "L2-SP, both": "L2-SP",
    "EWC, both": "EWC",
    "MAS, both": BOTH,
    "L2-SP, settling": "interpolation",
    "EWC, settling": "EWC settling",
    "MAS, settling": "settling",
}
CLOSE = 0.01  # goal: the default recipe's accuracy is at most that much below the best λ's
Runs = Sequence[Mapping[str, Any] | None]  # a run per seed; None: did not stay finite


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


def curve(problem: Result) -> dict[float, float]:
    """λ → mean accuracy, if all networks stayed finite."""
    means = {float(value): accuracy(runs) for value, runs in problem["lambda"].items()}
    return {value: mean for value, mean in sorted(means.items()) if mean is not None}


def best(problem: Result) -> tuple[float, float]:
    """The λ of the grid with the highest accuracy, and that accuracy."""
    found = curve(problem)
    value = max(found, key=lambda number: found[number])
    return value, found[value]


def recipe(problem: Result, name: str = BOTH) -> Runs:
    runs: Runs = problem["recipes"][name]
    return runs


def gain(problem: Result, name: str = BOTH) -> float:
    """Accuracy of a recipe minus that of the best λ of the grid."""
    return (accuracy(recipe(problem, name)) or 0.0) - best(problem)[1]


def over_fine_tuning(problem: Result) -> float:
    """Accuracy of the default recipe minus that of fine-tuning."""
    return (accuracy(recipe(problem)) or 0.0) - (accuracy(problem[FREE]) or 0.0)


def drift_over_limit(problem: Result, limit: str) -> list[float]:
    """Of every run: the mean drift of unseen samples over its tasks, divided by the limit."""
    runs = [run for run in problem["limits"][limit] if run is not None]
    return [statistics.mean(run["drifts"]) / float(limit) for run in runs]
