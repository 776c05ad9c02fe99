"""Runs benchmarks and leaves results.json, a plot each and the page behind.

``results.json`` is {"machine": …, "runs": {name: …}, "benchmarks": {name: {item: …}}}; "runs" says
how long each took and how it was asked for. A benchmark that is run alone replaces its own results
and leaves the others; on another machine, or with other versions, its run says so. No figure is of
two runs, and a run that is cut off replaces nothing: until its end what it measures is in
``results.part.json``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console

from benchmarks.entry import Entry, Options
from benchmarks.show import page, style
from benchmarks.show.text import duration
from benchmarks.tools.machine import describe, is_same, machine


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def opened(path: Path, kept: Iterable[str] | None = None) -> dict[str, Any]:
    """The results to add to: those that are there already.

    Args:
        path: of results.json.
        kept: names of the benchmarks whose results stay when all others are measured anew; None if
            this run is of a part only.
    """
    here = machine()
    if not path.exists():
        return {"machine": here, "runs": {}, "benchmarks": {}}
    before = read_json(path)
    if kept is None:
        return before
    runs = {name: run for name, run in before["runs"].items() if name in kept}
    for run in runs.values():
        was = run.pop("machine", before["machine"])
        run |= {} if is_same(here, was) else {"machine": was}
    stay = {name: before["benchmarks"][name] for name in runs}
    return {"machine": here, "runs": runs, "benchmarks": stay}


def run(
    entries: Iterable[Entry],
    options: dict[str, Any],
    results: dict[str, Any],
    out: Path,
    console: Console,
) -> None:
    """One benchmark after another."""
    part = out / "results.part.json"
    console.print(describe(results["machine"]), end="\n\n", highlight=False)
    begin = perf_counter()
    for entry in entries:
        _run_one(entry, options, results, part, console)
        passed = duration(results["runs"][entry.name]["seconds"])
        total = duration(perf_counter() - begin)
        console.print(f"{entry.name} took {passed}; {total} so far", end="\n\n", highlight=False)
    part.replace(out / "results.json")
    for path in [*write_pages(entries, results, out), out / "results.json"]:
        console.print(f"wrote {path}", highlight=False)


def _run_one(
    entry: Entry, asked: dict[str, Any], results: dict[str, Any], part: Path, console: Console
) -> None:
    begin, seconds = perf_counter(), entry.seconds[asked["quick"]]
    measured = results["benchmarks"][entry.name] = {}
    with console.status(entry.name) as status, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers, about what they lack

        def tell(text: str) -> None:
            status.update(f"{entry.name}, {text}")

        for item, result in entry.run(Options(**asked, seconds=seconds, tell=tell)):
            measured[item] = result
            for table in entry.detail(result):
                console.print(table.rich(), end="\n\n")
            results["runs"][entry.name] = {
                "seconds": round(perf_counter() - begin, 1),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "quick": asked["quick"],
                **_elsewhere(results),
            }
            write_json(part, results)
    for table in entry.overview(measured):
        console.print(table.rich(), end="\n\n")


def _elsewhere(results: dict[str, Any]) -> dict[str, Any]:
    """What runs here, where that is not what the other results are of."""
    here = machine()
    return {} if is_same(results["machine"], here) else {"machine": here}


def write_pages(entries: Iterable[Entry], results: dict[str, Any], out: Path) -> list[Path]:
    """A PNG a plot, and the page with all of them; from the results alone."""
    written, drawn = [], {}
    for entry in entries:
        measured = results["benchmarks"].get(entry.name)
        if not measured:
            continue
        line = describe(results["runs"][entry.name].get("machine", results["machine"]))
        for stem, figure in entry.figures(measured, line).items():
            written.append(style.save_png(figure, out / f"{stem}.png"))
            drawn.setdefault(entry.name, []).append(style.as_svg(figure, stem))
            plt.close(figure)
    path = out / "report.html"
    path.write_text(page.render(list(entries), results, drawn), encoding="utf-8")
    return [*written, path]
