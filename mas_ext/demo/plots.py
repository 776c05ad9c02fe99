"""The demo's figures, as PNG files and as SVG inside the report.

Text and lines have the colours of :data:`THEMED`. The report's SVG replaces each of these by a CSS
variable, so that the same figure is readable on a light and on a dark page.
"""

from __future__ import annotations

import io
import math
import re
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator

import mas_ext
from mas_ext._drift.budget import DEFAULT_LIMIT, SLACK
from mas_ext.demo import comparison, metrics
from mas_ext.demo.data import SIDE
from mas_ext.demo.methods import METHODS
from mas_ext.demo.results import Run

INK, MUTED, GRID = "#1d2433", "#667085", "#d9dde5"
# Colours that most colour-blind readers tell apart (after Okabe and Ito), and for those who do not,
# and on paper, a marker and a line style each.
COLOURS = {
    "finetune": "#d55e00",
    "l2sp": "#dc9a00",
    "ewc": "#a3458f",
    "mas_proximal": "#0b8f6a",
    "mas": "#1f5fbf",
}
MARKERS = {"finetune": "o", "l2sp": "s", "ewc": "v", "mas_proximal": "^", "mas": "D"}
LINES: dict[str, Any] = {
    "finetune": (0, (1, 1.2)),
    "l2sp": (0, (6, 1.5, 1, 1.5)),
    "ewc": (0, (2.5, 1.2)),
    "mas_proximal": "-",
    "mas": (0, (6, 1.5)),
}
THEMED = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {
    colour: f"--{method.replace('_', '-')}" for method, colour in COLOURS.items()
}
ACCURACY = LinearSegmentedColormap.from_list(
    "accuracy", ["#f3e3d7", "#9db8dd", "#3f6fc0", "#1c3a80"]
)
IMPORTANCE = matplotlib.colormaps["magma"]
MOST_MAPS = 10
CROP: Any = {"bbox_inches": "tight", "pad_inches": 0.12}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "svg.fonttype": "none",  # text is stored as text and drawn in the page's font
    "svg.hashsalt": "mas_ext",  # the same figure gives the same bytes
}


def _figure(width: float, height: float, w_pad: float = 0.05) -> Figure:
    # Without pyplot, nothing is shown, and the figures of a notebook are not affected.
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=w_pad))


def _empty(why: str) -> Figure:
    figure = _figure(6, 1.2)
    figure.text(0.5, 0.5, why, ha="center", color=MUTED)
    return figure


def accuracy_matrices(run: Run) -> Figure:
    """The accuracy matrices of all methods side by side, with one colour scale."""
    matrices = {m: np.array(o.accuracy_matrix) for m, o in run.outcomes.items()}
    seen = [r[np.tril_indices(len(r))].min() for r in matrices.values()]
    low = min(math.floor(min(seen) * 10) / 10, 0.9)
    with matplotlib.rc_context(STYLE):
        figure = _figure(2.5 * len(matrices) + 0.9, 3.1)
        axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
        for ax, (method, matrix) in zip(axes, matrices.items(), strict=True):
            cells = _draw_matrix(ax, matrix, low)
            ax.set_title(METHODS[method].label)
            ax.set_xlabel("accuracy on task")
        axes[0].set_ylabel("after learning task")
        bar = figure.colorbar(cells, ax=list(axes), fraction=0.025, pad=0.015)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        bar.ax.yaxis.set_major_formatter("{x:.0%}")
    return figure


