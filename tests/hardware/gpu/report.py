"""The report: Markdown to read, JSON to keep. What failed comes first, what passed in a line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tests.hardware.gpu.checks import PASSED, Check, Table
from tests.hardware.gpu.steps import ROOT, Result, is_good


def markdown(results: Sequence[Result], device: str, seconds: float) -> str:
    lines = [
        "# mas_ext on a GPU" if device != "cpu" else "# mas_ext on a GPU: a rehearsal on the CPU",
        "",
        f"**{verdict(results, device)}** {seconds:.0f} s, {now()}, commit {commit()}.",
        "",
        *machine(results),
        *summary(results),
        *complaints(results),
        *(line for result in results for line in figures(result)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def verdict(results: Sequence[Result], device: str) -> str:
    bad = [r.step.name for r in results if not is_good(r, device == "cpu")]
    if "machine" in bad:
        (why,) = [r.note for r in results if r.step.name == "machine"]
        return f"Nothing ran: {why}."
    if bad:
        return f"Not shown to be right: {', '.join(bad)}."
    if device == "cpu":
        return "All that can run without a GPU passed; nothing is shown about the CUDA kernels."
    return "Every step passed."


def machine(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        if result.step.name == "machine":
            for name, value in result.session.figures.items():
                text = "; ".join(value) or "none" if isinstance(value, list) else value
                yield f"- {name}: {text}"
            yield ""


def summary(results: Sequence[Result]) -> Iterator[str]:
    rows = [
        [r.step.name, r.step.title, r.status, f"{r.seconds:.1f}", r.note or "–"] for r in results
    ]
    yield from table(["step", "what", "status", "s", "checks"], rows)


def complaints(results: Sequence[Result]) -> Iterator[str]:
    """Everything that did not pass, with its reason; equal reasons of one step in one line."""
    for result in results:
        grouped: dict[tuple[str, str], list[Check]] = {}
        for check in result.session.checks:
            if check.status != PASSED:
                grouped.setdefault((check.status, check.note), []).append(check)
        if grouped:
            yield f"## {result.step.title}: what did not pass"
            yield ""
            for (status, note), checks in grouped.items():
                names = "; ".join(check.name for check in checks)
                yield f"- **{status}**{': ' + note if note else ''} ({names})"
            yield ""


def figures(result: Result) -> Iterator[str]:
    tables = [t for t in result.session.tables if t.rows]
    notes = [c for c in result.session.checks if c.status == PASSED and c.note]
    if not tables and not notes:
        return
    yield f"## {result.step.title}"
    yield ""
    if not tables:
        yield from (f"- {check.name}: {check.note}" for check in notes)
        yield ""
    for each in tables:
        yield from one_table(each)


def one_table(each: Table) -> Iterator[str]:
    yield f"### {each.title}"
    yield ""
    yield from table(each.columns, each.rows)
    if each.note:
        yield each.note + "."
        yield ""


def table(columns: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Padded, so that it reads well in a terminal too."""
    cells = [columns, *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    for number, row in enumerate(cells):
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "| " + " | ".join(padded) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    yield ""


def write(out: Path, results: Sequence[Result], device: str, seconds: float) -> str:
    """report.md to read and results.json to keep; the text of the first."""
    text = markdown(results, device, seconds)
    (out / "report.md").write_text(text, "utf-8")
    content = {
        "device": device,
        "date": now(),
        "commit": commit(),
        "seconds": seconds,
        "good": all(is_good(r, device == "cpu") for r in results),
        "steps": {r.step.name: kept(r) for r in results},
    }
    words = json.dumps(content, indent=2, ensure_ascii=False, default=as_json)
    (out / "results.json").write_text(words + "\n", "utf-8")
    return text


def kept(result: Result) -> dict[str, Any]:
    session = result.session
    found = {"figures": session.figures, "checks": session.checks, "tables": session.tables}
    return {"status": result.status, "note": result.note, "seconds": result.seconds, **found}


def as_json(thing: Any) -> Any:
    return vars(thing) if is_dataclass(thing) else str(thing)


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def commit() -> str:
    """With a + where files differ from it; unknown where this is not a clone, or git is missing."""
    try:
        words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"
