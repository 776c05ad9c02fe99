"""Every training run for every text and seed, a process each; what has ended is kept."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.retention import learning, material, methods
from benchmarks.retention.learning import REGULARIZERS, Setting, Trial, batches
from benchmarks.retention.methods import BY_EWC, BY_MAS, TRAININGS, Training
from mas_ext import DriftBudget

MATERIAL = Path("out/llm")
FINISHED = Path("out/retention")  # a run that was interrupted goes on from here
TEXTS = ("french", "german")  # learning rates and budgets were chosen on the first


def run(options: Options) -> Iterator[tuple[str, Result]]:
    """Yields the result of each text."""
    material.prepare(MATERIAL)
    setting = learning.QUICK if options.quick else Setting()
    names = methods.QUICK if options.quick else tuple(TRAININGS)
    texts = [text for text in TEXTS if text in (options.workloads or TEXTS[1:])]
    folder = FINISHED / _digest(repr(setting))
    context = multiprocessing.get_context("spawn")
    with context.Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as workers:
        options.progress("importance of the pretrained model")
        measured = {
            name: workers.apply(_measured, (folder, setting, name)) for name in (BY_MAS, BY_EWC)
        }
        work = {
            text: {
                (name, seed): workers.apply_async(_outcome, (folder, setting, text, name, seed))
                for seed in options.seeds
                for name in names
            }
            for text in texts
        }
        for text, pending in work.items():
            options.progress(text)
            found = {key: each.get() for key, each in pending.items()}
            yield text, _result(text, measured, names, options.seeds, found)


def _result(
    text: str, measured: Result, names: tuple[str, ...], seeds: tuple[int, ...], found: Any
) -> Result:
    return {
        "title": text.capitalize(),
        "seeds": list(seeds),
        "measured": measured,
        "trainings": {name: [found[name, seed] for seed in seeds] for name in names},
    }


# -- in the workers --------------------------------------------------------------------------------
def _measured(folder: Path, setting: Setting, name: str) -> Result:
    """Saves Ω of the pretrained model; what it has cost."""
    path = folder / name
    cost = path.with_suffix(".json")
    if not cost.exists():
        torch.set_num_threads(1)
        trial = Trial(MATERIAL, TEXTS[0], setting, Training())
        torch.set_float32_matmul_precision("highest")
        regularizer = REGULARIZERS[name](trial.model, budget=DriftBudget())
        begin = time.process_time()
        regularizer.consolidate(batches(trial.texts.kept))
        seconds = time.process_time() - begin
        path.parent.mkdir(parents=True, exist_ok=True)
        regularizer.save(path)
        _write(cost, {"seconds": seconds, "samples": len(trial.texts.kept)})
    return _read(cost)


def _outcome(folder: Path, setting: Setting, text: str, name: str, seed: int) -> Result:
    """Curves of drift and perplexity: over the steps, and on each way back."""
    training = TRAININGS[name]
    path = folder / f"{text}-{seed}-{name.replace(' ', '-')}-{_digest(repr(training))}.json"
    if not path.exists():
        torch.set_num_threads(1)
        trial = Trial(MATERIAL, text, setting, training)
        before = trial.test()
        curves: Result = {methods.STEPS: []}
        for step in trial.learn(seed, folder):
            curves[methods.STEPS].append({"step": step, **trial.test()})
        for way in training.ways:
            curves[way] = [{"c": c, **trial.test()} for c in trial.move_back(way, folder)]
        _write(path, {"before": before, "cost": trial.cost, "curves": curves})
    return _read(path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _write(path: Path, result: Result) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1))
    part.replace(path)


def _read(path: Path) -> Result:
    found: Result = json.loads(path.read_text())
    return found


BENCHMARK = Benchmark(
    name="retention",
    title="What a pretrained language model keeps",
    about="SmolLM2-135M learns a language. What it knew of English and code, and the questions it "
    "answered, with each way to keep them, at equal drift.",
    run=run,
    on_request=True,
)
