"""Tables, from results.json alone: for the terminal, the documentation and report.html.

In a Markdown file, ``<!-- penalty -->`` … ``<!-- end -->`` holds the tables and plots of that
benchmark, ``<!-- machine -->`` a line about the machine. :func:`write_all` updates these blocks.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import choice, memory_traffic, plot, small_tensors
from benchmarks.benchmark import Benchmark, Result, Results
from benchmarks.drift import every, summary
from benchmarks.drift.problems import CHOSEN_ON
from benchmarks.machine import describe
from benchmarks.measure import deviation
from benchmarks.retention import summary as retained
from benchmarks.text import (
    Table,
    count,
    duration,
    minus,
    percent,
    three_digits,
    times,
    two_digits,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "results.json"
OURS, ROOFLINE, PLAIN, EXACT = "mas_ext", "roofline", "without MAS", "mas_ext, exact"
SELDOM = "every="  # in the names of ways that include MAS in some steps only
PER_SAMPLE = ("batch size 1", "vmap(grad)", "Opacus", "BackPACK")
OUR_SQUARE, SQUARES = "mas_ext, square", (*PER_SAMPLE, "nngeometry")
UNCHUNKED, FLOOR = "vmap(grad), unchunked", "floor"


def _names(dicts: Iterable[dict[str, Any]]) -> list[str]:
    """The keys of all dicts, in the order in which they appear."""
    return list(dict.fromkeys(chain.from_iterable(dicts)))


def _is_ours(name: str) -> bool:
    return name.startswith(OURS)


# -- lists of tensors ------------------------------------------------------------------------------
def lists(sizes: Results) -> list[Table]:
    """A column per size: milliseconds, and in brackets the time over ours."""
    rows = []
    for name in _names(size["providers"] for size in sizes.values()):
        if name != ROOFLINE:
            found = (size["providers"].get(name) for size in sizes.values())
            rows.append([name, *(_time(row, name) for row in found)])
        if name == OURS:
            shares = (size["providers"][OURS]["fraction_of_roofline"] for size in sizes.values())
            rows.append(["its speed / roofline", *(two_digits(s["median"]) for s in shares)])
    columns = (f"{size['title']} ({count(size['parameters'])})" for size in sizes.values())
    title = "Milliseconds, and in brackets the time relative to mas_ext."
    return [Table(title, ("", *columns), rows, frozenset({OURS}))]


def optimizer_steps(results: dict[str, Results]) -> Table:
    """Of several benchmarks: a row per optimizer and mode, a column per size."""
    rows, titles = [], {}
    for name, sizes in results.items():
        titles |= {
            key: f"{size['title']} ({count(size['parameters'])})" for key, size in sizes.items()
        }
        rows.append([name.replace("_", ", "), *(_step(sizes.get(key)) for key in titles)])
    title = (
        "Milliseconds of mas_ext, and in brackets the time of the two passes relative to it, with "
        "torch's fused and with its foreach implementation."
    )
    return Table(title, ("", *titles.values()), rows)


def _step(size: Result | None) -> str:
    if size is None:
        return "–"
    others = [
        two_digits(row["time_over_ours"]["median"])
        for name, row in size["providers"].items()
        if name not in (OURS, ROOFLINE)
    ]
    ours = three_digits(size["providers"][OURS]["seconds"]["median"] * 1e3)
    return f"{ours} ({', '.join(others)})"


def _time(row: Result | None, name: str) -> str:
    if row is None:
        return "–"
    time = three_digits(row["seconds"]["median"] * 1e3)
    return time if name == OURS else f"{time} ({two_digits(row['time_over_ours']['median'])})"


# -- scaling ---------------------------------------------------------------------------------------
def scaling(axes: Results) -> list[Table]:
    return [
        Table(
            "From the first point of each axis to the last. Growth: d log(time) / d log(axis) over "
            "the last step; 1 is proportional.",
            ("", "from", "to", "time of mas_ext", "growth", "fastest alternative / mas_ext"),
            [_axis(axis) for axis in axes.values()],
        )
    ]


def _axis(axis: Result) -> list[str]:
    first, (before, last) = axis["points"][0], axis["points"][-2:]
    begin, middle, end = (point["seconds"][OURS]["median"] for point in (first, before, last))
    growth = math.log(end / middle) / math.log(last["value"] / before["value"])
    others = {
        name: ratio["median"]
        for name, ratio in last["time_over_ours"].items()
        if not _is_ours(name) and name != ROOFLINE and "inexact" not in name
    }
    best = min(others, key=others.__getitem__)
    ends = [count(first["value"]), f"{count(last['value'])} {axis['label']}"]
    time = f"{duration(begin)} to {duration(end)}"
    return [axis["title"], *ends, time, minus(f"{growth:.2f}"), f"{times(others[best])} ({best})"]


# -- training --------------------------------------------------------------------------------------
def training(models: Results) -> list[Table]:
    columns = ("", *(f"{r['title']} ({count(r['parameters'])})" for r in models.values()))
    names = _names(result["providers"] for result in models.values())
    steps = [[n, *(_added(r["providers"].get(n), n) for r in models.values())] for n in names]
    ends = {title: result["task_end"]["providers"] for title, result in models.items()}
    end_names = _names(ends.values())
    samples = ["samples", *(f"{r['task_end']['samples']}" for r in models.values())]
    return [
        Table(
            "What MAS adds to a training step: milliseconds, and percent of the step without it.",
            columns,
            [*steps, ["cheapest of mas_ext / cheapest alternative", *map(_share, models.values())]],
            frozenset(filter(_is_ours, names)),
        ),
        Table(
            "What it costs that λ follows a drift budget, with the default of a measurement in "
            "every 20 steps: milliseconds per measurement, and percent of the training.",
            columns,
            [["λ follows the drift", *map(_following, models.values())]],
        ),
        Table(
            "The end of a task: milliseconds, and the time relative to mas_ext, exact.",
            columns,
            [samples, *([n, *(_end(found[n], n) for found in ends.values())] for n in end_names)],
            frozenset({EXACT}),
        ),
    ]


def _added(row: Result | None, name: str) -> str:
    if row is None:
        return "–"
    if name == PLAIN:
        return f"a step takes {three_digits(row['seconds']['median'] * 1e3)}"
    added = minus(three_digits(row["added_seconds"]["median"] * 1e3))
    return f"{added} ({percent(row['added_share']['median'])})"


def _following(result: Result) -> str:
    found = result.get("following")
    if found is None:
        return "–"
    milliseconds = three_digits(found["seconds"]["median"] * 1e3)
    return f"{milliseconds} ({percent(found['share']['median'])})"


def _share(result: Result) -> str:
    """Only providers that clearly add something, and add it in each step, are compared."""
    rows = {
        name: row["added_seconds"]
        for name, row in result["providers"].items()
        if name != PLAIN and SELDOM not in name
    }
    added = {name: row["median"] for name, row in rows.items() if row["q1"] > 0}
    ours = min(filter(_is_ours, added), key=added.__getitem__, default=None)
    others = (name for name in added if not _is_ours(name))
    other = min(others, key=added.__getitem__, default=None)
    if ours is None or other is None:
        return "within the noise"
    return f"{two_digits(added[ours] / added[other])} ({ours.removeprefix('mas_ext, ')} / {other})"


def _end(row: Result, name: str) -> str:
    time = three_digits(row["seconds"]["median"] * 1e3)
    return time if name == EXACT else f"{time} ({times(row['time_over_ours']['median'])})"


# -- importance ------------------------------------------------------------------------------------
def per_sample(models: Results) -> list[Table]:
    floor = (FLOOR,) * any(FLOOR in result["providers"] for result in models.values())
    exact, squares = (*floor, *PER_SAMPLE), (*floor, *SQUARES)
    return [
        Table(
            "Our time relative to the faster inexact batch-mean; our time, and the time of exact "
            "alternatives relative to it; our extra memory relative to unchunked vmap(grad)'s; "
            "the share of Ω that the batch-mean finds; and the time of the squares of the same "
            "gradients relative to that of their absolute values.",
            (
                *("", "/ batch-mean", "mas_ext, ms", *exact),
                *("memory", "batch-mean finds", "square / abs"),
            ),
            [
                [*_importance(found, exact), *_beside(found), _over_ours(found, OUR_SQUARE)]
                for found in models.values()
            ],
        ),
        Table(
            "The diagonal of the empirical Fisher information, 1/N Σ_k (∂ log p(y_k|x_k)/∂θ)²: "
            "the same columns, and the share that the square of the batch's mean gradient finds.",
            ("", "/ batch-mean", "mas_ext, ms", *squares, "batch-mean finds"),
            [
                [*_importance(found, squares), percent(found["share_kept_by_batch_mean"])]
                for found in ({**r, **r["fisher"]} for r in models.values() if "fisher" in r)
            ],
        ),
    ]


def _importance(result: Result, names: Iterable[str]) -> list[str]:
    ours = result["providers"][OURS]
    return [
        result["title"],
        two_digits(ours["time_over_batch_mean"]["median"]),
        three_digits(ours["seconds"]["median"] * 1e3),
        *(_over_ours(result, name) for name in names),
    ]


def _over_ours(result: Result, name: str) -> str:
    row = result["providers"].get(name)
    return "–" if row is None else times(row["time_over_ours"]["median"])


def _beside(result: Result) -> list[str]:
    ours, most = (result["extra_bytes"].get(name) for name in (OURS, UNCHUNKED))
    return [
        percent(ours / most if ours is not None and most else None),
        percent(result["share_kept_by_batch_mean"], 0),
    ]


def fisher(models: Results) -> list[Table]:
    rows = []
    for found in models.values():
        batch, length, other = found["batch"], found["batch_size"], found["of_model"]
        way = "every class" if other["criterion"] == "exact_fisher" else f"{other['draws']} draws"
        rows.append(
            [
                found["title"],
                f"{found['samples'] // length} × {length}",
                percent(batch["mass"]),
                f"{batch['mass'] * length:.2f}",
                f"{batch['rank_correlation']:.3f}",
                percent(found["preset_error"], 4),
                f"{other['mass']:.2f}",
                f"{other['rank_correlation']:.3f} ({way})",
            ]
        )
    title = (
        "The square of each batch's mean gradient, averaged over batches, compared with the mean "
        "over samples of squares: what is left of the sum, the same times the batch size, and "
        "Spearman's rank correlation. Then how far preset('avalanche_ewc') is from that loop, and "
        "the Fisher information of labels of the model's own distribution compared with that of "
        "the data's: their sums' ratio and rank correlation."
    )
    headings = ["", "samples", "is left", "times B", "rank correlation", "preset is off by"]
    return [Table(title, [*headings, "model's / data's labels", "rank correlation, those"], rows)]


def outer(cases: Results) -> list[Table]:
    rows = [
        [
            row["title"],
            three_digits(row["seconds"][OURS] * 1e3),
            f"{row['gigaflops']:.0f}",
            f"{row['fraction_of_product']:.2f}",
            three_digits(row["seconds"][row["best_bmm"]] * 1e3),
            row["best_bmm"].removeprefix("bmm, "),
            f"{row['best_bmm_over_ours']:.1f}",
            *_square(row),
        ]
        for row in cases.values()
    ]
    return [
        Table(
            "32 samples. mm: torch.mm of the same FLOPs; bmm: torch.bmm, abs_ and sum over the "
            "fastest chunk of 1, 4, 8 or 32 samples. The square's time relative to that of the "
            "absolute value, and the fastest of PyTorch's ways to it relative to ours: bmm and "
            "square_, or one product over the pairs of a sample's positions.",
            (
                *("p × d, positions", "ms", "GFLOP/s", "speed / mm", "bmm, ms", "chunk"),
                *("bmm / ours", "square / abs", "torch's square / ours"),
            ),
            rows,
        )
    ]


def _square(row: Result) -> list[str]:
    if "square_over_abs" not in row:  # of a run before there was one
        return ["–", "–"]
    way = row["best_square"].removesuffix(", square")
    return [f"{row['square_over_abs']:.2f}", f"{row['best_square_over_ours']:.1f} ({way})"]


def low_rank(cases: Results) -> list[Table]:
    alternatives = ("autograd", "by hand")
    rows = [
        [
            row["title"],
            three_digits(row["seconds"][OURS] * 1e3),
            f"{row['gigaflops']:.0f}",
            *(times(row["time_over_ours"][name]) for name in alternatives),
            *(percent(row["extra_share"][name], 2) for name in (OURS, *alternatives)),
        ]
        for row in cases.values()
    ]
    title = (
        "Value, and gradients added to those of A and B, in float32: milliseconds and FLOPs of "
        "mas_ext, the time of the others relative to it, and the peak of extra memory relative to "
        "the weight's."
    )
    headings = ["weight", "ms", "GFLOP/s", "autograd", "by hand"]
    return [Table(title, [*headings, "memory: mas_ext", "autograd", "by hand"], rows)]


# -- learning --------------------------------------------------------------------------------------
def demo(results: Results) -> list[Table]:
    (result,) = results.values()
    rows = []
    for method, found in result["summary"].items():
        cells = [f"{found[f]['mean']:.3f} ± {found[f]['stdev']:.3f}" for f in list(found)[:-1]]
        time = duration(found["seconds"]["mean"])
        rows.append([result["labels"][method], *map(minus, cells), time])
    return [
        Table(
            f"{result['title']}: mean ± standard deviation over seeds {', '.join(result['runs'])}.",
            ("", "average accuracy", "forgetting", "backward transfer", "time"),
            rows,
            frozenset(label for method, label in result["labels"].items() if "mas" in method),
        )
    ]


def compression(results: Results) -> list[Table]:
    importance = [result for name, result in results.items() if name != "learning"]
    stored = Table(
        "Ω: bytes per parameter; Σ|error| / ΣΩ; the largest error of √Ω relative to a tensor's "
        "largest √Ω; the share of ΣΩ that becomes zero; Spearman's rank correlation.",
        ("Ω of", "stored in", "bytes", "error", "error of √Ω", "lost", "rank correlation"),
        [
            [
                f"{result['title']} ({count(result['parameters'])})",
                state_dtype,
                f"{found['bytes']:.3f}",
                percent(found["mass_error"], 3),
                percent(found["root_error"], 3),
                percent(found["lost"], 4),
                f"{found['rank_correlation']:.6f}",
            ]
            for result in importance
            for state_dtype, found in result["quality"].items()
            if state_dtype != "float32"
        ],
    )
    return [stored, _learning(results["learning"])] if "learning" in results else [stored]


def _learning(result: Result) -> Table:
    def cell(runs: list[Result], figure: str) -> str:
        values = [run[figure] for run in runs]
        return f"{statistics.mean(values):.4f} ± {deviation(values):.4f}"

    figures = ("average_accuracy", "forgetting")
    return Table(
        f"{result['tasks']} tasks of permuted digits: mean ± standard deviation over seeds "
        f"{', '.join(map(str, result['seeds']))}.",
        ("", "Ω stored in", *(figure.replace("_", " ") for figure in figures)),
        [
            [label, state_dtype, *(cell(found[method], figure) for figure in figures)]
            for method, label in result["labels"].items()
            for state_dtype, found in result["runs"].items()
        ],
    )


def narrow(sizes: Results) -> list[Table]:
    others = ("torch.compile", "eager")
    headings = ["values, Ω", "bytes", "ms", "speed / float32", "speed / roofline"]

    def row(dtypes: str, found: Result) -> list[str]:
        return [
            dtypes,
            f"{found['bytes_per_parameter']:.2f}",
            three_digits(found["seconds"] * 1e3),
            f"{found['speedup_over_float32']:.2f}",
            f"{found['fraction_of_roofline']:.2f}",
            *(f"{found['times_ours'][n]:.1f}" if n in found["times_ours"] else "–" for n in others),
        ]

    return [
        Table(
            f"{result['parameters'] / 2**20:g} Mi parameters. Bytes: moved by one pass, per "
            "parameter. Roofline: the same bytes at the speed of the float32 roofline.",
            [*headings, *(f"{name} / mas_ext" for name in others)],
            [row(dtypes, found) for dtypes, found in result["kinds"].items()],
        )
        for result in sizes.values()
    ]


# -- the drift study -------------------------------------------------------------------------------
def _accuracy(runs: summary.Runs) -> str:
    mean = summary.accuracy(runs)
    if mean is None:
        return "not finite"
    return f"{100 * mean:.1f} ± {100 * summary.deviation_of(runs):.1f}"


def _points(runs: summary.Runs) -> str:
    lost = summary.forgetting(runs)
    return _accuracy(runs) + ("" if lost is None else minus(f" / {100 * lost:.1f}"))


def _difference(value: float) -> str:
    return minus(f"{100 * value:+.1f}")


def drift(found: Results) -> list[Table]:
    return [_recipes(found), _methods(found), _limits(found)]


def _recipes(found: Results) -> Table:
    """A row per problem: fine-tuning, the best λ, and each recipe's distance from it."""
    headings = ["", "optimizer, mode", summary.FREE, "best λ", "its accuracy", *summary.RECIPES]
    rows = []
    for name, problem in found.items():
        value = f"{summary.best(problem)[0]:g}"
        title = problem["title"] + (" *" if name in CHOSEN_ON else "")
        row = [title, f"{problem['optimizer']}, {problem['mode']}", _points(problem[summary.FREE])]
        row += [value, _points(problem["lambda"][value])]
        row += [_difference(summary.gain(problem, name)) for name in summary.RECIPES]
        rows.append(row)
    rows += _mean_rows(found, ["", "", "", ""], summary.RECIPES)
    close = sum(summary.gain(problem) >= -summary.CLOSE for problem in found.values())
    above = sum(summary.over_fine_tuning(problem) >= 0 for problem in found.values())
    note = (
        f"“{summary.BOTH}” is at most {100 * summary.CLOSE:g} point below the best λ in {close} of "
        f"{len(found)} problems, and not below fine-tuning in {above}. The default budget was "
        "chosen on the problems with *."
    )
    title = (
        "Average accuracy ± standard deviation / forgetting, in percent; in the last columns, "
        "accuracy minus that of the best λ."
    )
    return Table(title, headings, rows, note=note)


