"""Runs benchmarks and writes results.json, one or more plots per benchmark, and report.html.

``results.json`` is {"machine": …, "runs": {name: …}, "benchmarks": {name: {item: …}}}; "runs" says
how long each benchmark took and whether it was a quick run. Running one benchmark replaces its own
results and leaves the others; if the machine or the versions differ from those of the file, its
entry in "runs" says so. An interrupted run replaces nothing: until the end, its results are in
``results.part.json``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from benchmarks import report
from benchmarks.benchmark import Benchmark, Options
from benchmarks.machine import describe, is_same, machine
from benchmarks.text import duration


def load(path: Path, kept: Iterable[str] | None = None) -> dict[str, Any]:
    """The results in a file, to which a run adds its own.

    Args:
        path: of results.json; a missing file is an empty one.
        kept: for a run of everything else, the names of the benchmarks whose results stay, marked
            with the machine they are of; None to keep the file as it is.
    """
    here = machine()
    if not path.exists():
        return {"machine": here, "runs": {}, "benchmarks": {}}
    before = report.read_json(path)
    if kept is None:
        return before
    runs = {name: run for name, run in before["runs"].items() if name in kept}
    for run in runs.values():
        measured_on = run.pop("machine", before["machine"])
        run |= {} if is_same(here, measured_on) else {"machine": measured_on}
    return {
        "machine": here,
        "runs": runs,
        "benchmarks": {name: before["benchmarks"][name] for name in runs},
    }


def run(
    benchmarks: list[Benchmark],
    options: dict[str, Any],
    results: dict[str, Any],
    out: Path,
    console: Console,
) -> None:
    """Runs one benchmark after another; ``options`` are those of :class:`Options`."""
    part, begin = out / "results.part.json", perf_counter()
    console.print(describe(results["machine"]), end="\n\n", highlight=False)
    for benchmark in benchmarks:
        _run_one(benchmark, options, results, part, console)
        seconds = duration(results["runs"][benchmark.name]["seconds"])
        total = duration(perf_counter() - begin)
        console.print(f"{benchmark.name} took {seconds}; {total} so far\n", highlight=False)
    part.replace(out / "results.json")
    for path in [*report.write_plots_and_page(benchmarks, results, out), out / "results.json"]:
        console.print(f"wrote {path}", highlight=False)


def _run_one(
    benchmark: Benchmark,
    options: dict[str, Any],
    results: dict[str, Any],
    part: Path,
    console: Console,
) -> None:
    begin, seconds = perf_counter(), benchmark.seconds[options["quick"]]
    measured = results["benchmarks"][benchmark.name] = {}
    here = machine()
    elsewhere = {} if is_same(results["machine"], here) else {"machine": here}
    with console.status(benchmark.name) as status, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # competitors warn about optional parts they lack

        def progress(text: str) -> None:
            status.update(f"{benchmark.name}, {text}")

        for item, result in benchmark.run(Options(**options, seconds=seconds, progress=progress)):
            measured[item] = result
            results["runs"][benchmark.name] = {
                "seconds": round(perf_counter() - begin, 1),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "quick": options["quick"],
                **elsewhere,
            }
            report.write_json(part, results)
    for table in report.TABLES[benchmark.name](measured):
        console.print(table.rich(), end="\n\n")
