"""Plots, from results.json alone. Ours has one colour everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.benchmark import Result, Results
from benchmarks.drift import summary
from benchmarks.retention import summary as retained
from benchmarks.text import count, duration, minus, percent, times

OURS, ROOFLINE, PLAIN, FLOOR = "mas_ext", "roofline", "without MAS", "floor"
GREEN, GREY, LIGHT, INK, MUTED = "#1b7f5c", "#b9c0c9", "#dfe3e8", "#2b2f36", "#667085"
# Okabe and Ito's colours, which color-blind readers can tell apart, without their green.
PALETTE = ("#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#6b7280")
DASHED = (0, (4, 3))
MOST_ON_A_LINEAR_AXIS = 30

plt.rcParams.update({"axes.edgecolor": "#98a2b3", "text.color": INK, "axes.labelcolor": INK})


# -- figures ---------------------------------------------------------------------------------------
def panels(
    number: int, width: float, height: float, columns: int = 2, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with a number of axes, each of that size."""
    columns = min(columns, number)
    rows = -(-number // columns)
    size = (width * columns + 1.4, height * rows + 0.9)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=sharey)
    for axes in grid.flat[number:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:number])


def finish(figure: Figure, title: str, machine: str) -> Figure:
    height = figure.get_figheight()
    figure.text(0.015, 1 - 0.12 / height, title, va="top", size=12, weight="bold")
    figure.text(0.015, 0.1 / height, machine, size=7.5, color=MUTED)
    figure.tight_layout(rect=(0.005, 0.3 / height, 1, 1 - 0.35 / height), h_pad=1.6, w_pad=2)
    return figure


def name_rows(axes: Axes, names: list[str]) -> None:
    """The first row is at the top."""
    axes.set_yticks(range(len(names)), names, size=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def bar(axes: Axes, row: int, spread: dict[str, float], label: str, colour: str) -> None:
    """A median with its quartiles, and a label to its right."""
    middle = spread["median"]
    error = [[max(0.0, middle - spread["q1"])], [max(0.0, spread["q3"] - middle)]]
    axes.barh(row, middle, color=colour, height=0.68, zorder=2)
    axes.errorbar(middle, row, xerr=error, color=INK, lw=1, capsize=2, zorder=3)
    axes.annotate(
        label,
        (max(spread["q3"], middle), row),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        size=8,
        weight="bold" if colour == GREEN else "normal",
    )


def no_bar(axes: Axes, row: int, reason: str) -> None:
    where, look = axes.get_yaxis_transform(), {"color": "white", "pad": 1}
    text = f"not run: {reason}"
    axes.text(0.02, row, text, transform=where, va="center", size=7.5, color="grey", bbox=look)


def bars(
    axes: Axes,
    result: Result,
    names: list[str],
    key: str,
    label: Callable[[Result, str], str],
    inexact: Iterable[str] = (),
) -> float:
    """A row per provider; ``key``: of what it shows. Returns the largest third quartile."""
    most = 0.0
    for row, name in enumerate(names):
        found = result["providers"].get(name)
        if found is None:
            no_bar(axes, row, result["skipped"].get(name, "not part of that run"))
            continue
        most = max(most, found[key]["q3"])
        colour = GREEN if name.startswith(OURS) else LIGHT if name in inexact else GREY
        bar(axes, row, found[key], label(found, name), colour)
    name_rows(axes, names)
    return most


def _names(results: Results) -> list[str]:
    every = chain.from_iterable((*r["providers"], *r["skipped"]) for r in results.values())
    return list(dict.fromkeys(name for name in every if name not in (ROOFLINE, PLAIN)))


def _panel_title(axes: Axes, text: str) -> None:
    axes.set_title(text, size=9.5, loc="left")


# -- a pass over lists of tensors ------------------------------------------------------------------
def lists(name: str, results: Results, machine: str) -> Figure:
    figure, every = panels(len(results), 5.4, 3.1)
    names = max((_names({"": size}) for size in results.values()), key=len)
    for axes, size in zip(every, results.values(), strict=True):
        most = bars(axes, size, names, "time_over_roofline", _list_label)
        axes.axvline(1, color=INK, lw=1, ls=DASHED, zorder=4)
        axes.set_xlim(0, most * 1.32)
        scale = ""
        if most > MOST_ON_A_LINEAR_AXIS:
            axes.set_xscale("log")
            axes.set_xlim(0.5, most ** (1 / 0.7))
            axes.minorticks_off()
            scale = " (logarithmic)"
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}×")
        axes.set_xlabel(f"time / time of the roofline{scale}", size=8)
        roofline = duration(size["providers"][ROOFLINE]["seconds"]["median"])
        what = f"{size['title']}, {count(size['parameters'])} parameters"
        _panel_title(axes, f"{what} (roofline {roofline})")
    title = f"{name}: time relative to the memory roofline (dashed); shorter is better"
    return finish(figure, title, machine)


