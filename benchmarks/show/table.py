"""One table, for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table as Rich


@dataclass(frozen=True)
class Table:
    """Rows of text, the first cell of which is the row's name.

    ``ours``: names of the rows to emphasise. ``note``: lines below it, for the reader.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    ours: frozenset[str] = frozenset()
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.headings), (self.title, self.headings, row)

    def rich(self) -> Rich:
        shown = Rich(
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
        lines = [_line(self.headings), "|" + "---|" * len(self.headings)]
        for row in self.rows:
            cells = [f"**{c}**" if c and row[0] in self.ours else c for c in row]
            lines.append(_line(cells))
        return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
