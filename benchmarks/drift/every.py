"""One proximal step for several of the optimizer: what that changes, under a drift budget."""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Mapping

from benchmarks.benchmark import Benchmark, Options, Result, Results
from benchmarks.drift import summary
from benchmarks.drift.learning import Learner
from benchmarks.drift.problems import PROBLEMS, QUICK
from benchmarks.drift.study import TASKS, start_worker
from benchmarks.drift.summary import Runs
from benchmarks.text import Table, minus
from mas_ext import DriftBudget
from mas_ext._penalty.attachment import EVERY as DEFAULT
from mas_ext.demo.data import load_digits

EVERY = (1, 2, 4, 10, 20, 32, 64)


def run(options: Options) -> Iterator[tuple[str, Result]]:
    """Yields the result of each problem with proximal steps."""
    names = [name for name, problem in PROBLEMS.items() if problem.mode == "proximal"]
    chosen = QUICK if options.quick else options.workloads or names
    load_digits("bundled", "")  # raises here, and not in a worker
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), start_worker) as workers:
        work = {
            name: [workers.apply_async(_outcomes, (name, s, options.quick)) for s in options.seeds]
            for name in names
            if name in chosen
        }
        for name, pending in work.items():
            options.progress(PROBLEMS[name].title)
            optimizer = PROBLEMS[name].optimizer.func.__name__
            yield (
                name,
                {
                    "title": f"{PROBLEMS[name].title}, {optimizer}",
                    **_by_seed([each.get() for each in pending]),
                },
            )


def _outcomes(name: str, seed: int, quick: bool) -> Result:
    """Of one seed: with a budget and with a fixed λ, by the steps that a proximal step follows."""
    count = 2 if quick else TASKS
    tried = EVERY[:: len(EVERY) - 1] if quick else EVERY
    budget = Learner.after_first_task(PROBLEMS[name], seed, count, DriftBudget())
    fixed = Learner.after_first_task(PROBLEMS[name], seed, count)
    return {
        "budget": {str(k): budget.outcome(settle="importance", every=k) for k in tried},
        "fixed": {str(k): fixed.outcome(every=k) for k in tried},
    }


def _by_seed(seeds: list[Result]) -> Result:
    return {
        kind: {k: [seed[kind][k] for seed in seeds] for k in found}
        for kind, found in seeds[0].items()
    }


def tables(problems: Results) -> list[Table]:
    """Accuracy, forgetting and drift by the steps that a proximal step follows."""
    rows = list(problems.values())
    learned = (
        "the mean over seeds of the average accuracy and, in brackets, of forgetting, by the "
        "number of steps that one proximal step follows."
    )
    return [
        _table(
            f"With a drift budget, and settling after each task: {learned} The default is "
            f"{DEFAULT}, half of the steps between two measurements.",
            [(each["title"], each["budget"]) for each in rows],
            _accuracy,
        ),
        _table(
            "The same: the mean drift at the end of a task, before settling (nats per prediction).",
            [(each["title"], each["budget"]) for each in rows],
            _unsettled,
        ),
        _table(
            f'With lambda_reg="auto", without a budget: {learned}',
            [(each["title"], each["fixed"]) for each in rows],
            _accuracy,
        ),
    ]


def _table(
    title: str, rows: list[tuple[str, Mapping[str, Runs]]], cell: Callable[[Runs], str]
) -> Table:
    cells = [[name, *(cell(runs) for runs in found.values())] for name, found in rows]
    return Table(title, ("", *rows[0][1]), cells)


def _accuracy(runs: Runs) -> str:
    accuracy, forgetting = summary.accuracy(runs), summary.forgetting(runs)
    if accuracy is None or forgetting is None:
        return "–"
    return f"{accuracy:.3f} ({minus(f'{forgetting:.3f}')})"


def _unsettled(runs: Runs) -> str:
    drifts = [statistics.mean(run["unsettled"]) for run in runs if run is not None]
    return f"{statistics.mean(drifts):.2f}" if len(drifts) == len(runs) else "–"


BENCHMARK = Benchmark(
    name="every",
    title="One proximal step for several of the optimizer",
    about="The problems of the study with a proximal step after every k-th step of the optimizer.",
    run=run,
    on_request=True,
)
