"""Measurements against the goals, as tables in the terminal and as JSON."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.per_sample import plot
from benchmarks.per_sample.measure import Measurement, measure
from benchmarks.per_sample.memory import PLAIN
from benchmarks.per_sample.providers import BATCH_MEANS, OURS, UNCHUNKED, VMAP
from benchmarks.per_sample.workloads import WORKLOADS
from benchmarks.report import milliseconds, significant, spread, write_json

MEMORY_GOAL = 0.10  # of what vmap(grad) in one go needs
PEERS = ("torchvision", "transformers", "opacus", "backpack-for-pytorch")


def run(
    names: Iterable[str],
    rounds: int,
    quick: bool,
    out: Path,
    machine: dict[str, Any],
    console: Console,
) -> None:
    """Every workload, shown when it is done; then the goals, ``per_sample.json`` and a plot."""
    results: dict[str, Any] = {"machine": {**machine, **_versions()}, "workloads": {}}
    for name in names:
        title = WORKLOADS[name].title
        with console.status(title) as status:

            def tell(text: str, title: str = title) -> None:
                status.update(f"per_sample, {title}: {text}")

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the peers, about what they lack
                measured = measure(name, rounds, quick, tell)
        results["workloads"][name] = summary(measured)
        console.print(table(results["workloads"][name]), end="\n\n")
        write_json(out / "per_sample.json", results)  # a long run may be cut off
    console.print(goals_table(results["workloads"]), end="\n\n")
    console.print(f"wrote {plot.draw(results, out)}")
    console.print(f"wrote {out / 'per_sample.json'}")


def _versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PEERS}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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


def _percent(share: float | None) -> str:
    return "—" if share is None else f"{share:.1%}"


def _row(result: dict[str, Any], name: str) -> list[str]:
    weight = [_mebibytes(result, name), _percent(memory_share(result, name))]
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


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"{result['title']}: {result['details']}, B={result['batch_size']}\n"
        f"{result['parameters'] / 1e6:.3g} M parameters, medians of {result['rounds']} rounds",
        caption=_notes(result),
        caption_justify="left",
        min_width=84,
    )
    shown.add_column("", no_wrap=True)
    for heading in ("ms (quartiles)", "/ batch-mean", "error", "extra MiB", "of vmap's"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name in (*result["providers"], *result["skipped"], UNCHUNKED):
        style = {OURS: "bold green", result["batch_mean"]: "cyan"}.get(name)
        shown.add_row(*_row(result, name), style=style)
    return shown


def _verdict(text: str, met: bool | None) -> str:
    return text if met is None else f"{text} {'[green]✓' if met else '[red]✗'}[/]"


def goals_table(results: dict[str, Any]) -> Table:
    shown = Table(title=f"Goals of {OURS}", min_width=84)
    shown.add_column("", no_wrap=True)
    for heading in ("time / batch-mean", "fastest exact other / ours", "memory / vmap's"):
        shown.add_column(heading, justify="right")
    for result in results.values():
        time, faster, weight = result["goals"].values()
        share = f"{_percent(weight['value'])} (≤ {weight['goal']:.0%})"
        shown.add_row(
            result["title"],
            _verdict(f"{significant(time['value'])} (≤ {time['goal']})", time["met"]),
            _verdict(f"{significant(faster['value'])}× ({faster['fastest']})", faster["met"]),
            _verdict(share, weight["met"]),
        )
    return shown