def _methods(found: Results) -> Table:
    """A row per problem: the default recipe, and settling alone, with each method's Ω."""
    names = tuple(summary.METHODS.values())
    rows = [
        [problem["title"] + (" *" if name in CHOSEN_ON else "")]
        + [_difference(summary.gain(problem, each)) for each in names]
        for name, problem in found.items()
    ]
    title = (
        "The same budget with other Ω: accuracy minus that of the best λ of MAS, in percentage "
        "points. EWC has the exact Fisher information; L2-SP has Ω = 1."
    )
    return Table(title, ["", *summary.METHODS], [*rows, *_mean_rows(found, [], names)])


def _mean_rows(found: Results, empty: list[str], names: Iterable[str]) -> list[list[str]]:
    """Means over all problems, and over those that judge the default."""
    judged = [problem for name, problem in found.items() if name not in CHOSEN_ON]
    kinds = {"mean": list(found.values()), "mean without *": judged}
    return [
        [
            title,
            *empty,
            *(_difference(statistics.mean(summary.gain(p, each) for p in some)) for each in names),
        ]
        for title, some in kinds.items()
        if some
    ]


def _limits(found: Results) -> Table:
    """A row per problem: the drift of unseen samples over the limit, for every limit."""
    limits = list(dict.fromkeys(chain.from_iterable(p["limits"] for p in found.values())))
    rows = []
    for problem in found.values():
        cells = [_spread(summary.drift_over_limit(problem, limit)) for limit in limits]
        rows.append([problem["title"], f"{problem['optimizer']}, {problem['mode']}", *cells])
    every = [v for p in found.values() for k in limits for v in summary.drift_over_limit(p, k)]
    within = sum(value <= 1.1 for value in every)
    note = f"At most 10 % above the limit in {within} of {len(every)} runs."
    title = (
        "Drift of unseen samples after settling, over the limit: mean over tasks, and the range of "
        "runs with several seeds and with a λ that begins a million times too small or too large."
    )
    headings = ["", "optimizer, mode", *(f"limit {limit}" for limit in limits)]
    return Table(title, headings, rows, note=note)


