"""The tables of the READMEs, written from results.json between markers.

``<!-- penalty -->`` … ``<!-- end -->`` holds the overview of that benchmark and its plots. What the
results lack stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.entry import Entry
from benchmarks.show.text import took
from benchmarks.tools.machine import describe

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "results.json"
READMES = {
    ROOT / "README.md": "benchmarks/results",
    ROOT / "benchmarks/README.md": "results",
    ROOT / "docs/choosing_lambda.md": "../benchmarks/results",
}
_BLOCK = re.compile(r"(<!-- (?P<name>[a-z_]+) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def rewritten(text: str, entries: list[Entry], results: dict[str, Any], plots: str) -> str:
    """The text with every block that the results have something for; ``plots``: their folder."""
    makers = _makers(entries, results, plots)
    return filled(text, {"machine": lambda: _machine(entries, results), **makers})


def filled(text: str, makers: Mapping[str, Callable[[], str]]) -> str:
    """The text with every block written anew by the maker of its name, if there is one."""

    def replace(found: re.Match[str]) -> str:
        maker = makers.get(found["name"])
        return found[0] if maker is None else f"{found[1]}{maker()}\n{found[4]}"

    return _BLOCK.sub(replace, text)


def names(text: str) -> list[str]:
    """Of the blocks, in order."""
    return [found["name"] for found in _BLOCK.finditer(text)]


def _makers(
    entries: list[Entry], results: dict[str, Any], plots: str
) -> dict[str, Callable[[], str]]:
    measured = [entry for entry in entries if results["benchmarks"].get(entry.name)]
    return {entry.name: partial(block, entry, results, plots) for entry in measured}


def block(entry: Entry, results: dict[str, Any], plots: str) -> str:
    """A benchmark's tables and plots in Markdown."""
    measured = results["benchmarks"][entry.name]
    parts = []
    for table in entry.overview(measured):
        note = f"\n\n{table.note}" if table.note else ""
        parts.append(f"{table.title}\n\n{table.markdown()}{note}")
    run = results["runs"][entry.name]
    if "machine" in run:
        parts.append(f"(Of another run: {describe(run['machine'])}.)")
    parts += [f"![{entry.title}]({plots}/{stem}.png)" for stem in entry.plots]
    return "\n\n".join(parts)


def _machine(entries: list[Entry], results: dict[str, Any]) -> str:
    peers = results["machine"].get("peers", {})
    versions = ", ".join(f"{name} {version}" for name, version in peers.items() if version)
    alone = {entry.name for entry in entries if entry.alone}
    passed = took(run for name, run in results["runs"].items() if name not in alone)
    return f"{describe(results['machine'])}; {versions}. The run took {passed}."
