"""One log-log panel an axis, every line named at its end."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.entry import Result, Results
from benchmarks.lists.measure import ROOFLINE
from benchmarks.scaling.axes import OURS
from benchmarks.show import style
from benchmarks.show.text import count, duration

End = tuple[str, float, float, str]  # name, x, y, colour
APART = 11  # points between two labels
# The same way has the same colour in every panel.
COLOURS = dict(
    zip(
        (
            "torch.compile, list",
            "torch._foreach",
            "eager autograd",
            "eager, no_grad in place",
            "vmap(grad), unchunked",
            "batch size 1",
            "batch-mean, inexact",
        ),
        style.PALETTE,
        strict=True,
    )
)


def _look(name: str) -> dict[str, object]:
    if name == OURS:
        return {"color": style.OURS, "lw": 2.8, "marker": "o", "ms": 4.5, "zorder": 5}
    if name == ROOFLINE:
        return {"color": style.INK, "lw": 1, "ls": (0, (4, 3)), "zorder": 1}
    if name.startswith(OURS):
        return {"color": style.OURS, "lw": 1.4, "ls": (0, (1, 1.5)), "marker": "o", "ms": 3}
    colour = COLOURS.get(name, style.PALETTE[1])
    return {"color": colour, "lw": 1.3, "marker": "o", "ms": 3, "zorder": 3}


def _panel(axes: Axes, axis: Result) -> list[End]:
    """Draws the lines, and returns where they end."""
    names = list(dict.fromkeys(name for point in axis["points"] for name in point["seconds"]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    ends = []
    for name in names:
        points = [(p["value"], p["seconds"][name]) for p in axis["points"] if name in p["seconds"]]
        x, y = [value for value, _ in points], [found["median"] for _, found in points]
        look = _look(name)
        axes.plot(x, y, **look)
        low, high = ([found[key] for _, found in points] for key in ("q1", "q3"))
        axes.fill_between(x, low, high, color=look["color"], alpha=0.12, lw=0)
        ends.append((name, x[-1], y[-1], look["color"]))
    values = [point["value"] for point in axis["points"]]
    axes.set_xlim(values[0] / 1.2, values[-1] * 1.2)
    axes.set_xticks(values, [count(value) for value in values], size=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds)))
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(axis["label"], size=9)
    axes.grid(axis="y", color="#eceff3", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(axis["title"], size=10, loc="left")
    return ends


def _name_lines(axes: Axes, ends: list[End]) -> None:
    """To the right of the panel, pushed apart where lines end close together."""
    bottom, to_points = axes.get_ylim()[0], 72 / axes.figure.dpi

    def height(y: float) -> float:
        (_, above), (_, below) = axes.transData.transform([(1, y), (1, bottom)])
        return float(above - below) * to_points

    place = float("-inf")
    for name, x, y, colour in sorted(ends, key=lambda end: end[2]):
        place = max(height(y), place + APART)
        axes.annotate(
            name,
            (x, y),
            xycoords="data",
            xytext=(1.03, place),
            textcoords=("axes fraction", "axes points"),
            size=8,
            color=colour,
            va="center",
            weight="bold" if name == OURS else "normal",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5},
        )


def figure(results: Results, machine: str) -> Figure:
    drawn, panels = style.panels(len(results), 6.4, 3.2, share=False)
    ends = [_panel(axes, axis) for axes, axis in zip(panels, results.values(), strict=True)]
    title = "Time of a call, log-log; the band is from the first to the third quartile"
    style.finish(drawn, title, machine)
    drawn.subplots_adjust(right=0.83, wspace=0.72)  # room for names
    for axes, of_lines in zip(panels, ends, strict=True):
        _name_lines(axes, of_lines)
    return drawn