def _spread(values: list[float]) -> str:
    if not values:
        return "not finite"
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# -- what a pretrained model keeps -----------------------------------------------------------------
def retention(texts: Results) -> list[Table]:
    return [_retained(result) for result in texts.values()]


def _retained(result: Result) -> Table:
    """A row per method: what it learns within each limit, what is left, and what it costs."""
    methods, begun = retained.methods_of(result), retained.start(result)
    rows = [
        [
            name,
            *(_within(result, method, limit) for limit in retained.LIMITS),
            *_left(retained.left(result, method)),
            two_digits(retained.seconds(result, method)),
            minus(f"{round(retained.extra_bytes(result, method) / 1e9, 1) + 0.0:.1f}"),
        ]
        for name, method in methods.items()
    ]
    lowest = [f"{retained.best(result, limit)} at {limit:g}" for limit in retained.LIMITS]
    typical = f"{retained.TYPICAL:g}"
    return Table(
        f"{result['title']}: perplexity per token on held-out text of the new language "
        f"({math.exp(begun.losses['new']):.1f} at first), at most this drift (nats per prediction, "
        "held-out English and code). Then, at "
        f"{typical}: perplexity on English and on code relative to before, and questions answered "
        f"({percent(begun.answered, 0)} at first). Then the time of one training run, with Ω, over "
        "that of plain fine-tuning, and GB of memory beyond it in training. "
        f"Seed{'s' * (len(result['seeds']) > 1)} {', '.join(map(str, result['seeds']))}.",
        [
            "",
            *(f"drift ≤ {limit:g}" for limit in retained.LIMITS),
            "English",
            "code",
            "answered",
            "time",
            "memory",
        ],
        rows,
        frozenset(name for name, method in methods.items() if method.ours),
        f"Lowest: {', '.join(lowest)}.",
    )


