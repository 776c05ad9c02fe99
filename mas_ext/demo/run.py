"""Runs every method on the same tasks, and writes the results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mas_ext.demo import comparison, plots, report, sweep
from mas_ext.demo.data import load_digits
from mas_ext.demo.learning import Outcome, learn
from mas_ext.demo.methods import METHODS
from mas_ext.demo.progress import bars
from mas_ext.demo.results import Run
from mas_ext.demo.scenarios import Task, make_tasks
from mas_ext.demo.settings import Settings


def run_demo(
    settings: Settings | None = None, out: str | Path | None = None, progress: bool = True
) -> Run:
    """Learns the tasks with every method, from the same initial parameters and on the same batches.

    Args:
        settings: the settings; None for the permuted scenario with its defaults.
        out: the folder for ``results.json``, ``accuracy.png``, ``drift.png``,
            ``importance.png``, ``estimators.png``, ``report.html``, and with ``settings.sweep``
            also ``sweep.png``. It is created if it does not exist. None: nothing is written.
        progress: whether to show progress bars.

    Returns:
        The results. On one machine, the same settings give the same accuracies.
    """
    settings = settings or Settings()
    tasks = tasks_of(settings)
    outcomes: dict[str, Outcome] = {}
    with _one_thread(), bars(progress) as bar:
        for method in settings.methods:
            with bar(METHODS[method].label, _work(method, tasks, settings)) as tick:
                outcomes[method] = learn(method, tasks, settings, tick)
        # During the first task nothing is protected, so every method ends it with the same network.
        network = next(iter(outcomes.values())).first_network
        assert network is not None
        with bar("Ω, compared", comparison.work(tasks[0], settings)) as tick:
            estimators = comparison.compare(network, tasks[0], settings, tick)
        found = None
        if settings.sweep:
            with bar("λ and budget", sweep.RUNS * _work(sweep.METHOD, tasks, settings)) as tick:
                found = sweep.sweep(tasks, settings, tick)
    run = Run(settings, tasks, outcomes, estimators, found)
    if out is not None:
        write(run, Path(out))
    return run


def tasks_of(settings: Settings) -> list[Task]:
    """The tasks of a run with these settings."""
    digits = load_digits(settings.data, settings.root)
    return make_tasks(settings.scenario, settings.tasks, settings.seed, *digits)


def write(run: Run, folder: Path) -> None:
    """Writes the files of a run into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(run.results, indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    plots.save_png(plots.accuracy_matrices(run), folder / "accuracy.png")
    plots.save_png(plots.drift(run), folder / "drift.png")
    plots.save_png(plots.importance(run), folder / "importance.png")
    plots.save_png(plots.estimators(run), folder / "estimators.png")
    if run.sweep is not None:
        plots.save_png(plots.sweep(run.sweep), folder / "sweep.png")
    (folder / "report.html").write_text(report.render(run), encoding="utf-8")


def _work(method: str, tasks: list[Task], settings: Settings) -> int:
    """The number of images that a method processes: each in every epoch, and once more for Ω."""
    total = 0
    for task in tasks:
        total += len(task.train) * (settings.epochs or 0)
        if METHODS[method].measures:
            total += min(len(task.train), settings.importance_samples or len(task.train))
    return total


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs with one thread, so that the results do not depend on the number of cores.

    Layers of this size gain nothing from threads, and lose much time if other programs run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
