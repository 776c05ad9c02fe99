"""One HTML page that needs nothing but itself."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from benchmarks.entry import Entry
from benchmarks.show.text import took
from benchmarks.tools.machine import describe


def render(entries: list[Entry], results: dict[str, Any], figures: dict[str, list[str]]) -> str:
    """The page as text; ``figures``: SVG by benchmark."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("benchmarks.show").joinpath("page.html").read_text("utf-8")
    measured = [entry for entry in entries if results["benchmarks"].get(entry.name)]
    return environment.from_string(template).render(
        machine=_machine(results["machine"]),
        line=describe(results["machine"]),
        sections=[_section(entry, results, figures.get(entry.name, [])) for entry in measured],
        headlines=_headlines(measured, results),
        total=took(results["runs"].values()),
    )


def _section(entry: Entry, results: dict[str, Any], figures: list[str]) -> dict[str, Any]:
    items = results["benchmarks"][entry.name]
    run = results["runs"][entry.name]
    return {
        "name": entry.name,
        "title": entry.title,
        "about": entry.about,
        "overview": entry.overview(items),
        "details": [table for item in items.values() for table in entry.detail(item)],
        "figures": [Markup(figure) for figure in figures],
        "took": took([run]),
        "date": run["date"][:10],
        "quick": run["quick"],
        "elsewhere": describe(run["machine"]) if "machine" in run else "",
    }


def _headlines(entries: list[Entry], results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Benchmark, figure, what it is."""
    found = [(e.name, e.headline(results["benchmarks"][e.name])) for e in entries if e.headline]
    return [(name, *words) for name, words in found if words is not None]


def _machine(info: dict[str, Any]) -> dict[str, str]:
    peers = info.get("peers", {})
    return {
        "Processor": f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads used",
        "Platform": info.get("platform", "–"),
        "Python": info.get("python", "–"),
        "PyTorch": info["torch"],
        "mas_ext": f"{info['mas_ext']}, "
        + (f"kernels for {info['simd']}" if info["native"] else "plain PyTorch"),
        **{name: version or "not installed" for name, version in peers.items()},
        "Date": info["date"][:10],
    }