def _draw_matrix(ax: Axes, matrix: np.ndarray, low: float) -> Any:
    size = len(matrix)
    learned = np.tril(np.ones((size, size), dtype=bool))
    cells = ax.pcolormesh(
        np.ma.masked_where(~learned, matrix),
        cmap=ACCURACY,
        vmin=low,
        vmax=1.0,
        edgecolors="none",
    )
    for t in range(size):
        for j in range(size):
            dark = matrix[t, j] > (low + 1) / 2
            # A number is drawn on its cell's colour, which is the same in every theme.
            colour = ("#ffffff" if dark else "#22283a") if learned[t, j] else MUTED
            ax.text(
                j + 0.5,
                t + 0.5,
                f"{100 * matrix[t, j]:.0f}",
                ha="center",
                va="center",
                color=colour,
                fontsize=10 if size <= 6 else 7,
                alpha=1.0 if learned[t, j] else 0.6,
            )
    ticks = np.arange(size) + 0.5
    ax.set_xticks(ticks, [str(n + 1) for n in range(size)])
    ax.set_yticks(ticks, [str(n + 1) for n in range(size)])
    ax.tick_params(length=0)
    ax.set_aspect("equal")
    ax.set_ylim(size, 0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return cells


def learning_curves(run: Run) -> Figure:
    """After each task, the mean accuracy over all tasks so far, and the accuracy on the first."""
    panels = {
        "Mean over the tasks seen so far": metrics.accuracy_so_far,
        "Task 1, as later tasks are learned": metrics.first_task_accuracy,
    }
    with matplotlib.rc_context(STYLE):
        figure = _figure(10.5, 4.0)
        axes = figure.subplots(1, 2, sharey=True)
        for ax, (title, curve) in zip(axes, panels.items(), strict=True):
            for method, outcome in run.outcomes.items():
                values = curve(outcome.accuracy_matrix)
                ax.plot(
                    range(1, len(values) + 1),
                    values,
                    color=COLOURS[method],
                    linestyle=LINES[method],
                    marker=MARKERS[method],
                    markersize=6,
                    linewidth=2,
                    label=METHODS[method].label,
                )
            ax.set_title(title, loc="left")
            ax.set_xlabel("after learning task")
            ax.set_xticks(range(1, len(run.tasks) + 1))
            ax.yaxis.set_major_formatter("{x:.0%}")
            ax.tick_params(length=0)
            ax.grid(axis="y")
            ax.spines[["left"]].set_visible(False)
        axes[0].set_ylabel("test accuracy")
        lines = axes[0].get_legend_handles_labels()
        figure.legend(
            *lines, frameon=False, loc="outside lower center", ncols=len(METHODS), handlelength=3.5
        )
    return figure


def drift(run: Run) -> Figure:
    """The drift and λ, step by step, of the methods whose λ follows the budget."""
    following = [method for method, outcome in run.outcomes.items() if outcome.trace]
    with matplotlib.rc_context(STYLE):
        if not following:
            return _empty("no λ followed the budget")
        figure = _figure(10.5, 5.4)
        axes = figure.subplots(2, len(following), sharex=True, squeeze=False)
        for (above, below), method in zip(axes.T, following, strict=True):
            above.set_title(METHODS[method].label, loc="left", pad=20)
            above.tick_params(labelleft=above is axes[0, 0])
            _draw_by_step(above, run, method, "drift")
            _draw_budget(above, run, method)
            _draw_by_step(below, run, method, "lambda_reg")
            below.set_xlabel("steps of the optimizer")
            above.set_ylim(_drift_range(run, following))
        axes[0, 0].set_ylabel("drift, nats (log scale)")
        axes[1, 0].set_ylabel("λ (log scale)")
        lines = axes[0, 0].get_legend_handles_labels()
        figure.legend(*lines, frameon=False, loc="outside lower center", ncols=3)
    return figure


def _draw_by_step(ax: Axes, run: Run, method: str, name: str) -> None:
    """What was recorded, as a line for each task but the first, when nothing can drift yet."""
    ends = _ends(run)
    for number, start in enumerate(ends[:-1], start=1):
        records = [one for one in run.outcomes[method].trace if one.task == number]
        steps = [start + one.step for one in records]
        values = [getattr(one, name) for one in records]
        ax.plot(steps, values, color=COLOURS[method], linewidth=1.3)
        ax.axvline(start, color=GRID, linewidth=1, zorder=0)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.yaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
    ax.minorticks_off()
    ax.set_xlim(ends[0], ends[-1])
    ax.tick_params(which="both", length=0)
    ax.spines[["left"]].set_visible(False)


def _draw_budget(ax: Axes, run: Run, method: str) -> None:
    """The budget, what λ aims for, where settling left the drift, and the tasks' numbers."""
    budget, ends = run.settings.budget, _ends(run)
    after = [settled.after for settled in run.outcomes[method].drifts[1:] if settled]
    dashed: Any = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
    dots: Any = {"color": INK, "marker": "o", "markersize": 5, "linestyle": "none"}
    ax.axhline(SLACK * budget, label=f"{SLACK:g} × budget, which λ aims for in training", **dashed)
    ax.axhline(budget, label=f"budget: {budget:g} nats per prediction", color=INK, linewidth=1)
    ax.plot(ends[1:], after, label="the task’s end, after settling", clip_on=False, **dots)
    for number, (start, end) in enumerate(pairwise(ends), start=2):
        middle, where = (start + end) / 2, ax.get_xaxis_transform()
        ax.text(middle, 1.02, f"task {number}", transform=where, ha="center", color=MUTED, size=8)


def _drift_range(run: Run, methods: list[str]) -> tuple[float, float]:
    """The drifts to show: all, but for those far below the budget, where a task begins."""
    outcomes = [run.outcomes[method] for method in methods]
    after = [one.after for o in outcomes for one in o.drifts if one and one.after > 0]
    budget = run.settings.budget
    found = [one.drift for o in outcomes for one in o.trace if math.isfinite(one.drift)]
    high = max(SLACK * budget, *found)
    return min(budget / 20, *(value / 2 for value in after)), 1.5 * high


def _ends(run: Run) -> list[int]:
    """The step at which each task ended, counted from the start of the first."""
    epochs, size = run.settings.epochs or 0, run.settings.batch_size
    return list(accumulate(epochs * math.ceil(len(task.train) / size) for task in run.tasks))


def sweep(found: dict[str, Any]) -> Figure:
    """Accuracy and forgetting as functions of λ and of the budget."""
    names = {"lambda": "λ, fixed", "budget": "budget, nats per prediction"}
    with matplotlib.rc_context(STYLE):
        figure = _figure(10.5, 3.7)
        axes = figure.subplots(1, 2, sharey=True)
        for ax, (kind, label) in zip(axes, names.items(), strict=True):
            curve = found[kind]
            colour = COLOURS["mas_proximal"]
            for values, style in (("average_accuracy", "-"), ("forgetting", ":")):
                ax.plot(
                    curve["values"],
                    curve[values],
                    color=colour,
                    linestyle=style,
                    marker=MARKERS["mas_proximal"],
                    markersize=5,
                    linewidth=2,
                    label=values.replace("_", " "),
                )
            ax.set_xscale("log")
            ax.set_xticks(curve["values"], [f"{value:g}" for value in curve["values"]])
            ax.minorticks_off()
            ax.set_xlabel(label)
            ax.yaxis.set_major_formatter("{x:.0%}")
            ax.tick_params(length=0)
            ax.grid(axis="y")
            ax.spines[["left"]].set_visible(False)
        axes[1].axvline(DEFAULT_LIMIT, color=MUTED, linewidth=1, zorder=0)
        axes[0].legend(frameon=False, loc="center left")
    return figure


def importance(run: Run) -> Figure:
    """Ω of each layer after the last task, and of each input pixel for each task."""
    measured = [m for m, o in run.outcomes.items() if o.importance[-1]]
    with matplotlib.rc_context(STYLE):
        if not measured:
            return _empty("none of these methods measures Ω")
        figure = _figure(10.5, 5.6)
        grid = figure.add_gridspec(2, 1, height_ratios=[1.5, 1])
        top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
        _draw_layers(top.subplots(), run, measured)
        _draw_maps(bottom, run, pictured(run))
    return figure


def _draw_layers(ax: Axes, run: Run, measured: list[str]) -> None:
    """A thin bar from the 5th to the 95th percentile, a thick one between quartiles, the mean."""
    names = list(run.outcomes[measured[0]].importance[-1])
    for row, method in enumerate(measured):
        shift = 0.26 * (row - (len(measured) - 1) / 2)
        layers = [omega.flatten() for omega in run.outcomes[method].importance[-1].values()]
        unit = float(torch.cat(layers).mean()) or 1.0
        for y, omega in enumerate(layers):
            values = (omega / unit).numpy()
            mean = values.mean()
            values = values[values > 0]
            if not len(values):
                continue
            p5, p25, p50, p75, p95 = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
            colour = COLOURS[method]
            ax.plot([p5, p95], [y + shift] * 2, color=colour, linewidth=1.5)
            ax.plot(
                [p25, p75],
                [y + shift] * 2,
                color=colour,
                linewidth=7,
                alpha=0.45,
                solid_capstyle="butt",
            )
            ax.plot(p50, y + shift, marker="|", color=colour, markersize=9, markeredgewidth=2)
            ax.plot(
                mean,
                y + shift,
                marker=MARKERS[method],
                color=colour,
                markersize=6,
                linestyle="none",
                label=METHODS[method].label if y == 0 else None,
            )
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), names, color=INK)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(which="both", length=0)
    ax.grid(axis="x")
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_title("Importance of each layer after the last task", loc="left")
    ax.set_xlabel(
        "Ω / mean of the method’s Ω (log scale) · line: 5th to 95th percentile of those above 0 · "
        "bar: middle half, with the median · marker: mean"
    )
    ax.legend(frameon=False, loc="upper right")


