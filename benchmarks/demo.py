"""The whole demo over several seeds: what it takes, what it reaches, and how much that varies."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from benchmarks.entry import Entry, Options, Result, Results
from benchmarks.show.table import Table
from benchmarks.show.text import duration
from benchmarks.tools.seeds import deviation

FIGURES = ("average_accuracy", "forgetting", "backward_transfer", "seconds")


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    """Permuted digits with the default settings, once a seed; a quick run: two short tasks."""
    from mas_ext.demo import Settings, run_demo
    from mas_ext.demo.learning import METHODS

    short = {"tasks": 2, "epochs": 1} if options.quick else {}
    tasks = Settings(**short).tasks
    runs, begin = {}, perf_counter()
    for seed in options.seeds:
        options.tell(f"seed {seed}")
        methods = run_demo(Settings(seed=seed, **short)).results["methods"]
        runs[str(seed)] = {name: _figures(found) for name, found in methods.items()}
        summary = {name: _spread([run[name] for run in runs.values()]) for name in methods}
        yield (
            "permuted",
            {
                "title": f"Permuted digits, {tasks} tasks",
                "labels": {name: METHODS[name].label for name in methods},
                "seconds_a_seed": (perf_counter() - begin) / len(runs),
                "summary": summary,
                "runs": dict(runs),
            },
        )


def _figures(found: dict[str, Any]) -> dict[str, float]:
    return {figure: found[figure] for figure in FIGURES}


def _spread(results: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation of each figure."""
    spread = {}
    for figure in FIGURES:
        values = [result[figure] for result in results]
        spread[figure] = {"mean": statistics.mean(values), "stdev": deviation(values)}
    return spread


def _table(result: Result) -> Table:
    rows = []
    for method, spread in result["summary"].items():
        cells = [f"{s['mean']:.3f} ± {s['stdev']:.3f}" for s in spread.values()]
        cells[-1] = duration(spread["seconds"]["mean"])
        rows.append([result["labels"][method], *cells])
    return Table(
        f"{result['title']}: mean ± standard deviation over seeds {', '.join(result['runs'])}; "
        f"{duration(result['seconds_a_seed'])} a seed",
        ("", *(figure.replace("_", " ") for figure in FIGURES[:-1]), "time"),
        rows,
        frozenset(result["labels"][m] for m in result["labels"] if m.startswith("mas")),
    )


def _overview(results: Results) -> list[Table]:
    return [_table(result) for result in results.values()]


ENTRY = Entry(
    name="demo",
    title="The whole demo",
    about="A network learns five tasks on real digits, once with each method: importance, "
    "consolidation and training as a user runs them.",
    run=_run,
    detail=lambda result: [_table(result)],
    overview=_overview,
    seconds=(0, 0),  # of seeds, not of rounds
)
