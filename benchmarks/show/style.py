"""How plots look: ours in one colour everywhere, the others told apart without it."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHERS, INK, MUTED = "#1b7f5c", "#b9c0c9", "#2b2f36", "#667085"
INEXACT = "#dfe3e8"
# Okabe and Ito's, which can be told apart by those who do not see red or green, without the green.
PALETTE = ("#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#6b7280")

matplotlib.rcParams.update(
    {
        "font.family": ["DejaVu Sans"],
        "svg.fonttype": "none",
        "svg.hashsalt": "mas_ext",  # the same figure gives the same file
        "axes.edgecolor": "#98a2b3",
        "text.color": INK,
        "axes.labelcolor": INK,
    }
)


def bar(
    axes: Axes, row: int, ratio: dict[str, float], label: str, color: str, is_bold: bool
) -> None:
    """A median with its quartiles, and its label behind it."""
    middle = ratio["median"]
    spread = [[max(0.0, middle - ratio["q1"])], [max(0.0, ratio["q3"] - middle)]]
    axes.barh(row, middle, color=color, height=0.68, zorder=2)
    axes.errorbar(middle, row, xerr=spread, color=INK, lw=1, capsize=2, zorder=3)
    axes.annotate(
        label,
        (max(ratio["q3"], middle), row),
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
    rows(axes, names)


def rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, size=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def panels(
    count: int, width: float, height: float, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """Two columns of axes, as many as asked for."""
    columns = min(2, count)
    lines = -(-count // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(width * columns + 1.4, height * lines + 0.9),
        squeeze=False,
        sharey=share,
    )
    every = list(grid.flat)
    for axes in every[count:]:
        axes.set_visible(False)
    return figure, every[:count]


def finish(figure: Figure, title: str, foot: str) -> Figure:
    """The title above, and what the figures mean nothing without below, at any height."""
    height = figure.get_figheight()
    figure.text(0.015, 1 - 0.12 / height, title, va="top", size=12, weight="bold", color=INK)
    figure.text(0.015, 0.1 / height, foot, size=7.5, color=MUTED)
    figure.tight_layout(rect=(0.005, 0.3 / height, 1, 1 - 0.35 / height), h_pad=1.6, w_pad=2)
    return figure


def save_png(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def as_svg(figure: Figure, description: str) -> str:
    """SVG to put into a page: no prologue, and words for those who cannot see it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    width = 110 * figure.get_figwidth()  # at most; narrower pages shrink it
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="max-width: {width:.0f}px"', svg, count=1
    )
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
