"""The whole demo with several seeds: how long it takes, and how much its results vary."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.measure import deviation

FIGURES = ("average_accuracy", "forgetting", "backward_transfer", "seconds")
QUICK = {"tasks": 2, "epochs": 1}


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    """Permuted digits with the default settings, once per seed; a quick run has two short tasks."""
    from mas_ext.demo import Settings, run_demo
    from mas_ext.demo.methods import METHODS

    short = QUICK if options.quick else {}
    runs = {}
    for seed in options.seeds:
        options.progress(f"seed {seed}")
        methods = run_demo(Settings(seed=seed, **short)).results["methods"]
        runs[str(seed)] = {
            name: {figure: found[figure] for figure in FIGURES} for name, found in methods.items()
        }
        summary = {
            name: {
                figure: _spread([run[name][figure] for run in runs.values()]) for figure in FIGURES
            }
            for name in methods
        }
        yield (
            "permuted",
            {
                "title": f"Permuted digits, {Settings(**short).tasks} tasks",
                "labels": {name: METHODS[name].label for name in methods},
                "summary": summary,
                "runs": dict(runs),
            },
        )


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "stdev": deviation(values)}


BENCHMARK = Benchmark(
    name="demo",
    title="The whole demo",
    about="A network learns five tasks on real digits with each method: importance, consolidation "
    "and training, the way a user runs them.",
    run=_run,
)