def _list_label(found: Result, name: str) -> str:
    ratio, seconds = found["time_over_roofline"]["median"], found["seconds"]["median"]
    return f"{times(ratio)}   {duration(seconds)}"


# -- training --------------------------------------------------------------------------------------
def training(results: Results, machine: str) -> Figure:
    figure, every = panels(len(results), 5.6, 3.3)
    names = _names(results)
    for axes, result in zip(every, results.values(), strict=True):
        most = bars(axes, result, names, "added_share", _added_label)
        axes.set_xlim(0, max(most, 0.01) * 1.4)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_xlabel("added time / time of a step without MAS", size=8)
        step = duration(result["providers"][PLAIN]["seconds"]["median"])
        what = f"{result['title']}, {count(result['parameters'])} parameters"
        _panel_title(axes, f"{what}, batch {result['batch_size']} (a step takes {step})")
    return finish(figure, "What MAS adds to a training step; shorter is better", machine)


def _added_label(found: Result, name: str) -> str:
    added = found["added_seconds"]["median"]
    if added <= 0:
        return "within the noise"
    return f"{percent(found['added_share']['median'])}   {duration(added)}"


# -- exact importance ------------------------------------------------------------------------------
def per_sample(results: Results, machine: str) -> Figure:
    figure, every = panels(len(results), 6.2, 2.7)
    means = ("batch-mean", "batch-mean, mas_ext")
    names = [name for name in _names(results) if name != means[1]]  # one inexact one is enough
    for axes, result in zip(every, results.values(), strict=True):

        def label(found: Result, name: str, extra: Any = result["extra_bytes"]) -> str:
            memory = extra.get(name)
            text = "" if memory is None else minus(f"   {memory / 2**20:+,.0f} MiB")
            ratio, seconds = found["time_over_batch_mean"]["median"], found["seconds"]["median"]
            return f"{times(ratio)}   {duration(seconds)}{text}"

        most = bars(axes, result, names, "time_over_batch_mean", label, (*means, FLOOR))
        axes.axvline(1, color=INK, lw=1, ls=DASHED, zorder=4)
        axes.set_xscale("log")
        axes.set_xlim(0.25, max(most, 2) ** 1.5 * 3)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}×")
        axes.set_xlabel("time / time of the batch-mean (logarithmic)", size=8)
        _panel_title(axes, f"{result['title']} {result['details']}, batch {result['batch_size']}")
    title = "Exact importance of a batch: time relative to the inexact batch-mean, and extra memory"
    return finish(figure, title, machine)


# -- scaling ---------------------------------------------------------------------------------------
def scaling(results: Results, machine: str) -> Figure:
    figure, every = panels(len(results), 6.4, 3.3, sharey=False)
    names = _curves(results.values())
    others = [name for name in names if not name.startswith(OURS) and name != ROOFLINE]
    colours = dict(zip(others, (*PALETTE, PALETTE[1]), strict=False))  # the same in every panel
    for axes, axis in zip(every, results.values(), strict=True):
        _axis(axes, axis, colours)
    title = "Time of a call; bands show the first to the third quartile"
    return finish(figure, title, machine)


def _curves(axes: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(n for axis in axes for p in axis["points"] for n in p["seconds"]))


def _line_style(name: str, colours: dict[str, str]) -> dict[str, Any]:
    if name == OURS:
        return {"color": GREEN, "lw": 2.8, "marker": "o", "ms": 4.5, "zorder": 5}
    if name == ROOFLINE:
        return {"color": INK, "lw": 1, "ls": DASHED, "zorder": 1}
    if name.startswith(OURS):
        return {"color": GREEN, "lw": 1.4, "ls": (0, (1, 1.5)), "marker": "o", "ms": 3}
    return {"color": colours[name], "lw": 1.3, "marker": "o", "ms": 3, "zorder": 3}


