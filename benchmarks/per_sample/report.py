"""Measurements against the goals, as results and as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.entry import Entry, Options, Result, Results
from benchmarks.per_sample import plot
from benchmarks.per_sample.measure import Measurement, measure
from benchmarks.per_sample.memory import PLAIN
from benchmarks.per_sample.providers import (
    BACKPACK,
    BATCH_MEANS,
    OPACUS,
    OURS,
    SINGLY,
    UNCHUNKED,
    VMAP,
)
from benchmarks.per_sample.workloads import QUICK, WORKLOADS
from benchmarks.show.table import Table
from benchmarks.show.text import milliseconds, percent, significant, three, times
from benchmarks.tools.timing import spread

MEMORY_GOAL = 0.10  # of what vmap(grad) in one go needs


def run(options: Options) -> Iterator[tuple[str, Result]]:
    """Every workload, one after another."""
    names = options.workloads or (QUICK if options.quick else tuple(WORKLOADS))
    budget = options.seconds / len(names)
    for name in names:

        def tell(text: str, title: str = WORKLOADS[name].title) -> None:
            options.tell(f"{title}: {text}")

        yield name, summary(measure(name, options.rounds, options.quick, tell, budget))


def summary(measured: Measurement) -> dict[str, Any]:
    """Numbers of one workload. Ratios are medians of per-round ratios, not ratios of medians."""
    providers = {}
    for name, seconds in measured.seconds.items():
        providers[name] = {
            "rounds": len(seconds),
            "seconds": spread(seconds),
            "time_over_batch_mean": spread(measured.ratios(name, measured.reference)),
            "time_over_ours": spread(measured.ratios(name, OURS)),
            "error": measured.errors.get(name),
        }
    memory = _extra_memory(measured)
    result = {
        "title": measured.workload.title,
        "details": measured.workload.details,
        "batch_size": measured.workload.batch_size,
        "parameters": measured.parameters,
        "rounds": measured.rounds,
        "batch_mean": measured.reference,
        "share_kept_by_batch_mean": measured.kept,
        "providers": providers,
        "skipped": measured.skipped,
        "chunk": measured.chunk,
        "seconds_a_sample_by_chunk": measured.chunk_seconds,
        "first_call_seconds": measured.first_call,
        "coverage": measured.coverage,
        "forward_and_backward_bytes": measured.used.get(PLAIN),
        "extra_bytes": memory,
    }
    return {**result, "goals": goals(result, measured.workload.goal)}


def _extra_memory(measured: Measurement) -> dict[str, int | None]:
    """Bytes beyond forward and backward."""
    plain = measured.used.get(PLAIN)
    if plain is None:
        return {}
    used = {name: bytes_ for name, bytes_ in measured.used.items() if name != PLAIN}
    return {name: None if bytes_ is None else bytes_ - plain for name, bytes_ in used.items()}


def memory_share(result: dict[str, Any], name: str) -> float | None:
    """Of the extra memory of vmap(grad) in one go."""
    extra, most = result["extra_bytes"].get(name), result["extra_bytes"].get(UNCHUNKED)
    return None if extra is None or not most else extra / most


def fastest_exact(result: dict[str, Any]) -> str:
    """The exact provider, other than ours, that takes the least time."""
    rows = result["providers"]
    others = [name for name in rows if name not in (OURS, *BATCH_MEANS)]
    return min(others, key=lambda name: rows[name]["seconds"]["median"])


def goals(result: dict[str, Any], time_goal: float) -> dict[str, dict[str, Any]]:
    """What is aimed at, what was measured, and whether that is enough (None: not measured)."""
    rows, rival = result["providers"], fastest_exact(result)
    others = [row for name, row in rows.items() if name not in (OURS, *BATCH_MEANS)]
    speedup = rows[rival]["time_over_ours"]["median"]
    time, share = rows[OURS]["time_over_batch_mean"]["median"], memory_share(result, OURS)
    return {
        "time_over_batch_mean": {"goal": time_goal, "value": time, "met": time <= time_goal},
        "faster_than_every_exact": {
            "fastest": rival,
            "value": speedup,
            "met": all(row["time_over_ours"]["median"] > 1 for row in others),
        },
        "memory_over_vmap": {
            "goal": MEMORY_GOAL,
            "value": share,
            "met": None if share is None else share <= MEMORY_GOAL,
        },
    }


def _mebibytes(result: dict[str, Any], name: str) -> str:
    extra = result["extra_bytes"].get(name)
    return "—" if extra is None else f"{extra / 2**20:.0f}"


def _row(result: dict[str, Any], name: str) -> list[str]:
    weight = [_mebibytes(result, name), percent(memory_share(result, name))]
    measured = result["providers"].get(name)
    if measured is None:
        return [name, "—", "—", "—", *weight]
    error = measured["error"]
    ratio = significant(measured["time_over_batch_mean"]["median"])
    exact = "inexact" if error is None else f"{error:.0e}"
    return [name, milliseconds(measured["seconds"]), ratio, exact, *weight]


def _notes(result: dict[str, Any]) -> str:
    steady = result["providers"][OURS]["seconds"]["median"]
    coverage = ", ".join(f"{path} {count}" for path, count in result["coverage"].items())
    lines = [
        f"{OURS}: a model's first call takes {(result['first_call_seconds'] - steady) * 1e3:+.0f} "
        f"ms; parameters by path: {coverage}",
        f"batch-mean: {result['batch_mean']!r} is the faster; it finds "
        f"{result['share_kept_by_batch_mean']:.0%} of Ω",
        f"{VMAP}: chunks of {result['chunk']}, the fastest",
        *(f"{name}: {reason}" for name, reason in result["skipped"].items()),
    ]
    return "\n".join(lines)


def detail(result: Result) -> list[Table]:
    headings = ("", "ms (quartiles)", "/ batch-mean", "error", "extra MiB", "of vmap's")
    return [
        Table(
            f"{result['title']}: {result['details']}, B={result['batch_size']}, "
            f"{result['parameters'] / 1e6:.3g} M parameters, medians of {result['rounds']} rounds",
            headings,
            [_row(result, name) for name in (*result["providers"], *result["skipped"], UNCHUNKED)],
            frozenset({OURS}),
            _notes(result),
        )
    ]


def _verdict(text: str, met: bool | None) -> str:
    return text if met is None else f"{text} {'✓' if met else '✗'}"


EXACT = (SINGLY, VMAP, OPACUS, BACKPACK)


def overview(results: Results) -> list[Table]:
    """A row a workload: the price of exactness, then every exact provider over ours."""
    rows = [_overview_row(result) for result in results.values()]
    return [
        Table(
            "Ours over the faster batch-mean, which is inexact; ours; exact providers over ours; "
            "our extra memory as a share of unchunked vmap(grad)'s; how much of Ω the batch-mean "
            "finds",
            ("", "/ batch-mean", "ours, ms", *EXACT, "memory", "batch-mean finds"),
            rows,
            note="✓ and ✗: against the goals below.",
        )
    ]


def _overview_row(result: Result) -> list[str]:
    time, _, weight = result["goals"].values()
    return [
        result["title"],
        _verdict(significant(time["value"]), time["met"]),
        three(result["providers"][OURS]["seconds"]["median"] * 1e3),
        *(_over_ours(result, name) for name in EXACT),
        _verdict(percent(weight["value"]), weight["met"]),
        percent(result["share_kept_by_batch_mean"], 0),
    ]


def _over_ours(result: Result, name: str) -> str:
    row = result["providers"].get(name)
    return "–" if row is None else times(row["time_over_ours"]["median"])


ENTRY = Entry(
    name="per_sample",
    title="Exact importance of a batch",
    about="Ω = 1/B Σ_k |∂‖F(x_k)‖²/∂θ| of one batch, in the steady state, beside everything that "
    "computes it exactly, and beside the batch's mean gradient, which does not.",
    run=run,
    detail=detail,
    overview=overview,
    plots=("per_sample",),
    figures=lambda results, machine: {"per_sample": plot.figure(results, machine)},
    seconds=(75, 9),
)
