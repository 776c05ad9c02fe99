"""The study: every problem with every λ and every drift, several seeds, on all cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.pool import AsyncResult, Pool
from typing import Any

import torch

from benchmarks.drift.learning import Learner
from benchmarks.drift.problems import CHANGED, CHANGES, DRIFTS, PROBLEMS, QUICK, changed
from benchmarks.entry import Options, Result
from mas_ext._penalty.auto_strength import DEFAULT
from mas_ext.demo.data import load_digits

TASKS = 5
FREE = "fine-tuning"
Asked = list[AsyncResult[Any]]


def run(options: Options) -> Iterator[tuple[str, Result]]:
    """Yields a problem's result when all its seeds are done, then what changes of it do."""
    names = QUICK if options.quick else tuple(PROBLEMS)
    after = QUICK[:1] if options.quick else CHANGED
    with _workers() as workers:
        work = {name: _ask(workers, _outcomes, name, options) for name in names}
        changes = {
            name: {
                change: _ask(workers, _changed, name, options, change)
                for change in CHANGES
                if change != "base"
            }
            for name in after
        }
        for name in names:
            options.tell(PROBLEMS[name].title)
            yield name, _problem(name, _got(work[name]))
        for name in after:
            options.tell(f"changes of {PROBLEMS[name].title}")
            found = {"base": work[name], **changes[name]}
            yield f"changes of {name}", _changes(workers, name, found, options)


def _ask(workers: Pool, do: Any, name: str, options: Options, *what: Any) -> Asked:
    """Once for every seed."""
    return [workers.apply_async(do, (name, seed, options.quick, *what)) for seed in options.seeds]


def _got(asked: Asked) -> list[Any]:
    return [each.get() for each in asked]


@contextmanager
def _workers() -> Iterator[Pool]:
    load_digits("bundled", "")  # an error is raised here
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), _alone) as workers:
        yield workers


def _alone() -> None:
    """Layers this small gain nothing from threads, and every core has a process.

    Momentum of pixels that are always black decays for a thousand steps, into numbers so small that
    an SGD step takes a hundred times as long.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _started(name: str, seed: int, quick: bool, change: str) -> Learner:
    problem = changed(name, change)
    if quick:
        problem = replace(problem, epochs=1, images=1000)
    return Learner.started(problem, seed, 3 if quick else TASKS)


# -- in the workers --------------------------------------------------------------------------------
def _outcomes(name: str, seed: int, quick: bool) -> Result:
    """Of one seed: with nothing held, with every λ and with every drift."""
    start = _started(name, seed, quick, "base")
    of_both = _by_default_and_lambda(start, quick)
    others = [value for value in DRIFTS[:: 3 if quick else 1] if value != DEFAULT]
    return {
        **of_both,
        "parameters": sum(p.numel() for p in start.model.parameters()),
        FREE: start.outcome(lambda_reg=0.0),
        "drift": of_both["drift"] | {f"{value:g}": start.outcome(drift=value) for value in others},
    }


def _changed(name: str, seed: int, quick: bool, change: str) -> Result:
    """Of one seed after a change: with every λ and with the default drift."""
    return _by_default_and_lambda(_started(name, seed, quick, change), quick)


def _by_default_and_lambda(start: Learner, quick: bool) -> Result:
    lambdas = start.problem.lambdas[:: 3 if quick else 1]
    return {
        "found": _lambda(start),
        "lambda": {f"{value:g}": start.outcome(lambda_reg=value) for value in lambdas},
        "drift": {f"{DEFAULT:g}": start.outcome()},
    }


def _lambda(learner: Learner) -> Any:
    """What the default drift comes to after the first task."""
    mas = learner.mas
    return mas.lambda_proximal if learner.by_steps else mas.lambda_reg


def _held_by(name: str, seed: int, quick: bool, change: str, lambda_reg: float) -> Any:
    return _started(name, seed, quick, change).outcome(lambda_reg=lambda_reg)


# -- put together ----------------------------------------------------------------------------------
def _problem(name: str, seeds: list[Result]) -> Result:
    problem = PROBLEMS[name]
    return {
        "title": problem.title,
        "scenario": problem.scenario,
        "optimizer": problem.optimizer_name,
        "mode": problem.mode,
        "parameters": seeds[0]["parameters"],
        FREE: [each[FREE] for each in seeds],
        **_by_strength(seeds),
    }


def _by_strength(seeds: list[Result]) -> Result:
    """What is found, and the outcomes, a list of all seeds for each strength."""
    return {
        "found": [each["found"] for each in seeds],
        **{
            kind: {value: [each[kind][value] for each in seeds] for value in seeds[0][kind]}
            for kind in ("lambda", "drift")
        },
    }


def _changes(workers: Pool, name: str, found: dict[str, Asked], options: Options) -> Result:
    """Every λ and the default drift, and the λ that it found before the change, kept."""
    base = _got(found["base"])
    kept = sum(each["found"] for each in base) / len(base)
    held = {change: _ask(workers, _held_by, name, options, change, kept) for change in found}
    return {
        "title": PROBLEMS[name].title,
        "kept": kept,
        "changes": {
            change: {
                "title": CHANGES[change][0],
                **_by_strength(_got(found[change])),
                "kept": _got(held[change]),
            }
            for change in found
        },
    }
