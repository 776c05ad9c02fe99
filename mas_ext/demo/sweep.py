"""The sweep: the results of the proximal step with several λ, and with several budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mas_ext._drift.budget import DEFAULT_LIMIT
from mas_ext.demo import metrics
from mas_ext.demo.learning import Tick, learn
from mas_ext.demo.scenarios import Task
from mas_ext.demo.settings import Settings

METHOD = "mas_proximal"
LAMBDAS = (1.0, 10.0, 30.0, 100.0, 1000.0)
BUDGETS = (0.02, 0.04, DEFAULT_LIMIT, 0.16, 0.32)
RUNS = len(LAMBDAS) + len(BUDGETS)


def sweep(tasks: list[Task], settings: Settings, tick: Tick) -> dict[str, Any]:
    """Learns the tasks with one strength after the other.

    Returns:
        The content of ``results.json`` under ``"sweep"``: for ``"lambda"`` and for ``"budget"``,
        the values, and for each value the average accuracy and the forgetting.
    """
    by_lambda = [replace(settings, lambda_proximal=value) for value in LAMBDAS]
    by_budget = [replace(settings, lambda_proximal=None, budget=value) for value in BUDGETS]
    return {
        "lambda": _curve(LAMBDAS, by_lambda, tasks, tick),
        "budget": _curve(BUDGETS, by_budget, tasks, tick),
    }


def _curve(
    values: tuple[float, ...], asked: list[Settings], tasks: list[Task], tick: Tick
) -> dict[str, list[float]]:
    matrices = [learn(METHOD, tasks, settings, tick).accuracy_matrix for settings in asked]
    return {
        "values": list(values),
        "average_accuracy": [metrics.average_accuracy(matrix) for matrix in matrices],
        "forgetting": [metrics.forgetting(matrix) for matrix in matrices],
    }
