"""``python -m benchmarks demo``: the demo over several seeds, and how much its figures vary."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mas_ext.demo import Settings, run_demo
from mas_ext.demo.learning import METHODS

FIGURES = ("average_accuracy", "forgetting", "backward_transfer")


def run(seeds: list[int], out: Path, console: Console) -> None:
    """Permuted digits with the default settings, once a seed."""
    runs = {seed: run_demo(Settings(seed=seed)).results["methods"] for seed in seeds}
    summary = {method: _spread([runs[seed][method] for seed in seeds]) for method in METHODS}
    console.print(_table(summary, seeds))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "demo.json"
    path.write_text(json.dumps({"seeds": seeds, "summary": summary, "runs": runs}, indent=2))
    console.print(f"wrote {path}")


def _spread(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation of each figure."""
    spread = {}
    for figure in FIGURES:
        values = [result[figure] for result in results]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        spread[figure] = {"mean": statistics.mean(values), "stdev": deviation}
    return spread


def _table(summary: dict[str, dict[str, dict[str, float]]], seeds: list[int]) -> Table:
    table = Table(title=f"Permuted digits, 5 tasks, seeds {', '.join(map(str, seeds))}")
    for heading in ("", *(figure.replace("_", " ") for figure in FIGURES)):
        table.add_column(heading, justify="right" if heading else "left")
    for method, spread in summary.items():
        cells = [f"{s['mean']:.3f} ± {s['stdev']:.3f}" for s in spread.values()]
        table.add_row(METHODS[method].label, *cells)
    return table
