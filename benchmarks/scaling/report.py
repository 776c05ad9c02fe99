"""Times along every axis, as results and as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator

from benchmarks.entry import Entry, Options, Result, Results
from benchmarks.lists.measure import ROOFLINE
from benchmarks.scaling import plot
from benchmarks.scaling.axes import AXES, OURS, Axis
from benchmarks.show.table import Table
from benchmarks.show.text import count, duration, times
from benchmarks.tools.timing import interleave, ratios, spread

MOST_ROUNDS = 9


def run(options: Options) -> Iterator[tuple[str, Result]]:
    for name, axis in AXES.items():
        values = axis.quick if options.quick else axis.values
        budget = options.seconds / len(AXES) / len(values)
        rounds = min(MOST_ROUNDS, options.rounds)
        points = []
        for value in values:
            options.tell(f"{axis.title}: {value:,} {axis.label}")
            points.append(_point(axis, value, rounds, budget, options.quick))
        yield name, {"title": axis.title, "label": axis.label, "points": points}


def _point(axis: Axis, value: int, rounds: int, budget: float, quick: bool) -> Result:
    calls = axis.prepare(value, quick)
    seconds = interleave(calls, rounds, budget=budget)
    return {
        "value": value,
        "rounds": len(seconds[OURS]),
        "seconds": {name: spread(each) for name, each in seconds.items()},
        "time_over_ours": {
            name: spread(ratios(each, seconds[OURS])) for name, each in seconds.items()
        },
    }


def curves(axis: Result) -> list[str]:
    """Names in the order in which they appear; some end before others."""
    return list(dict.fromkeys(name for point in axis["points"] for name in point["seconds"]))


def detail(axis: Result) -> list[Table]:
    names = curves(axis)
    return [
        Table(
            f"{axis['title']}: medians",
            (axis["label"], *names),
            [
                [count(point["value"]), *(_cell(point, name) for name in names)]
                for point in axis["points"]
            ],
        )
    ]


def _cell(point: Result, name: str) -> str:
    found = point["seconds"].get(name)
    return "–" if found is None else duration(found["median"])


def overview(results: Results) -> list[Table]:
    return [
        Table(
            f"{OURS} from one end of every axis to the other; growth: the power of the axis with "
            "which its time grows over the last step; the fastest other at that end",
            ("", "from", "to", "time", "growth", "fastest other / ours"),
            [_row(axis) for axis in results.values()],
        )
    ]


def _row(axis: Result) -> list[str]:
    before, last = axis["points"][-2:]
    first = axis["points"][0]
    begin, middle, end = (point["seconds"][OURS]["median"] for point in (first, before, last))
    growth = math.log(end / middle) / math.log(last["value"] / before["value"])
    return [
        axis["title"],
        count(first["value"]),
        f"{count(last['value'])} {axis['label']}",
        f"{duration(begin)} to {duration(end)}",
        f"{growth:.2f}".replace("-", "−"),
        _rival(last),
    ]


def _rival(point: Result) -> str:
    others = {
        name: ratio["median"]
        for name, ratio in point["time_over_ours"].items()
        if not name.startswith(OURS) and name != ROOFLINE and "inexact" not in name
    }
    best = min(others, key=others.__getitem__)
    return f"{times(others[best])} ({best})"


ENTRY = Entry(
    name="scaling",
    title="How time grows",
    about="With parameters, the tensors that they are cut into, tasks, the batch and the length of "
    "a sequence. Both axes are logarithmic: a line of slope one is proportional.",
    run=run,
    detail=detail,
    overview=overview,
    plots=("scaling",),
    figures=lambda results, machine: {"scaling": plot.figure(results, machine)},
    seconds=(60, 5),
)
