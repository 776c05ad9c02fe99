"""What MAS adds to a step and what a task's end costs, as results and as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.entry import Entry, Options, Result, Results
from benchmarks.show.table import Table
from benchmarks.show.text import count, mebibytes, milliseconds, percent, significant, three, times
from benchmarks.tools.timing import differences, ratios, spread
from benchmarks.training import plot
from benchmarks.training.measure import EVERY, Measurement, measure
from benchmarks.training.models import MODELS, QUICK
from benchmarks.training.task_end import EXACT, SINGLY
from benchmarks.training.ways import OURS, PEERS, PLAIN


def run(options: Options) -> Iterator[tuple[str, Result]]:
    names = QUICK if options.quick else tuple(MODELS)
    for name in names:

        def tell(text: str, title: str = MODELS[name].title) -> None:
            options.tell(f"{title}: {text}")

        rounds = 3 * options.rounds  # what is added is small beside a step
        seconds = options.seconds / len(names)
        yield name, summary(measure(name, rounds, tell, seconds, options.quick))


def summary(measured: Measurement) -> Result:
    chosen, plain = MODELS[measured.name], measured.seconds[PLAIN]
    ways = {way: _way(measured, way) for way in measured.seconds}
    ends = {way: _end_of_task(measured, way) for way in measured.task_end}
    return {
        "title": chosen.title,
        "details": chosen.details,
        "optimizer": f"torch's fused {chosen.optimizer}",
        "batch_size": chosen.batch_size,
        "parameters": measured.parameters,
        "tensors": measured.tensors,
        "rounds": len(plain),
        "ways": ways,
        "task_end": {"samples": chosen.task, "rounds": len(measured.task_end[EXACT]), "ways": ends},
        "skipped": measured.skipped,
    }


def _way(measured: Measurement, way: str) -> dict[str, Any]:
    """What is added is the median of the differences within a round, and not of medians.

    Of those parts of the step that MAS has to do with: where it is not in the loss, of what comes
    after the gradients. The rest is the same code, whose noise is larger than what is looked for.
    """
    seconds, plain = measured.seconds[way], measured.seconds[PLAIN]
    used, least = measured.bytes[way], measured.bytes[PLAIN]
    step = [sum(s) for s in plain]
    added = differences([s.finish for s in seconds], [s.finish for s in plain])
    if measured.in_the_loss[way]:
        added = differences([sum(s) for s in seconds], step)
    return {
        "seconds": spread([sum(s) for s in seconds]),
        "after_backward": spread([s.finish for s in seconds]),
        "added_seconds": spread(added),
        "added_share": spread(ratios(added, step)),
        "extra_bytes": None if used is None or least is None else used - least,
    }


def _end_of_task(measured: Measurement, way: str) -> dict[str, Any]:
    seconds, ours = measured.task_end[way], measured.task_end[EXACT]
    same_rounds = ours[:: EVERY if way == SINGLY else 1]
    return {"seconds": spread(seconds), "time_over_ours": spread(ratios(seconds, same_rounds))}


def cheapest(result: Result, of: dict[str, Any]) -> tuple[str, float] | None:
    """The way that adds least, of those that clearly add something, and the seconds it adds."""
    found = {w: r["added_seconds"] for w, r in result["ways"].items() if w in of}
    added = {way: spread["median"] for way, spread in found.items() if spread["q1"] > 0}
    best = min(added, key=added.__getitem__, default=None)
    return None if best is None else (best, added[best])


def detail(result: Result) -> list[Table]:
    what = f"{result['title']} ({result['details']}), B={result['batch_size']}"
    sizes = f"{count(result['parameters'])} parameters in {result['tensors']} tensors"
    ends = result["task_end"]
    return [
        Table(
            f"One training step of {what}, {sizes}, {result['optimizer']}: medians of "
            f"{result['rounds']} rounds",
            ("", "step, ms (quartiles)", "added, ms (quartiles)", "added", "extra MiB"),
            [_step_row(way, row) for way, row in result["ways"].items()],
            frozenset(OURS),
            "\n".join(f"{way}: {reason}" for way, reason in result["skipped"].items()),
        ),
        Table(
            f"The end of a task of {ends['samples']} samples, {result['title']}, medians of "
            f"{ends['rounds']} rounds",
            ("", "ms (quartiles)", f"time / {EXACT}"),
            [
                [way, milliseconds(row["seconds"]), times(row["time_over_ours"]["median"])]
                for way, row in ends["ways"].items()
            ],
            frozenset({EXACT}),
        ),
    ]


def _step_row(way: str, row: dict[str, Any]) -> list[str]:
    if way == PLAIN:
        return [way, milliseconds(row["seconds"]), "–", "–", "–"]
    added = _signed(row["added_seconds"])
    share = percent(row["added_share"]["median"])
    return [way, milliseconds(row["seconds"]), added, share, mebibytes(row["extra_bytes"])]


def _signed(spread: dict[str, float]) -> str:
    low, middle, high = (f"{spread[k] * 1e3:+.3f}" for k in ("q1", "median", "q3"))
    return f"{middle} ({low} to {high})".replace("-", "−")


def overview(results: Results) -> list[Table]:
    headings = ("", *(f"{r['title']} ({count(r['parameters'])})" for r in results.values()))
    ways = [PLAIN, *OURS, *PEERS]
    steps = [[way, *(_added(result, way) for result in results.values())] for way in ways]
    shares = ["ours, of the cheapest peer's", *(_share(result) for result in results.values())]
    return [
        Table(
            "What MAS adds to a training step: milliseconds, and percent of the step",
            headings,
            [*steps, shares],
            frozenset(OURS),
        ),
        Table(
            f"The end of a task: milliseconds, and the time over {EXACT}",
            headings,
            [_samples(results), *_ends(results)],
            frozenset({EXACT}),
        ),
    ]


def _added(result: Result, way: str) -> str:
    row = result["ways"].get(way)
    if row is None:
        return "–"
    if way == PLAIN:
        return f"a step takes {three(row['seconds']['median'] * 1e3)}"
    added = f"{three(row['added_seconds']['median'] * 1e3)}".replace("-", "−")
    return f"{added} ({percent(row['added_share']['median'])})"


def _share(result: Result) -> str:
    ours, theirs = cheapest(result, OURS), cheapest(result, PEERS)
    if ours is None or theirs is None:
        return "within the noise"
    share = significant(ours[1] / theirs[1])
    return f"{share} ({ours[0].removeprefix('mas_ext, ')} / {theirs[0]})"


def _samples(results: Results) -> list[str]:
    return ["samples", *(f"{r['task_end']['samples']}" for r in results.values())]


def _ends(results: Results) -> list[list[str]]:
    ways = next(iter(results.values()))["task_end"]["ways"]
    return [
        [way, *(_end(result["task_end"]["ways"][way], way) for result in results.values())]
        for way in ways
    ]


def _end(row: dict[str, Any], way: str) -> str:
    time = three(row["seconds"]["median"] * 1e3)
    return time if way == EXACT else f"{time} ({times(row['time_over_ours']['median'])})"


def headline(results: Results) -> tuple[str, str] | None:
    """What ours adds to a step of the last model, beside what Avalanche adds."""
    result = list(results.values())[-1]
    found = cheapest(result, OURS)
    if found is None:
        return None
    best, _ = found
    ours, theirs = (result["ways"][way]["added_share"]["median"] for way in (best, "Avalanche"))
    return f"+{percent(ours)}", (
        f"is what {best} adds to a training step of {result['title']}; Avalanche's plugin adds "
        f"{percent(theirs)}"
    )


ENTRY = Entry(
    name="training",
    title="End to end: a training step, and the end of a task",
    about="Forward, backward and the optimizer's step, with MAS and without: what it adds is the "
    "median of the differences within a round, of the parts of the step it has to do with. Then "
    "the end of a task: Ω, merging, new anchors; "
    "Avalanche and “batch” take the absolute value of a batch's mean gradient, which loses what "
    "cancels.",
    run=run,
    detail=detail,
    overview=overview,
    plots=("training",),
    figures=lambda results, machine: {"training": plot.figure(results, machine)},
    seconds=(80, 6),
    headline=headline,
)
