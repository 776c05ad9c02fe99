"""Runs benchmarks and leaves results.json, a plot each and the page behind.

``results.json`` is {"machine": …, "runs": {name: …}, "benchmarks": {name: {item: …}}}; "runs" says
how long each took and how it was asked for. A benchmark that is run alone replaces its own results
and leaves the others, as long as they are of the same machine and versions.
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


class OtherMachine(ValueError):
    """Results of another machine are in the way."""


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def opened(path: Path, is_all: bool) -> dict[str, Any]:
    """The results to add to: those that are there already if this run is of a part only."""
    here = machine()
    if is_all or not path.exists():
        return {"machine": here, "runs": {}, "benchmarks": {}}
    results = read_json(path)
    if not is_same(results["machine"], here):
        raise OtherMachine(
            f"{path} is of another machine or other versions: {describe(results['machine'])}; "
            "choose another --out, or run all benchmarks"
        )
    return results


def run(
    entries: Iterable[Entry],
    options: dict[str, Any],
    results: dict[str, Any],
    out: Path,
    console: Console,
) -> None:
    """One benchmark after another; a run that is cut off leaves what it had measured."""
    console.print(describe(results["machine"]), end="\n\n", highlight=False)
    begin = perf_counter()
    for entry in entries:
        _run_one(entry, options, results, out, console)
        passed = duration(results["runs"][entry.name]["seconds"])
        total = duration(perf_counter() - begin)
        console.print(f"{entry.name} took {passed}; {total} so far", end="\n\n", highlight=False)
    for path in write_pages(entries, results, out):
        console.print(f"wrote {path}", highlight=False)
    console.print(f"wrote {out / 'results.json'}", highlight=False)


def _run_one(
    entry: Entry, asked: dict[str, Any], results: dict[str, Any], out: Path, console: Console
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
            }
            write_json(out / "results.json", results)
    for table in entry.overview(measured):
        console.print(table.rich(), end="\n\n")


def write_pages(entries: Iterable[Entry], results: dict[str, Any], out: Path) -> list[Path]:
    """A PNG a plot, and the page with all of them; from the results alone."""
    written, drawn = [], {}
    line = describe(results["machine"])
    for entry in entries:
        measured = results["benchmarks"].get(entry.name)
        if not measured:
            continue
        for stem, figure in entry.figures(measured, line).items():
            written.append(style.save_png(figure, out / f"{stem}.png"))
            drawn.setdefault(entry.name, []).append(style.as_svg(figure, stem))
            plt.close(figure)
    path = out / "report.html"
    path.write_text(page.render(list(entries), results, drawn), encoding="utf-8")
    return [*written, path]
