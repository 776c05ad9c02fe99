"""The tables of ``docs/is_this_for_me.md``: parts of those of ``drift`` and ``retention``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from benchmarks.benchmark import Result, Results
from benchmarks.drift import summary as studied
from benchmarks.retention import summary as retained
from benchmarks.retention.methods import METHODS
from benchmarks.text import Table, minus, two_digits

# Heading → the name of the recipe in the results of the drift study.
RECIPES = {
    "L2-SP": "L2-SP",
    "EWC": "EWC",
    "MAS": studied.BOTH,
    "interpolated": "interpolation",
    "settled with MAS": "settling",
}
# How far a method of the retention table may drift here. Inf: it is not held back.
LIMITS: Mapping[str, float] = {
    **dict.fromkeys(["fine-tuning, stopped early", "5 % replay", "LoRA, stopped early"], math.inf),
    **dict.fromkeys(
        [
            "a lower learning rate",
            "fine-tuning, interpolated",
            "fine-tuning, settled with MAS",
            "L2-SP, settled",
            "EWC, settled",
            "MAS, settled",
            "KL to the base as a loss",
            "LoRA, interpolated",
            "LoRA, MAS on the update, settled",
            "LoRA, KL to the base as a loss",
        ],
        retained.TYPICAL,
    ),
}


def digits(problems: Results) -> Table:
    """The mean accuracy for each kind of problem of the drift study."""
    kinds: dict[str, list[Result]] = {}
    for problem in problems.values():
        kinds.setdefault(problem["title"].partition(",")[0], []).append(problem)
    return Table(
        "Average accuracy after five tasks, in percent: mean over the problems of a kind.",
        ("", "problems", studied.FREE, *RECIPES, "best λ of seven"),
        [[kind, str(len(some)), *map(_percent, _accuracies(some))] for kind, some in kinds.items()],
    )


def _accuracies(problems: list[Result]) -> list[float]:
    rows = [
        [
            studied.accuracy(problem[studied.FREE]) or 0.0,
            *(studied.accuracy(studied.recipe(problem, r)) or 0.0 for r in RECIPES.values()),
            studied.best(problem)[1],
        ]
        for problem in problems
    ]
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def language(result: Result) -> Table:
    """What a few methods learn and keep, left free or within a drift."""
    methods = retained.methods_of(result)
    rows = [
        [_name(name, limit), *_figures(result, name, limit)]
        for name, limit in LIMITS.items()
        if name in methods
    ]
    return Table(
        f"{result['title']}: drift (nats per prediction) and perplexity; perplexity on English and "
        "code relative to before. Then the time, with Ω, over that of fine-tuning, and GB of "
        f"memory beyond it. All but the first three are held to a drift of {retained.TYPICAL:g}.",
        ("", "drift", result["title"], "English", "code", "time", "memory"),
        rows,
    )


def _name(name: str, limit: float) -> str:
    return name if limit < math.inf else name.removesuffix(", stopped early")


def _figures(result: Result, name: str, limit: float) -> list[str]:
    method = METHODS[name]
    points = retained.within(result, method, limit)
    left = retained.left(result, method, limit)
    memory = round(retained.extra_bytes(result, method) / 1e9, 1) + 0.0
    return [
        two_digits(statistics.mean(point.distance**2 for point in points)),
        f"{retained.perplexity(result, method, limit)[0]:.2f}",
        *(minus(f"{100 * (left[text] - 1):+.1f} %") for text in ("english", "code")),
        two_digits(retained.seconds(result, method)),
        minus(f"{memory:.1f}"),
    ]
