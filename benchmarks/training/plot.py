"""Bars: what each way adds to a training step."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.entry import Result, Results
from benchmarks.show import style
from benchmarks.show.text import count, duration, percent
from benchmarks.training.ways import OURS, PEERS, PLAIN

NAMES = [*OURS, *PEERS]


def _panel(axes: Axes, result: Result) -> None:
    most = 0.0
    for row, way in enumerate(NAMES):
        found = result["ways"].get(way)
        if found is None:
            style.not_run(axes, row, result["skipped"].get(way, "not part of that run"))
            continue
        share = {key: 100 * value for key, value in found["added_share"].items()}
        most = max(most, share["q3"])
        added = found["added_seconds"]["median"]
        text = f"{percent(share['median'] / 100)}   {duration(added)}"
        label = text if added > 0 else "within the noise"
        colour = style.OURS if way in OURS else style.OTHERS
        style.bar(axes, row, share, label, colour, way in OURS)
    axes.set_xlim(0, max(most, 1) * 1.4)
    style.rows(axes, NAMES)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    step = duration(result["ways"][PLAIN]["seconds"]["median"])
    axes.set_title(
        f"{result['title']}, {count(result['parameters'])} parameters, B={result['batch_size']}"
        f" (a step takes {step})",
        size=9.5,
        loc="left",
    )


def figure(results: Results, machine: str) -> Figure:
    """One panel a model."""
    drawn, panels = style.panels(len(results), 5.6, 3.1)
    for axes, result in zip(panels, results.values(), strict=True):
        _panel(axes, result)
    title = "What MAS adds to a training step, in percent of the step without it"
    return style.finish(drawn, title, machine)
