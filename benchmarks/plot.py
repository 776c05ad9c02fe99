"""Measurements as bars: how many times the roofline's time each provider takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.providers import Benchmark
from benchmarks.report import describe
from benchmarks.timing import ROOFLINE

OURS, OTHERS, INK = "#1b7f5c", "#b9c0c9", "#2b2f36"
MOST_ON_A_LINEAR_AXIS = 30


def duration(seconds: float) -> str:
    if seconds >= 0.01:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def times(ratio: float) -> str:
    if ratio < 1.995:
        return f"{ratio:.2f}×"
    return f"{ratio:.1f}×" if ratio < 10 else f"{ratio:,.0f}×"


def _slowest(size: dict[str, Any]) -> float:
    return max(row["time_over_roofline"]["q3"] for row in size["providers"].values())


def bar(
    axes: Axes, row: int, ratio: dict[str, float], label: str, color: str, is_bold: bool
) -> None:
    middle = ratio["median"]
    spread = [[middle - ratio["q1"]], [ratio["q3"] - middle]]
    axes.barh(row, middle, color=color, height=0.68, zorder=2)
    axes.errorbar(middle, row, xerr=spread, color=INK, lw=1, capsize=2, zorder=3)
    axes.annotate(
        label,
        (ratio["q3"], row),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        size=8,
        color=INK,
        weight="bold" if is_bold else "normal",
    )


def not_run(axes: Axes, row: int, reason: str) -> None:
    axes.annotate(
        f"not run: {reason}",
        (0, row),
        xytext=(8, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        size=7.5,
        color="grey",
        style="italic",
        bbox={"color": "white", "pad": 1},
        zorder=5,
    )


def tidy(axes: Axes, names: list[str]) -> None:
    """Rows with their names, the first at the top."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}×")
    axes.set_yticks(range(len(names)), names, size=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _scale(axes: Axes, slowest: float) -> None:
    """Linear where bars can be compared by length, else logarithmic; room for labels."""
    if slowest <= MOST_ON_A_LINEAR_AXIS:
        axes.set_xlim(0, slowest * 1.32)
    else:
        axes.set_xscale("log")
        axes.set_xlim(0.5, slowest ** (1 / 0.7))
        axes.minorticks_off()


def _panel(axes: Axes, benchmark: Benchmark, size: dict[str, Any]) -> None:
    names = [p.name for p in benchmark.providers]
    for row, name in enumerate(names):
        if name not in size["providers"]:
            not_run(axes, row, size["skipped"][name])
            continue
        measured, is_ours = size["providers"][name], name.startswith(benchmark.ours)
        ratio = measured["time_over_roofline"]
        label = f"{times(ratio['median'])}   {duration(measured['seconds']['median'])}"
        bar(axes, row, ratio, label, OURS if is_ours else OTHERS, is_ours)
    axes.axvline(1, color=INK, lw=1, ls=(0, (4, 3)), zorder=4)
    _scale(axes, _slowest(size))
    tidy(axes, names)
    roofline = duration(size["providers"][ROOFLINE]["seconds"]["median"])
    scale = ", log scale" if axes.get_xscale() == "log" else ""
    axes.set_title(
        f"{size['title']}, {size['parameters'] / 1e6:.3g} M parameters"
        f" (roofline {roofline}{scale})",
        size=9.5,
        loc="left",
    )


def draw(
    benchmark: Benchmark, sizes: dict[str, Any], machine: dict[str, Any], folder: Path
) -> Path:
    """One panel a size."""
    columns = min(2, len(sizes))
    rows = -(-len(sizes) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5.4 * columns + 1.4, 2.9 * rows + 0.9), squeeze=False, sharey=True
    )
    panels = list(grid.flat)
    for axes, size in zip(panels, sizes.values(), strict=False):
        _panel(axes, benchmark, size)
    for axes in panels[len(sizes) :]:
        axes.set_visible(False)
    title = f"{benchmark.title}: time relative to the memory roofline (dashed)"
    figure.suptitle(title, x=0.015, ha="left", size=12, weight="bold")
    figure.text(0.015, 0.012, describe(machine), size=7.5, color="grey")
    figure.tight_layout(rect=(0.005, 0.03, 1, 0.99), h_pad=1.6, w_pad=2)
    path = folder / f"{benchmark.name}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