def _within(result: Result, method: retained.Method, limit: float) -> str:
    mean, spread = retained.perplexity(result, method, limit)
    return f"{mean:.2f}" + (f" ± {spread:.2f}" if len(result["seeds"]) > 1 else "")


def _left(found: dict[str, float]) -> list[str]:
    ratios = [minus(f"{100 * (found[name] - 1):+.1f} %") for name in ("english", "code")]
    return [*ratios, percent(found["answered"], 0)]


_STEPS = [f"{n}_{mode}" for n in ("sgd", "momentum", "adamw") for mode in ("gradient", "proximal")]
TABLES: dict[str, Callable[[Results], list[Table]]] = {
    **dict.fromkeys(["penalty", "accumulate", "proximal", *_STEPS], lists),
    "scaling": scaling,
    "training": training,
    "small_tensors": small_tensors.tables,
    "every": every.tables,
    "per_sample": per_sample,
    "fisher": fisher,
    "outer": outer,
    "low_rank": low_rank,
    "demo": demo,
    "compression": compression,
    "narrow": narrow,
    "drift": drift,
    "retention": retention,
}


# -- files -----------------------------------------------------------------------------------------
def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_all(benchmarks: list[Benchmark], out: Path) -> list[Path]:
    """Plots and page of the results in a folder, and the documentation if they are committed."""
    results = read_json(out / "results.json")
    written = write_plots_and_page(benchmarks, results, out)
    if (out / "results.json").resolve() == RESULTS:
        for page in pages():
            page.write_text(updated(page, benchmarks, results), encoding="utf-8")
            written.append(page)
    return written


