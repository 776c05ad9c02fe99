"""The table of results that a run prints in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from mas_ext.demo.methods import METHODS
from mas_ext.demo.run import Run


def show(run: Run, out: Path) -> None:
    """Prints the results of every method, and where the report is."""
    settings = run.settings
    table = Table(
        title=f"{settings.scenario}, {settings.tasks} tasks, seed {settings.seed}",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("method")
    for column in ("average accuracy", "forgetting", "backward transfer", "seconds"):
        table.add_column(column, justify="right")
    for method, numbers in run.results["methods"].items():
        table.add_row(
            METHODS[method].label,
            f"{numbers['average_accuracy']:.1%}",
            f"{numbers['forgetting']:.3f}",
            f"{numbers['backward_transfer']:+.3f}",
            f"{numbers['seconds']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print("Report:", str(out / "report.html"), highlight=False, soft_wrap=True)