def _axis(axes: Axes, axis: Result, colours: dict[str, str]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name in _curves([axis]):
        points = [(p["value"], p["seconds"][name]) for p in axis["points"] if name in p["seconds"]]
        x, style = [value for value, _ in points], _line_style(name, colours)
        low, y, high = ([found[k] for _, found in points] for k in ("q1", "median", "q3"))
        axes.plot(x, y, label=name, **style)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)
    values = [point["value"] for point in axis["points"]]
    axes.set_xlim(values[0] / 1.2, values[-1] * 1.2)
    axes.set_xticks(values, [count(value) for value in values], size=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds)))
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(f"{axis['label']} (logarithmic)", size=9)
    axes.set_ylabel("time (logarithmic)", size=9)
    axes.grid(axis="y", color="#eceff3", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="best")
    _panel_title(axes, axis["title"])


# -- the drift study -------------------------------------------------------------------------------
SCENARIOS = dict(zip(("permuted", "rotated", "split", "incremental"), PALETTE, strict=False))


def drift(found: Results, machine: str) -> Figure:
    """Every λ relative to the best, and the recipes beside it."""
    figure, (left, right) = panels(2, 5, 4.2)
    for axes in (left, right):
        axes.axhspan(-100 * summary.CLOSE, 12, color=GREEN, alpha=0.08, lw=0)
        axes.set_ylim(-20, 12)
    for problem in found.values():
        top, points = summary.best(problem)[1], summary.curve(problem)
        look: Any = {
            "color": SCENARIOS[problem["scenario"]],
            "ls": "-" if problem["mode"] == "proximal" else DASHED,
            "marker": "o",
            "ms": 3,
            "lw": 1.3,
            "alpha": 0.85,
        }
        left.plot(list(points), [100 * (value - top) for value in points.values()], **look)
        gains = [100 * summary.gain(problem, name) for name in summary.RECIPES]
        right.plot(range(len(gains)), gains, **look)
    _log(left)
    left.set_xlabel("fixed λ (logarithmic)")
    left.set_ylabel("accuracy minus that of the best λ,\nin percentage points")
    right.set_xticks(range(len(summary.RECIPES)), summary.RECIPES)
    right.spines[["top", "right"]].set_visible(False)
    present = {p["title"].split(",")[0]: SCENARIOS[p["scenario"]] for p in found.values()}
    lines = [Line2D([], [], color=colour, label=label) for label, colour in present.items()]
    lines.append(Line2D([], [], color=INK, ls=DASHED, label="in gradient mode"))
    left.legend(handles=lines, fontsize=8, frameon=False, loc="lower left")
    return finish(figure, "A fixed λ suits few problems; one budget suits nearly all", machine)


def _log(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


# -- what a pretrained model keeps -----------------------------------------------------------------
DRIFTS = [0.003 * 1.2**k for k in range(22)]


def retention(found: Results, machine: str) -> Figure:
    """All weights on the left, LoRA on the right: what is learned within each limit."""
    figure, every = panels(2 * len(found), 5.6, 4.2)
    for number, result in enumerate(found.values()):
        methods = retained.methods_of(result)
        for axes, with_lora in zip(every[2 * number :], (False, True), strict=False):
            chosen = {n: m for n, m in methods.items() if n.startswith("LoRA") == with_lora}
            others = [n for n, m in chosen.items() if not m.ours]
            colours = dict(zip(others, PALETTE * 2, strict=False))
            dashes = {n: "-" if k < len(PALETTE) else DASHED for k, n in enumerate(others)}
            mine = dict(zip([n for n, m in chosen.items() if m.ours], OUR_DASHES, strict=False))
            for name, method in chosen.items():
                y = [retained.perplexity(result, method, limit)[0] for limit in DRIFTS]
                look: Any = {"lw": 1.3, "color": colours.get(name), "ls": dashes.get(name)}
                if method.ours:
                    look = {"lw": 2.2, "color": GREEN, "ls": mine[name], "zorder": 4}
                axes.plot(DRIFTS, y, label=name, **look)
            _log(axes)
            axes.set_xlabel("drift on held-out English and code, nats (logarithmic)", size=9)
            axes.set_ylabel("perplexity on the new text", size=9)
            axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
            _panel_title(axes, f"{result['title']}, {'LoRA' if with_lora else 'all weights'}")
    title = "What is learned within a limit of the drift; lower is better"
    return finish(figure, title, machine)


OUR_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)))


# -- files -----------------------------------------------------------------------------------------
PLOTS: dict[str, Callable[[Results, str], Figure]] = {
    **{name: partial(lists, name) for name in ("penalty", "accumulate", "proximal")},
    "scaling": scaling,
    "training": training,
    "per_sample": per_sample,
    "drift": drift,
    "retention": retention,
}


def save(name: str, results: Results, machine: str, out: Path) -> Path:
    """Writes a benchmark's plot as PNG."""
    figure, path = PLOTS[name](results, machine), out / f"{name}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
