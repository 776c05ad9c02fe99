"""The report, in Markdown: what did not pass comes first, then tables of figures."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone

from tests.hardware.gpu.steps import PASSED, ROOT, SKIPPED, STEPS, Result


def markdown(results: Sequence[Result], device: str, seconds: float) -> str:
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    lines = [
        "# mas_ext on a GPU" if device != "cpu" else "# mas_ext on a GPU: a rehearsal on the CPU",
        "",
        f"**{verdict(results, device)}** {seconds:.0f} s, {now}, commit {commit()}.",
        "",
        *(f"- {name}: {value}" for name, value in properties(results) if name != "row"),
        "",
        *table(
            ["step", "what", "s", "tests"],
            [[r.name, STEPS[r.name].title, f"{r.seconds:.1f}", r.summary] for r in results],
        ),
        *(line for result in results for line in complaints(result)),
        *figures(results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def verdict(results: Sequence[Result], device: str) -> str:
    bad = [result.name for result in results if not result.is_good]
    if bad:
        return f"Not shown to be right: {', '.join(bad)}."
    if device == "cpu":
        return "All that can run without a GPU passed; nothing is shown about the CUDA kernels."
    return "Every step passed."


def properties(results: Sequence[Result]) -> Iterator[tuple[str, str]]:
    for result in results:
        for case in result.cases:
            yield from case.properties


def complaints(result: Result) -> Iterator[str]:
    """Everything that did not pass; equal reasons in one line, of a test that is one case of many
    the function alone.
    """
    by_reason: dict[tuple[str, str], dict[str, None]] = {}
    for case in result.cases:
        if case.status != PASSED:
            name = case.name.partition("[")[0] if case.status == SKIPPED else case.name
            by_reason.setdefault((case.status, case.reason), {})[name] = None
    if by_reason:
        yield from (f"## {STEPS[result.name].title}: what did not pass", "")
        for (status, reason), names in by_reason.items():
            yield f"- **{status}**: {reason} ({'; '.join(names)})"
        yield ""


def figures(results: Sequence[Result]) -> Iterator[str]:
    """The rows that tests have added, by the titles of their tables."""
    tables: dict[str, tuple[list[str], list[list[str]]]] = {}
    for name, value in properties(results):
        if name == "row":
            title, columns, cells = json.loads(value)
            tables.setdefault(title, (columns, []))[1].append(cells)
    for title, (columns, rows) in tables.items():
        yield from (f"## {title}", "", *table(columns, rows))


def table(columns: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Padded, so that it reads well in a terminal too."""
    cells = [columns, *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "| " + " | ".join(padded) + " |"
    yield ""


def commit() -> str:
    """With a + where files differ from it; unknown where this is not a clone, or git is missing."""
    try:
        words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"
