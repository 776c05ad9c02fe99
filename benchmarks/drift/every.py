"""One proximal step for several of the optimizer: what that changes, under a drift budget."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator

from benchmarks.benchmark import Benchmark, Options, Result, Results
from benchmarks.drift import summary
from benchmarks.drift.learning import Learner
from benchmarks.drift.problems import CHOSEN_ON, PROBLEMS, QUICK
from benchmarks.drift.study import TASKS, start_worker
from benchmarks.text import Table
from mas_ext import DriftBudget
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
                    "chosen_on": name in CHOSEN_ON,
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
    """Accuracy and forgetting by the steps that a proximal step follows."""
    texts = {
        "budget": "With a drift budget, and settling after each task",
        "fixed": 'With lambda_reg="auto" and no budget',
    }
    return [
        Table(
            f"{text}: the mean over seeds of the average accuracy and, in brackets, of forgetting, "
            "by the number of steps that one proximal step follows. The default was chosen on the "
            "first half of the problems.",
            ("", *next(iter(problems.values()))[kind]),
            [
                [found["title"], *(_cell(runs) for runs in found[kind].values())]
                for found in sorted(problems.values(), key=lambda each: not each["chosen_on"])
            ],
        )
        for kind, text in texts.items()
    ]


def _cell(runs: summary.Runs) -> str:
    accuracy, forgetting = summary.accuracy(runs), summary.forgetting(runs)
    return "–" if accuracy is None else f"{accuracy:.3f} ({forgetting:.3f})"


BENCHMARK = Benchmark(
    name="every",
    title="One proximal step for several of the optimizer",
    about="The problems of the study with a proximal step after every k-th step of the optimizer.",
    run=run,
    on_request=True,
)