def pages() -> list[Path]:
    """The Markdown files that have blocks."""
    every = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *ROOT.glob("docs/**/*.md")]
    return [page for page in every if _BLOCK.search(page.read_text(encoding="utf-8"))]


def write_plots_and_page(
    benchmarks: Iterable[Benchmark], results: dict[str, Any], out: Path
) -> list[Path]:
    """PNG plots, and report.html with all tables and plots."""
    page, written = Console(record=True, file=io.StringIO(), width=180), []
    images: dict[str, str] = {}
    for benchmark in benchmarks:
        if measured := results["benchmarks"].get(benchmark.name):
            machine = describe(results["runs"][benchmark.name].get("machine", results["machine"]))
            page.rule(f"[bold]{benchmark.title}")
            page.print(benchmark.about, f"{benchmark.name}: {machine}", sep="\n", highlight=False)
            for table in TABLES[benchmark.name](measured):
                page.print(table.rich(), end="\n\n")
            if benchmark.name in plot.PLOTS:
                path = plot.save(benchmark.name, measured, machine, out)
                written.append(path)
                images[f"[{path.stem}]"] = base64.b64encode(path.read_bytes()).decode()
                page.print(f"[{path.stem}]", markup=False, highlight=False)
    text = page.export_html()
    for place, image in images.items():
        tag = f'<img width="1200" alt="{place}" src="data:image/png;base64,{image}">'
        text = text.replace(place, tag)
    path = out / "report.html"
    path.write_text(text, encoding="utf-8")
    return [*written, path]


