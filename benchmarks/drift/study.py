"""Every problem with every λ and every drift, with several seeds, a process per core."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.pool import AsyncResult, Pool
from typing import Any

import torch

from benchmarks.benchmark import Options, Result
from benchmarks.drift.learning import Learner
from benchmarks.drift.problems import (
    CHANGED,
    CHANGES,
    DRIFTS,
    PROBLEMS,
    QUICK,
    QUICK_CHANGES,
    changed,
)
from benchmarks.drift.summary import DEFAULT_DRIFT, FREE
from mas_ext.demo.data import load_digits

TASKS = 5
Pending = list[AsyncResult[Any]]  # one per seed


def run(options: Options) -> Iterator[tuple[str, Result]]:
    """Yields the result of each problem, then the effect of changing some of them."""
    names = QUICK if options.quick else tuple(PROBLEMS)
    names_changed = QUICK if options.quick else CHANGED
    kinds = [c for c in (QUICK_CHANGES if options.quick else CHANGES) if c != "base"]
    load_digits("bundled", "")  # raises here, and not in a worker
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), _start_worker) as workers:
        work = {name: _submit(workers, _outcomes, name, options) for name in names}
        changes = {
            name: {kind: _submit(workers, _with_change, name, options, kind) for kind in kinds}
            for name in names_changed
        }
        for name in names:
            options.progress(PROBLEMS[name].title)
            yield name, _problem(name, _wait(work[name]))
        for name in names_changed:
            options.progress(f"changes of {PROBLEMS[name].title}")
            found = {"base": work[name], **changes[name]}
            yield f"changes of {name}", _changes(workers, name, found, options)


def _submit(workers: Pool, do: Any, name: str, options: Options, *what: Any) -> Pending:
    return [workers.apply_async(do, (name, seed, options.quick, *what)) for seed in options.seeds]


def _wait(pending: Pending) -> list[Any]:
    return [each.get() for each in pending]


# -- in the workers --------------------------------------------------------------------------------
def _start_worker() -> None:
    """Layers this small gain nothing from threads.

    Momentum of pixels that are always black decays for a thousand steps, into denormal numbers with
    which an SGD step takes a hundred times as long.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _learner(name: str, seed: int, quick: bool, change: str) -> Learner:
    problem = changed(name, change)
    if quick:
        problem = replace(problem, epochs=1, images=300)
    return Learner.after_first_task(problem, seed, 2 if quick else TASKS)


def _outcomes(name: str, seed: int, quick: bool) -> Result:
    """Of one seed: without a penalty, with every λ and with every drift."""
    start = _learner(name, seed, quick, "base")
    found = _default_and_lambdas(start, quick)
    others = [value for value in DRIFTS[:: 3 if quick else 1] if value != DEFAULT_DRIFT]
    return {
        **found,
        "parameters": sum(p.numel() for p in start.model.parameters()),
        FREE: start.outcome(lambda_reg=0.0),
        "drift": found["drift"] | {f"{value:g}": start.outcome(drift=value) for value in others},
    }


def _with_change(name: str, seed: int, quick: bool, change: str) -> Result:
    """Of one seed after a change: with every λ and with the default drift."""
    return _default_and_lambdas(_learner(name, seed, quick, change), quick)


def _default_and_lambdas(start: Learner, quick: bool) -> Result:
    lambdas = start.problem.lambdas[:: 3 if quick else 1]
    return {
        "found": start.strength,
        "lambda": {f"{value:g}": start.outcome(lambda_reg=value) for value in lambdas},
        "drift": {f"{DEFAULT_DRIFT:g}": start.outcome()},
    }


def _with_lambda(name: str, seed: int, quick: bool, change: str, lambda_reg: float) -> Any:
    return _learner(name, seed, quick, change).outcome(lambda_reg=lambda_reg)


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
        **_by_strength(seeds),
    }


def _by_strength(seeds: list[Result]) -> Result:
    """The strengths found, and for each strength the outcomes of all seeds."""
    return {"found": [each["found"] for each in seeds]} | {
        kind: {value: [each[kind][value] for each in seeds] for value in seeds[0][kind]}
        for kind in ("lambda", "drift")
    }


def _changes(workers: Pool, name: str, found: dict[str, Pending], options: Options) -> Result:
    """Every λ and the default drift; and the λ that the drift came to before the change."""
    base = _wait(found["base"])
    kept = sum(each["found"] for each in base) / len(base)
    with_kept = {kind: _submit(workers, _with_lambda, name, options, kind, kept) for kind in found}
    return {
        "title": PROBLEMS[name].title,
        "kept": kept,
        "changes": {
            kind: {
                "title": CHANGES[kind][0],
                **_by_strength(_wait(found[kind])),
                "kept": _wait(with_kept[kind]),
            }
            for kind in found
        },
    }
