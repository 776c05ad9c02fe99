"""Accuracy against λ and against drift: all problems together, and one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.drift.problems import DRIFTS
from benchmarks.drift.study import FREE
from benchmarks.drift.summary import (
    CLOSE,
    WAYS,
    accuracy,
    at_default,
    best,
    changes,
    curve,
    deviation,
    forgetting,
    problems,
    reached,
)
from benchmarks.entry import Result, Results
from benchmarks.show import style
from mas_ext._penalty.auto_strength import DEFAULT

SCENARIOS = dict(zip(("permuted", "rotated", "split", "incremental"), style.PALETTE, strict=False))
COLUMNS = 4


def figures(results: Results, machine: str) -> dict[str, Figure]:
    found, changed = problems(results), changes(results)
    drawn: dict[str, Callable[[], Figure]] = {}
    if found:
        drawn["drift"] = lambda: _together(found, machine)
        drawn["drift_problems"] = lambda: _apart(found, machine)
    if changed:
        drawn["drift_changes"] = lambda: _changes(changed, machine)
    return {stem: draw() for stem, draw in drawn.items()}


# -- all together ----------------------------------------------------------------------------------
def _together(found: dict[str, Result], machine: str) -> Figure:
    """Every curve as what it lacks to its own best λ: where do they all lack little?"""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axes, kind in ((left, "lambda"), (right, "drift")):
        axes.axhspan(-100 * CLOSE, 3, color=style.OURS, alpha=0.08, lw=0)
        for problem in found.values():
            _, top = best(problem)
            points = curve(problem, kind)
            axes.plot(
                list(points),
                [100 * (value - top) for value in points.values()],
                color=SCENARIOS[problem["scenario"]],
                ls="-" if problem["mode"] == "proximal" else (0, (4, 1.5)),
                marker="o",
                ms=3,
                lw=1.3,
                alpha=0.85,
            )
        _log(axes)
    left.set_xlabel("λ, fixed")
    left.set_ylabel("accuracy, in points\nfrom the best λ of the grid")
    left.set_ylim(-20, 3)
    right.axvline(DEFAULT, color=style.OURS, lw=1.5, zorder=0)
    right.annotate(
        f" drift = {DEFAULT:g},\n the default",
        (DEFAULT, -19.3),
        color=style.OURS,
        size=9,
        va="bottom",
    )
    right.set_xlabel('drift, with lambda_reg="auto"')
    right.set_xticks(DRIFTS, [f"{value:g}" for value in DRIFTS])
    right.minorticks_off()
    left.legend(handles=_legend(found), fontsize=8, frameon=False, loc="lower left")
    title = "A fixed λ suits few problems; one drift suits nearly all"
    return style.finish(figure, title, machine)


def _legend(found: dict[str, Result]) -> list[Line2D]:
    present = {problem["scenario"] for problem in found.values()}
    names = {"incremental": "class-incremental"}
    lines = [
        Line2D([], [], color=colour, label=names.get(name, name))
        for name, colour in SCENARIOS.items()
        if name in present
    ]
    return [*lines, Line2D([], [], color=style.INK, ls=(0, (4, 1.5)), label="in gradient mode")]


def _log(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


# -- one by one ------------------------------------------------------------------------------------
def _apart(found: dict[str, Result], machine: str) -> Figure:
    """A panel a problem: accuracy and forgetting over λ, and where the default drift sits."""
    rows = -(-len(found) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(12.5, 2.5 * rows + 0.9), squeeze=False)
    every = list(grid.flat)
    for axes, problem in zip(every, found.values(), strict=False):
        _panel(axes, problem)
    for axes in every[len(found) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("λ", size=8)
    handles = [
        Line2D([], [], color=style.INK, marker="o", ms=3, label="accuracy with a fixed λ"),
        Line2D([], [], color=style.OTHERS, marker="o", ms=3, label="forgetting with it"),
        Line2D([], [], color=style.MUTED, ls=":", label=f"accuracy of {FREE}"),
        Line2D([], [], color=style.OURS, marker="D", ls="", label=f"drift {DEFAULT:g}"),
    ]
    figure.legend(handles=handles, fontsize=8, frameon=False, loc="upper right", ncols=4)
    return style.finish(figure, "Where the default drift sits, in percent", machine)


def _panel(axes: Axes, problem: Result) -> None:
    runs, colour = problem["lambda"], SCENARIOS[problem["scenario"]]
    finite = {float(v): r for v, r in runs.items() if accuracy(r) is not None}
    means = [100 * (accuracy(r) or 0.0) for r in finite.values()]
    spread = [100 * deviation(r) for r in finite.values()]
    lost = [100 * (forgetting(r) or 0.0) for r in finite.values()]
    axes.fill_between(
        list(finite),
        [m - s for m, s in zip(means, spread, strict=True)],
        [m + s for m, s in zip(means, spread, strict=True)],
        color=colour,
        alpha=0.15,
        lw=0,
    )
    axes.plot(list(finite), means, color=colour, marker="o", ms=3, lw=1.5)
    axes.plot(list(finite), lost, color=style.OTHERS, marker="o", ms=3, lw=1.3)
    axes.axhline(100 * (accuracy(problem[FREE]) or 0.0), color=style.MUTED, ls=":", lw=1.2)
    for where, run in zip(problem["found"], at_default(problem), strict=True):
        if run is not None:
            value = 100 * run["average_accuracy"]
            axes.plot(where, value, color=style.OURS, marker="D", ms=5, ls="", alpha=0.8, zorder=3)
    _log(axes)
    axes.set_ylim(min(0.0, *lost) - 3, max(means) + 8)
    mode = problem["mode"].replace("proximal", "prox.").replace("gradient", "grad.")
    axes.set_title(f"{problem['title']}\n{problem['optimizer']}, {mode}", size=8, loc="left")


# -- what a change moves ---------------------------------------------------------------------------
def _changes(changed: dict[str, Result], machine: str) -> Figure:
    """A row a change: where the best λ, the default drift and the λ kept end up."""
    figure, panels = plt.subplots(
        1, len(changed), figsize=(5.5 * len(changed), 3.4), sharey=True, squeeze=False
    )
    for axes, result in zip(panels[0], changed.values(), strict=True):
        outcomes = result["changes"]
        for row, each in enumerate(outcomes.values()):
            _change(axes, row, each)
        style.rows(axes, [each["title"] for each in outcomes.values()])
        axes.set_title(result["title"], size=9.5, loc="left")
        axes.set_xlabel("average accuracy, percent", size=8)
        axes.grid(axis="x", color=style.INEXACT, lw=0.6)
        axes.set_axisbelow(True)
    handles = [
        Line2D(
            [], [], color=style.OTHERS, lw=7, label=f"within {100 * CLOSE:g} points of the best λ"
        ),
        *(Line2D([], [], ls="", label=WAYS[way], **look) for way, look in MARKS.items()),
    ]
    figure.legend(handles=handles, fontsize=8, frameon=False, loc="lower right", ncols=4)
    return style.finish(figure, "What a change of the network or the batch does", machine)


MARKS: dict[str, dict[str, Any]] = {
    "best": {"color": style.INK, "marker": "|", "ms": 11, "mew": 1.8},
    "kept": {"color": style.PALETTE[1], "marker": "o", "ms": 6},
    "drift": {"color": style.OURS, "marker": "D", "ms": 6},
}


def _change(axes: Axes, row: int, outcomes: Result) -> None:
    found = reached(outcomes)
    axes.plot(
        [100 * (found["best"] - CLOSE), 100 * found["best"]],
        [row, row],
        color=style.OTHERS,
        lw=7,
        alpha=0.6,
        solid_capstyle="butt",
    )
    for way, look in MARKS.items():
        axes.plot(100 * found[way], row, ls="", zorder=3, **look)
