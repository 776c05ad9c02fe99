"""The sweep: the results of the proximal step with several λ, and with several drifts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mas_ext._strength.auto import DEFAULT_DRIFT
from mas_ext.demo import metrics
from mas_ext.demo.learning import Tick, learn
from mas_ext.demo.scenarios import Task
from mas_ext.demo.settings import Settings

METHOD = "mas_proximal"
LAMBDAS = (1.0, 10.0, 30.0, 100.0, 1000.0)
DRIFTS = (0.02, 0.06, DEFAULT_DRIFT, 0.6, 2.0)
RUNS = len(LAMBDAS) + len(DRIFTS)


def sweep(tasks: list[Task], settings: Settings, tick: Tick) -> dict[str, Any]:
    """Learns the tasks with one strength after the other.

    Returns:
        The content of ``results.json`` under ``"sweep"``: for ``"lambda"`` and for ``"drift"``, the
        values, and for each value the average accuracy and the forgetting.
    """
    by_lambda = [replace(settings, lambda_proximal=value) for value in LAMBDAS]
    by_drift = [replace(settings, lambda_proximal="auto", drift=value) for value in DRIFTS]
    return {
        "lambda": _curve(LAMBDAS, by_lambda, tasks, tick),
        "drift": _curve(DRIFTS, by_drift, tasks, tick),
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
