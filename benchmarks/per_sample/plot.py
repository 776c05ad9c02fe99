"""Bars: how many times the inexact estimate's time each provider takes, and its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.per_sample.providers import BATCH, BATCH_MEANS, OURS, UNCHUNKED, providers
from benchmarks.plot import INK, OTHERS, bar, duration, not_run, tidy, times
from benchmarks.plot import OURS as OUR_COLOUR
from benchmarks.report import describe

INEXACT = "#dfe3e8"
NAMES = [name for name in providers(1) if name != BATCH]  # one inexact estimate is enough


def _memory(result: dict[str, Any], name: str) -> str:
    extra = result["extra_bytes"].get(name)
    return "" if extra is None else f"   {extra / 2**20:+,.0f} MiB"


def _colour(name: str) -> str:
    return OUR_COLOUR if name == OURS else INEXACT if name in BATCH_MEANS else OTHERS


def _panel(axes: Axes, result: dict[str, Any]) -> None:
    slowest = 1.0
    for row, name in enumerate(NAMES):
        measured = result["providers"].get(name)
        if measured is None:
            not_run(axes, row, result["skipped"][name])
            continue
        ratio = measured["time_over_batch_mean"]
        slowest = max(slowest, ratio["q3"])
        time = duration(measured["seconds"]["median"])
        label = f"{times(ratio['median'])}   {time}{_memory(result, name)}"
        bar(axes, row, ratio, label, _colour(name), name == OURS)
    goal = result["goals"]["time_over_batch_mean"]["goal"]
    axes.axvline(goal, color=OUR_COLOUR, lw=1, ls=(0, (4, 3)), zorder=4)
    axes.set_xscale("log")
    axes.set_xlim(0.25, max(slowest, 2) ** 1.5 * 3)
    axes.minorticks_off()
    tidy(axes, NAMES)
    axes.set_title(
        f"{result['title']} {result['details']}, B={result['batch_size']}{_vmap_memory(result)}",
        size=9.5,
        loc="left",
    )


def _vmap_memory(result: dict[str, Any]) -> str:
    extra = result["extra_bytes"].get(UNCHUNKED)
    return "" if extra is None else f"  (vmap in one go {extra / 2**20:+,.0f} MiB)"


def draw(results: dict[str, Any], folder: Path) -> Path:
    """One panel a workload."""
    workloads = list(results["workloads"].values())
    columns = min(2, len(workloads))
    rows = -(-len(workloads) // columns)
    size = (6.2 * columns + 1.4, 2.5 * rows + 0.9)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for axes, result in zip(grid.flat, workloads, strict=False):
        _panel(axes, result)
    for axes in list(grid.flat)[len(workloads) :]:
        axes.set_visible(False)
    title = "Ω of one batch: time relative to the inexact batch-mean, log scale; goal dashed"
    figure.suptitle(title, x=0.015, ha="left", size=12, weight="bold", color=INK)
    figure.text(0.015, 0.012, describe(results["machine"]), size=7.5, color="grey")
    figure.tight_layout(rect=(0.005, 0.03, 1, 0.99), h_pad=1.6, w_pad=2)
    path = folder / "per_sample.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
