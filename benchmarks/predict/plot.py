"""The predictions as one picture: time against size, ratios, and the product's speed."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.predict.abs_matmul import WAYS, Problem, predict_abs_matmul
from benchmarks.predict.gpus import Gpu
from benchmarks.predict.model import evenly, predict
from benchmarks.predict.sizes import Size
from benchmarks.predict.traffic import JOBS, OURS
from benchmarks.show.style import INK, tidy
from benchmarks.show.style import OURS as GREEN
from benchmarks.show.text import times

JOB, TENSORS = "add_penalty_grad_", 128
COLOURS = {
    OURS: GREEN,
    "torch.compile, flat": "#3b6fb6",
    "torch.compile, list": "#8fb3e0",
    "torch._foreach": "#d98c2b",
    "eager, in place": "#9b7bb8",
    "eager autograd": "#b5483a",
}
PRODUCTS = {
    OURS: ("mas_ext", GREEN),
    "bmm in chunks": ("bmm, abs, sum: chunks in L2", "#d98c2b"),
    "bmm": ("bmm, abs, sum: all samples", "#ecc48d"),
    "mm": ("one plain mm", "#6b7280"),
}
POWERS = range(14, 34)


def _time_against_size(axes: Axes, gpu: Gpu, models: dict[str, Size]) -> None:
    numels = [2**power for power in POWERS]
    for way, colour in COLOURS.items():
        found = [predict(JOB, way, "float32", evenly(n, TENSORS), gpu) for n in numels]
        ours = way == OURS
        seconds = [p.seconds * 1e3 for p in found]
        axes.plot(numels, seconds, color=colour, lw=2.4 if ours else 1.4, zorder=3 + ours)
        first = 8 if way == "torch.compile, list" else 0  # where no other line is near
        axes.annotate(
            way,
            (numels[first], seconds[first]),
            xytext=(0, 4),
            textcoords="offset points",
            size=8,
            color=colour,
            weight="bold" if ours else "normal",
        )
        if ours:
            low, high = ([getattr(p, end) * 1e3 for p in found] for end in ("low", "high"))
            axes.fill_between(numels, low, high, color=colour, alpha=0.16, lw=0)
            device = [p.device_seconds * 1e3 for p in found]
            axes.plot(numels, device, color=colour, lw=1.2, ls=(0, (1, 1.5)), zorder=3)
            axes.annotate(
                "its kernels, without the host",
                (numels[7], device[7]),
                xytext=(8, -6),
                textcoords="offset points",
                size=7.5,
                color=colour,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(numels[0] * 0.8, numels[-1] * 1.1)
    for size in models.values():
        parameters = sum(size.numels)
        axes.axvline(parameters, color=INK, lw=0.6, ls=(0, (2, 4)), zorder=1)
        axes.annotate(
            size.short,
            (parameters, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-3, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            rotation=90,
            size=7.5,
            color="grey",
        )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(f"parameters, in {TENSORS} tensors", size=8.5)
    axes.set_ylabel("predicted ms a call", size=8.5)
    axes.set_title("Penalty and its gradient, added to p.grad, float32", size=9.5, loc="left")


def _ratios(axes: Axes, gpu: Gpu, models: dict[str, Size]) -> None:
    """Bars for the models, grouped by way: how many times our time."""
    shown = {name: size for name, size in models.items() if name != "7b"}
    names = [way for way in JOBS[JOB] if way != OURS]
    slowest, height = 1.0, 0.8 / len(shown)
    for number, size in enumerate(shown.values()):
        ours = predict(JOB, OURS, "float32", size.numels, gpu)
        for row, way in enumerate(names):
            ratio = predict(JOB, way, "float32", size.numels, gpu).seconds / ours.seconds
            slowest = max(slowest, ratio)
            place = row + (number - (len(shown) - 1) / 2) * height
            shade = [0.45, 0.7, 1.0][number]
            axes.barh(place, ratio, height * 0.9, color=COLOURS[way], alpha=shade, zorder=2)
            title = size.short
            axes.annotate(
                f"{times(ratio)}  {title}",
                (ratio, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                size=7.5,
                color=INK,
            )
    axes.axvline(1, color=GREEN, lw=1.4, zorder=4)
    axes.set_xscale("log")
    axes.set_xlim(0.7, slowest * 3)
    tidy(axes, names)
    axes.set_xticks([1, 2, 5, 10, 20, 50][: 4 + (slowest > 15) + (slowest > 40)])
    axes.minorticks_off()
    axes.set_title("The same: predicted time over ours, log scale", size=9.5, loc="left")


def _product(axes: Axes, gpu: Gpu, dtype: str, p: int, d: int, legend: bool) -> None:
    positions = [2**power for power in range(0, 11)]
    for way in WAYS:
        label, colour = PRODUCTS[way]
        problems = [Problem(32, t, p, d) for t in positions]
        found = [predict_abs_matmul(way, dtype, problem, gpu) for problem in problems]
        speeds = [x.flops / x.seconds / 1e12 for x in found]
        ours = way == OURS
        axes.plot(positions, speeds, color=colour, lw=2.4 if ours else 1.4, label=label, zorder=3)
        if ours:
            low, high = ([x.flops / getattr(x, e) / 1e12 for x in found] for e in ("high", "low"))
            axes.fill_between(positions, low, high, color=colour, alpha=0.16, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("positions of each of 32 samples", size=8.5)
    axes.set_ylabel("predicted TFLOP/s", size=8.5)
    axes.set_title(f"Σ|leftᵀ·right|, Ω {p} × {d}, {dtype}", size=9.5, loc="left")
    if legend:
        axes.legend(fontsize=8, frameon=False, loc="lower right")


def draw(gpu: Gpu, models: dict[str, Size], path: Path) -> Path:
    figure, grid = plt.subplots(2, 2, figsize=(12.6, 8.6), width_ratios=(1.15, 1))
    _time_against_size(grid[0][0], gpu, models)
    _ratios(grid[0][1], gpu, models)
    _product(grid[1][0], gpu, "float32", 768, 3072, legend=True)
    _product(grid[1][1], gpu, "bfloat16", 768, 3072, legend=False)
    for axes in (grid[0][0], *grid[1]):
        axes.grid(True, which="major", color="#e7eaee", lw=0.8, zorder=0)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Predicted for an NVIDIA {gpu.name} ({gpu.bandwidth / 1e12:.3g} TB/s); not measured",
        x=0.012,
        ha="left",
        size=13,
        weight="bold",
        color=INK,
    )
    figure.text(
        0.012,
        0.008,
        "From the data sheet and counted traffic (python -m benchmarks predict). "
        "No GPU has run these kernels. Bands: the assumptions' two ends.",
        size=8,
        color="grey",
    )
    figure.tight_layout(rect=(0.005, 0.025, 1, 0.985), h_pad=2, w_pad=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