def pictured(run: Run) -> str:
    """The method whose Ω the maps show: MAS if it is among them; empty if none measures Ω."""
    measured = [method for method in run.outcomes if METHODS[method].measures]
    of_mas = [method for method in measured if METHODS[method].regularizer is mas_ext.MAS]
    return next(iter(of_mas or measured), "")


def pixel_maps(run: Run, method: str) -> list[np.ndarray]:
    """For each task, the Ω that it added to the first layer, by input pixel [28, 28]."""
    totals = [
        next(iter(omega.values())).sum(dim=0).reshape(SIDE, SIDE).numpy()
        for omega in run.outcomes[method].importance
    ]
    return [after - before for before, after in pairwise([0 * totals[0], *totals])]


def _draw_maps(figure: Any, run: Run, method: str) -> None:
    maps = pixel_maps(run, method)[:MOST_MAPS]
    names = [task.name for task in run.tasks]
    axes = figure.subplots(1, max(len(maps), 5), squeeze=False)[0]
    brightest = max(m.max() for m in maps) or 1.0
    for ax in axes:
        ax.set_axis_off()
    for number, (ax, values) in enumerate(zip(axes, maps, strict=False)):
        ax.imshow(values, cmap=IMPORTANCE, vmin=0, vmax=brightest, interpolation="nearest")
        ax.set_title(
            f"{number + 1} · {names[number]}", fontsize=9, fontweight="normal", color=MUTED
        )
    figure.suptitle(
        f"{METHODS[method].label}: importance of each input pixel in the first layer, as each "
        "task added it",
        x=0.008,
        ha="left",
        fontsize=11,
        fontweight="bold",
    )


