"""Every problem with every λ and every drift, with several seeds, a process per core."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.drift.learning import Learner
from benchmarks.drift.problems import DRIFTS, PROBLEMS, QUICK
from benchmarks.drift.summary import DEFAULT_DRIFT, FREE
from mas_ext.demo.data import load_digits

TASKS = 5


def run(options: Options) -> Iterator[tuple[str, Result]]:
    """Yields the result of each problem."""
    names = QUICK if options.quick else tuple(PROBLEMS)
    load_digits("bundled", "")  # raises here, and not in a worker
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), _start_worker) as workers:
        work = {
            name: [workers.apply_async(_outcomes, (name, s, options.quick)) for s in options.seeds]
            for name in names
        }
        for name, pending in work.items():
            options.progress(PROBLEMS[name].title)
            yield name, _problem(name, [each.get() for each in pending])


# -- in the workers --------------------------------------------------------------------------------
def _start_worker() -> None:
    """Layers this small gain nothing from threads.

    Momentum of pixels that are always black decays for a thousand steps, into denormal numbers with
    which an SGD step takes a hundred times as long.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _outcomes(name: str, seed: int, quick: bool) -> Result:
    """Of one seed: without a penalty, with every λ and with every drift."""
    problem = replace(PROBLEMS[name], epochs=1, images=300) if quick else PROBLEMS[name]
    start = Learner.after_first_task(problem, seed, 2 if quick else TASKS)
    every = 3 if quick else 1
    drifts = [DEFAULT_DRIFT, *(value for value in DRIFTS[::every] if value != DEFAULT_DRIFT)]
    return {
        "found": start.strength,
        "parameters": sum(p.numel() for p in start.model.parameters()),
        FREE: start.outcome(lambda_reg=0.0),
        "lambda": {f"{v:g}": start.outcome(lambda_reg=v) for v in problem.lambdas[::every]},
        "drift": {f"{v:g}": start.outcome(drift=v) for v in drifts},
    }


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
        "found": [each["found"] for each in seeds],
        **{
            kind: {value: [each[kind][value] for each in seeds] for value in seeds[0][kind]}
            for kind in ("lambda", "drift")
        },
    }


BENCHMARK = Benchmark(
    name="drift",
    title="How strong: λ, or how far the output may drift",
    about="Sequences of tasks on real digits with every λ of a grid and every drift of another: "
    "several scenarios, networks, optimizers and seeds.",
    run=run,
    on_request=True,
)
