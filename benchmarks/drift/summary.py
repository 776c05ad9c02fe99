"""What the study's numbers come to: means over seeds, the best of a grid, and how far from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.drift.study import FREE
from benchmarks.entry import Result, Results
from benchmarks.tools import seeds
from mas_ext._penalty.auto_strength import DEFAULT

CLOSE = 0.03  # of the best λ's accuracy: what the default drift should come within
STEADY = 0.02  # what a change of the network or the batch should move it by at most
Runs = Sequence[Mapping[str, float] | None]


def accuracy(runs: Runs) -> float | None:
    """Mean over seeds of the average accuracy; None if a seed's network did not stay finite."""
    return _mean(runs, "average_accuracy")


def forgetting(runs: Runs) -> float | None:
    return _mean(runs, "forgetting")


def deviation(runs: Runs) -> float:
    """Sample standard deviation over seeds of the average accuracy."""
    return seeds.deviation([run["average_accuracy"] for run in runs if run is not None])


def _mean(runs: Runs, figure: str) -> float | None:
    values = [run[figure] for run in runs if run is not None]
    return statistics.mean(values) if len(values) == len(runs) else None


def curve(problem: Result, kind: str) -> dict[float, float]:
    """``"lambda"`` or ``"drift"`` → mean accuracy, of those at which every seed stayed finite."""
    means = {float(value): accuracy(runs) for value, runs in problem[kind].items()}
    return {value: mean for value, mean in sorted(means.items()) if mean is not None}


def best(problem: Result) -> tuple[float, float]:
    """The λ of the grid with the highest accuracy, and that."""
    found = curve(problem, "lambda")
    value = max(found, key=lambda number: found[number])
    return value, found[value]


def at_default(problem: Result) -> Runs:
    """The runs with the default drift."""
    runs: Runs = problem["drift"][f"{DEFAULT:g}"]
    return runs


def behind(problem: Result) -> float:
    """How much accuracy the default drift lacks to the best λ of the grid; below zero: none."""
    reached = accuracy(at_default(problem))
    return best(problem)[1] - (0.0 if reached is None else reached)


def gain(problem: Result) -> float:
    """How much accuracy the default drift has over fine-tuning."""
    return best(problem)[1] - behind(problem) - (accuracy(problem[FREE]) or 0.0)


def problems(results: Results) -> dict[str, Result]:
    return {name: result for name, result in results.items() if "drift" in result}


def changes(results: Results) -> dict[str, Result]:
    return {name: result for name, result in results.items() if "changes" in result}


WAYS = {"best": "best λ", "drift": f"drift {DEFAULT:g}", "kept": "λ kept"}


def ways(outcomes: Result) -> dict[str, Runs]:
    """The runs with the grid's best λ, with the default drift, and with the λ kept."""
    value, _ = best(outcomes)
    return {
        "best": outcomes["lambda"][f"{value:g}"],
        "drift": at_default(outcomes),
        "kept": outcomes["kept"],
    }


def moved(changed: Result) -> dict[str, dict[str, float]]:
    """Change → by how much accuracy moves in each of the :func:`ways`."""
    base = reached(changed["changes"]["base"])
    return {
        name: {way: value - base[way] for way, value in reached(outcomes).items()}
        for name, outcomes in changed["changes"].items()
        if name != "base"
    }


def lacking(changed: Result) -> dict[str, dict[str, float]]:
    """Change → how much accuracy each of the :func:`ways` lacks to the grid's best λ, then."""
    each = {name: reached(outcomes) for name, outcomes in changed["changes"].items()}
    return {
        name: {way: values["best"] - value for way, value in values.items()}
        for name, values in each.items()
    }


def reached(outcomes: Result) -> dict[str, float]:
    """Accuracy in each of the :func:`ways`, 0 where a network did not stay finite."""
    return {way: accuracy(runs) or 0.0 for way, runs in ways(outcomes).items()}
