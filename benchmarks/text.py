"""Numbers and tables for a reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Rows of text whose first cell is the row's name; for the terminal, Markdown and HTML.

    ``ours``: names of the rows to emphasize. ``note``: text below the table.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    ours: frozenset[str] = frozenset()
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.headings), (self.title, self.headings, row)

    def rich(self) -> RichTable:
        shown = RichTable(
            title=escape(self.title),
            caption=escape(self.note),
            caption_justify="left",
            min_width=84,
        )
        for i, heading in enumerate(self.headings):
            shown.add_column(escape(heading), justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            style = "bold green" if row[0] in self.ours else None
            shown.add_row(*map(escape, row), style=style)
        return shown

    def markdown(self) -> str:
        """With title and note."""
        lines = [self.title, "", _line(self.headings), "|" + "---|" * len(self.headings)]
        for row in self.rows:
            cells = [f"**{c}**" if c and row[0] in self.ours else c for c in row]
            lines.append(_line(cells))
        return "\n".join([*lines, "", self.note] if self.note else lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def two_digits(value: float) -> str:
    """Two decimals, or two significant digits if those would show nothing."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def three_digits(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    for least, unit, factor in ((1, "s", 1.0), (1e-3, "ms", 1e3), (0, "µs", 1e6)):
        if seconds >= least:
            value = seconds * factor
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"
    raise ValueError(f"a duration can't be negative: {seconds}")


def times(ratio: float) -> str:
    if ratio < 1.995:
        return f"{ratio:.2f}×"
    return f"{ratio:.1f}×" if ratio < 10 else f"{ratio:,.0f}×"


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else minus(f"{100 * share:.{digits}f} %")


def minus(text: str) -> str:
    """With a minus sign instead of a hyphen."""
    return text.replace("-", "−")


def count(number: int) -> str:
    """10, 270 k, 25.6 M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