def estimators(run: Run) -> Figure:
    """How close the Ω of batch-mean gradients is to the exact Ω, by batch size."""
    rows = run.estimators["batch"]
    sizes = [row["batch_size"] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = _figure(10.5, 3.2)
        axes = figure.subplots(1, len(comparison.LABELS), sharey=True)
        for ax, (key, title) in zip(axes, comparison.LABELS.items(), strict=True):
            _draw_agreement(ax, sizes, [row[key] for row in rows])
            ax.set_title(title, loc="left")
        axes[0].set_yticks([0, 0.5, 1])
        axes[0].set_ylim(min(0.0, *(row["rank_correlation"] for row in rows)), 1.06)
    return figure


def _draw_agreement(ax: Axes, sizes: list[int], values: list[float]) -> None:
    ax.axhline(1.0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    ax.plot(sizes, values, color=COLOURS["mas"], marker=MARKERS["mas"], markersize=5, linewidth=2)
    ax.annotate(
        f"{values[-1]:.2f}",
        (sizes[-1], values[-1]),
        xytext=(0, 8 if values[-1] < 0.85 else -16),  # clear of the line at 1
        textcoords="offset points",
        ha="center",
        color=COLOURS["mas"],
    )
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_xlabel("images in a batch (1: exact)")
    ax.tick_params(which="both", length=0)
    ax.minorticks_off()
    ax.grid(axis="y")
    ax.spines[["left"]].set_visible(False)


def samples(run: Run, count: int = 10) -> Figure:
    """Some training images of every task, one row per task."""
    tasks = run.tasks[:MOST_MAPS]
    with matplotlib.rc_context(STYLE):
        # Leaves room at the left: the page's font may be wider than the one measured here.
        figure = _figure(8.2, 0.78 * len(tasks), w_pad=0.15)
        axes = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
        for number, (ax, task) in enumerate(zip(axes, tasks, strict=True)):
            chosen = np.linspace(0, len(task.train) - 1, count).astype(int)
            images = task.train.images[chosen].reshape(count, SIDE, SIDE).numpy()
            strip = np.pad(images, ((0, 0), (0, 0), (0, 2)), constant_values=np.nan)
            ax.imshow(np.hstack(list(strip)), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_yticks([SIDE / 2], [f"{number + 1} · {task.name}"], color=INK)
            ax.set_xticks([])
            ax.tick_params(length=0)
            for spine in ax.spines.values():
                spine.set_visible(False)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Saves a PNG file on white, with a resolution that is enough for a slide."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=160, facecolor="white", **CROP)


def as_svg(figure: Figure, description: str) -> str:
    """An ``<svg>`` element for a page: transparent, coloured by CSS, without external resources."""
    with matplotlib.rc_context(STYLE):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, **CROP)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Inside HTML, neither namespaces nor the prefix of links is needed.
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for colour, variable in THEMED.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
