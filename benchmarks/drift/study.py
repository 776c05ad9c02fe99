"""Every problem with every λ and with a drift budget, with several seeds, a process per core."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.drift.learning import Learner
from benchmarks.drift.problems import FACTORS, LIMITS, PROBLEMS, QUICK, Problem
from benchmarks.drift.summary import BOTH, FREE
from mas_ext import EWC, L2SP, DriftBudget
from mas_ext.demo.data import load_digits

TASKS = 5
REFERENCES = 500  # per task, where the drift of unseen samples is measured


def run(options: Options) -> Iterator[tuple[str, Result]]:
    """Yields the result of each problem."""
    chosen = options.workloads or tuple(PROBLEMS)
    names = QUICK if options.quick else tuple(name for name in PROBLEMS if name in chosen)
    load_digits("bundled", "")  # raises here, and not in a worker
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), start_worker) as workers:
        work = {
            name: [workers.apply_async(_outcomes, (name, s, options.quick)) for s in options.seeds]
            for name in names
        }
        for name, pending in work.items():
            options.progress(PROBLEMS[name].title)
            yield name, _problem(name, [each.get() for each in pending])


# -- in the workers --------------------------------------------------------------------------------
def start_worker() -> None:
    """Layers this small gain nothing from threads.

    Momentum of pixels that are always black decays for a thousand steps, into denormal numbers with
    which an SGD step takes a hundred times as long.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _outcomes(name: str, seed: int, quick: bool) -> Result:
    """Of one seed: without protection, with every λ, and in every way to use a budget."""
    problem = replace(PROBLEMS[name], epochs=1, images=300) if quick else PROBLEMS[name]
    count = 2 if quick else TASKS
    start = Learner.after_first_task(problem, seed, count)
    return {
        "parameters": sum(p.numel() for p in start.model.parameters()),
        FREE: start.outcome(lambda_reg=0.0),
        "lambda": {
            f"{value:g}": start.outcome(lambda_reg=value)
            for value in problem.lambdas[:: 3 if quick else 1]
        },
        "recipes": {"auto": start.outcome(), **_recipes(problem, seed, count)},
        "limits": _limits(problem, seed, count, quick),
    }


def _recipes(problem: Problem, seed: int, count: int) -> Result:
    """The penalty in training, settling after it, and both, with the default budget; other Ω."""
    start = Learner.after_first_task(problem, seed, count, DriftBudget())
    strict = Learner.after_first_task(problem, seed, count, DriftBudget(slack=1.0))
    return {
        "penalty": strict.outcome(),
        "settling": start.outcome(penalty=False, settle="importance"),
        "interpolation": start.outcome(penalty=False, settle="uniform"),
        BOTH: start.outcome(settle="importance"),
        **_other_methods(problem, seed, count),
    }


def _other_methods(problem: Problem, seed: int, count: int) -> Result:
    """The default recipe, and settling alone, with other Ω than MAS's."""
    ewc = Learner.after_first_task(problem, seed, count, DriftBudget(), method=EWC)
    l2sp = Learner.after_first_task(problem, seed, count, DriftBudget(), method=L2SP)
    return {
        "EWC": ewc.outcome(settle="importance"),
        "EWC settling": ewc.outcome(penalty=False, settle="importance"),
        "L2-SP": l2sp.outcome(settle="importance"),
    }


def _limits(problem: Problem, seed: int, count: int, quick: bool) -> Result:
    """The drift of unseen samples, also where λ begins a million times too small or too large."""
    found: Result = {}
    for limit in LIMITS[:: 3 if quick else 1]:
        budget = DriftBudget(limit, samples=REFERENCES)
        start = Learner.after_first_task(problem, seed, count, budget, held_out=True)
        found[f"{limit:g}"] = {
            f"{factor:g}": start.outcome(settle="importance", lambda_reg=factor * start.strength)
            for factor in (FACTORS if seed == 0 else (1.0,))
        }
    return found


# -- put together ----------------------------------------------------------------------------------
def _problem(name: str, seeds: list[Result]) -> Result:
    problem = PROBLEMS[name]
    return {
        "title": problem.title,
        "scenario": problem.scenario,
        "optimizer": problem.optimizer.func.__name__,
        "mode": problem.mode,
        "parameters": seeds[0]["parameters"],
        FREE: [each[FREE] for each in seeds],
        **{
            kind: {value: [each[kind][value] for each in seeds] for value in seeds[0][kind]}
            for kind in ("lambda", "recipes")
        },
        "limits": {
            limit: [run for each in seeds for run in each["limits"][limit].values()]
            for limit in seeds[0]["limits"]
        },
    }


BENCHMARK = Benchmark(
    name="drift",
    title="How strong: λ, or a budget of drift",
    about="Sequences of tasks on real digits with every λ of a grid and with a drift budget, in "
    "training, after it, and both: several scenarios, networks, optimizers and seeds.",
    run=run,
    on_request=True,
)
