"""Bars: how many times the inexact estimate's time each provider takes, and its memory."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.entry import Results
from benchmarks.per_sample.providers import BATCH, BATCH_MEANS, OURS, UNCHUNKED, providers
from benchmarks.show.style import INEXACT, OTHERS, bar, finish, not_run, panels, tidy
from benchmarks.show.style import OURS as OUR_COLOUR
from benchmarks.show.text import duration, times

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


def figure(workloads: Results, machine: str) -> Figure:
    """One panel a workload."""
    drawn, every = panels(len(workloads), 6.2, 2.5)
    for axes, result in zip(every, workloads.values(), strict=True):
        _panel(axes, result)
    title = "Ω of one batch: time relative to the inexact batch-mean, log scale; goal dashed"
    return finish(drawn, title, machine)