_BLOCK = re.compile(r"(<!-- (?P<name>[a-z_]+) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def updated(page: Path, benchmarks: list[Benchmark], results: dict[str, Any]) -> str:
    """The text of a page with its blocks written again; blocks without results stay."""
    plots = os.path.relpath(RESULTS.parent, page.parent)
    makers: dict[str, Callable[[], str]] = {
        "machine": partial(_machine, benchmarks, results),
        "memory_traffic": lambda: memory_traffic.table().markdown(),
    }
    measured = results["benchmarks"]
    if steps := {name: measured[name] for name in _STEPS if name in measured}:
        makers["optimizer_steps"] = lambda: optimizer_steps(steps).markdown()
    if problems := measured.get("drift"):
        makers["choice_digits"] = lambda: choice.digits(problems).markdown()
    if texts := measured.get("retention"):
        makers["choice_language"] = lambda: choice.language(next(iter(texts.values()))).markdown()
    for benchmark in benchmarks:
        if measured.get(benchmark.name):
            makers[benchmark.name] = partial(block, benchmark, results, plots)

    def replace(found: re.Match[str]) -> str:
        maker = makers.get(found["name"])
        return found[0] if maker is None else f"{found[1]}{maker()}\n{found[4]}"

    return _BLOCK.sub(replace, page.read_text(encoding="utf-8"))


def block(benchmark: Benchmark, results: dict[str, Any], plots: str) -> str:
    """A benchmark's tables and plots in Markdown."""
    tables = TABLES[benchmark.name](results["benchmarks"][benchmark.name])
    parts = [table.markdown() for table in tables]
    run = results["runs"][benchmark.name]
    if "machine" in run:
        parts.append(f"(Measured on: {describe(run['machine'])}.)")
    if benchmark.name in plot.PLOTS:
        parts.append(f"![{benchmark.title}]({plots}/{benchmark.name}.png)")
    return "\n\n".join(parts)


def _machine(benchmarks: list[Benchmark], results: dict[str, Any]) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in results["machine"]["peers"].items() if v)
    on_request = {benchmark.name for benchmark in benchmarks if benchmark.on_request}
    seconds = sum(r["seconds"] for name, r in results["runs"].items() if name not in on_request)
    line = f"{describe(results['machine'])}; {versions}."
    return f"{line} The run took {seconds / 60:.0f} minutes."
