"""A finished run, and its numbers as they are saved in ``results.json``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mas_ext import build_info
from mas_ext.demo import metrics
from mas_ext.demo.learning import Outcome
from mas_ext.demo.scenarios import Task
from mas_ext.demo.settings import Settings


@dataclass
class Run:
    """A finished run.

    Attributes:
        settings: the settings of the run.
        tasks: the tasks in the order in which they were learned.
        outcomes: method → accuracies, times, drift and Ω.
        estimators: see :func:`mas_ext.demo.comparison.compare`.
        sweep: see :func:`mas_ext.demo.sweep.sweep`; None if ``settings.sweep`` is False.
    """

    settings: Settings
    tasks: list[Task]
    outcomes: dict[str, Outcome]
    estimators: dict[str, Any]
    sweep: dict[str, Any] | None = None

    @cached_property
    def results(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return {
            "scenario": self.settings.scenario,
            "settings": self.settings.as_dict(),
            "methods": {method: _summary(outcome) for method, outcome in self.outcomes.items()},
            "estimators": self.estimators,
            **({} if self.sweep is None else {"sweep": self.sweep}),
            "tasks": [task.name for task in self.tasks],
            "command": self.settings.command(),
            "versions": build_info(),
        }


def _summary(outcome: Outcome) -> dict[str, Any]:
    matrix = outcome.accuracy_matrix
    summary = {
        "average_accuracy": metrics.average_accuracy(matrix),
        "forgetting": metrics.forgetting(matrix),
        "backward_transfer": metrics.backward_transfer(matrix),
        "accuracy_matrix": matrix,
        "seconds": outcome.seconds,
        "accuracy_so_far": metrics.accuracy_so_far(matrix),
    }
    if outcome.lambdas[-1] is not None:
        summary["lambda"] = outcome.lambdas
    drifts = [[one.before, one.after] for one in outcome.drifts if one is not None]
    if drifts:
        summary["drift"] = drifts
    if outcome.importance[-1]:
        summary["importance_seconds"] = outcome.importance_seconds
        summary["importance"] = {
            name: {"mean": float(omega.mean()), "max": float(omega.max())}
            for name, omega in outcome.importance[-1].items()
        }
    return summary
