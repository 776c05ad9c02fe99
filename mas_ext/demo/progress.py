"""Progress bars, one per method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mas_ext.demo.learning import Tick

Bar = Callable[[str, int], AbstractContextManager[Tick]]


@contextmanager
def bars(show: bool) -> Iterator[Bar]:
    """Yields ``bar(label, total)``, a context manager for one bar, which yields its tick."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[doing]}"),
    )
    with Progress(*columns, disable=not show) as display:

        @contextmanager
        def bar(label: str, total: int) -> Iterator[Tick]:
            task = display.add_task(label, total=total, doing="")
            yield lambda doing, step: display.update(task, advance=step, doing=doing)
            display.update(task, doing="done")

        yield bar
