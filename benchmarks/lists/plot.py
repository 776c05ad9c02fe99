"""Bars: how many times the roofline's time each provider takes."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.entry import Result, Results
from benchmarks.lists.measure import ROOFLINE
from benchmarks.lists.providers import Job
from benchmarks.show import style
from benchmarks.show.text import count, duration, times

MOST_ON_A_LINEAR_AXIS = 30


def _slowest(size: Result) -> float:
    return max(row["time_over_roofline"]["q3"] for row in size["providers"].values())


def _scale(axes: Axes, slowest: float) -> None:
    """Linear where bars can be compared by length, else logarithmic; room for labels."""
    if slowest <= MOST_ON_A_LINEAR_AXIS:
        axes.set_xlim(0, slowest * 1.32)
    else:
        axes.set_xscale("log")
        axes.set_xlim(0.5, slowest ** (1 / 0.7))
        axes.minorticks_off()


def _panel(axes: Axes, job: Job, size: Result) -> None:
    names = [p.name for p in job.providers]
    for row, name in enumerate(names):
        if name not in size["providers"]:
            style.not_run(axes, row, size["skipped"].get(name, "not part of that run"))
            continue
        measured, is_ours = size["providers"][name], name.startswith(job.ours)
        ratio = measured["time_over_roofline"]
        label = f"{times(ratio['median'])}   {duration(measured['seconds']['median'])}"
        style.bar(axes, row, ratio, label, style.OURS if is_ours else style.OTHERS, is_ours)
    axes.axvline(1, color=style.INK, lw=1, ls=(0, (4, 3)), zorder=4)
    _scale(axes, _slowest(size))
    style.tidy(axes, names)
    roofline = duration(size["providers"][ROOFLINE]["seconds"]["median"])
    scale = ", log scale" if axes.get_xscale() == "log" else ""
    axes.set_title(
        f"{size['title']}, {count(size['parameters'])} parameters (roofline {roofline}{scale})",
        size=9.5,
        loc="left",
    )


def figure(job: Job, sizes: Results, machine: str) -> Figure:
    """One panel a size."""
    drawn, panels = style.panels(len(sizes), 5.4, 2.9)
    for axes, size in zip(panels, sizes.values(), strict=True):
        _panel(axes, job, size)
    title = f"{job.title}: time relative to the memory roofline (dashed)"
    return style.finish(drawn, title, machine)
