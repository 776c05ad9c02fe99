"""The study as tables."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.drift import plot, study
from benchmarks.drift.study import FREE
from benchmarks.drift.summary import (
    CLOSE,
    STEADY,
    WAYS,
    Runs,
    accuracy,
    at_default,
    behind,
    best,
    changes,
    deviation,
    forgetting,
    gain,
    lacking,
    moved,
    problems,
    ways,
)
from benchmarks.entry import Entry, Result, Results
from benchmarks.show.table import Table
from benchmarks.show.text import count, three
from mas_ext._penalty.auto_strength import DEFAULT


def _accuracy(runs: Runs) -> str:
    mean = accuracy(runs)
    return "not finite" if mean is None else f"{100 * mean:.1f} ± {100 * deviation(runs):.1f}"


def _points(runs: Runs) -> str:
    lost = forgetting(runs)
    return _accuracy(runs) + ("" if lost is None else f" / {100 * lost:.1f}")


def _row(problem: Result) -> list[str]:
    value, _ = best(problem)
    return [
        problem["title"],
        f"{problem['optimizer']}, {problem['mode']}",
        count(problem["parameters"]),
        _points(problem[FREE]),
        f"{value:g}",
        _points(problem["lambda"][f"{value:g}"]),
        _range(problem["found"]),
        _points(at_default(problem)),
        _signed(-behind(problem)),
    ]


def _range(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(three(of(values)) for of in (min, max)))


def _signed(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


def _table(found: dict[str, Result]) -> Table:
    seeds = len(next(iter(found.values()))["found"])
    return Table(
        f"Five tasks: average accuracy ± standard deviation / forgetting, in points, {seeds} "
        f"seeds; λ found: by drift {DEFAULT:g}, after the first task",
        (
            "",
            "optimizer, mode",
            "parameters",
            FREE,
            "best λ",
            "reaches",
            "λ found",
            "reaches",
            "apart",
        ),
        [_row(problem) for problem in found.values()],
    )


def _changes_table(found: dict[str, Result]) -> Table:
    rows = [
        [changed["title"], *_change_row(changed, name)]
        for changed in found.values()
        for name in changed["changes"]
    ]
    return Table(
        f"What a change moves, in points of accuracy: with the grid's best λ, with drift "
        f"{DEFAULT:g}, and with the λ that it found before the change, kept",
        ("", "change", WAYS["best"], "reaches", "λ found", "reaches", WAYS["kept"], "reaches"),
        rows,
    )


def _change_row(changed: Result, name: str) -> list[str]:
    outcomes, apart = changed["changes"][name], moved(changed).get(name)
    value, _ = best(outcomes)
    strengths = (f"{value:g}", _range(outcomes["found"]), three(changed["kept"]))
    row = [outcomes["title"]]
    for strength, (way, runs) in zip(strengths, ways(outcomes).items(), strict=True):
        moves = "" if apart is None else f" ({_signed(apart[way])})"
        row += [strength, _accuracy(runs) + moves]
    return row


def verdict(results: Results) -> str:
    """How often the goals are met, in a sentence."""
    found = problems(results)
    close = sum(behind(problem) <= CLOSE for problem in found.values())
    above = sum(gain(problem) >= 0 for problem in found.values())
    return (
        f"Within {100 * CLOSE:g} points of the grid's best λ: {close} of {len(found)}; not below "
        f"fine-tuning: {above} of {len(found)}."
    )


def _steady_table(found: dict[str, Result]) -> Table:
    """What a change moves, and what is λ's part in it: what it leaves to be had by another λ."""
    moves = [each for changed in found.values() for each in moved(changed).values()]
    lacks = [each for changed in found.values() for each in lacking(changed).values()]
    return Table(
        f"All changes together, in points; the goal is {100 * STEADY:g}",
        ("", "moves accuracy by at most", "by less than the goal", "behind the best λ, at most"),
        [
            [
                title,
                f"{100 * max(abs(each[way]) for each in moves):.1f}",
                f"{sum(abs(each[way]) < STEADY for each in moves)} of {len(moves)}",
                f"{100 * max(each[way] for each in lacks):.1f}",
            ]
            for way, title in WAYS.items()
        ],
    )


def overview(results: Results) -> list[Table]:
    tables = []
    if found := problems(results):
        table = _table(found)
        tables.append(replace(table, note=verdict(results)))
    if changed := changes(results):
        tables += [_changes_table(changed), _steady_table(changed)]
    return tables


def _detail(result: Result) -> list[Table]:
    return overview({"one": result})


ENTRY = Entry(
    name="drift",
    title="How strong: λ, or how far the output may drift",
    about="Sequences of tasks on real digits, with every λ of a grid beside every drift of one: "
    "scenarios, networks and optimizers, several seeds.",
    run=study.run,
    detail=_detail,
    overview=overview,
    seconds=(0, 0),  # of seeds, not of rounds
    plots=("drift", "drift_problems", "drift_changes"),
    figures=plot.figures,
    alone=True,
)
