"""Measurements as tables in the terminal and as JSON."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mas_ext
from benchmarks.providers import Benchmark
from benchmarks.timing import ROOFLINE, Measurement, quartiles


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What numbers mean nothing without."""
    build = mas_ext.build_info()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mas_ext": build["version"],
        "native": build["native"],
        "simd": build["simd"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def describe(info: dict[str, Any]) -> str:
    return (
        f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads, "
        f"torch {info['torch']}, mas_ext {info['mas_ext']} ({info['simd']}), {info['date'][:10]}"
    )


def spread(values: list[float]) -> dict[str, float]:
    first, median, third = quartiles(values)
    return {"q1": first, "median": median, "q3": third}


def summary(benchmark: Benchmark, measured: Measurement) -> dict[str, Any]:
    """Numbers of one size. Ratios are medians of per-round ratios, not ratios of medians."""
    moved = benchmark.bytes_per_parameter * measured.parameters
    providers = {}
    for name, seconds in measured.seconds.items():
        providers[name] = {
            "seconds": spread(seconds),
            "time_over_ours": spread(measured.ratios(name, benchmark.ours)),
            "time_over_roofline": spread(measured.ratios(name, ROOFLINE)),
            "fraction_of_roofline": spread(measured.ratios(ROOFLINE, name)),
            "gigabytes_per_second": moved / spread(seconds)["median"] / 1e9,
        }
    return {
        "title": measured.title,
        "tensors": measured.tensors,
        "parameters": measured.parameters,
        "bytes_of_one_pass": moved,
        "rounds": len(measured.seconds[ROOFLINE]),
        "providers": providers,
        "skipped": measured.skipped,
    }


def significant(value: float) -> str:
    """Two decimals, or two significant digits where that would show nothing."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def milliseconds(spread: dict[str, float]) -> str:
    digits = 1 if spread["median"] > 0.01 else 2 if spread["median"] > 0.001 else 3
    low, middle, high = (f"{spread[k] * 1e3:.{digits}f}" for k in ("q1", "median", "q3"))
    return f"{middle} [dim]({low}-{high})[/dim]"


def table(benchmark: Benchmark, size: dict[str, Any]) -> Table:
    parameters, tensors = size["parameters"] / 1e6, size["tensors"]
    plural = "tensor" if tensors == 1 else "tensors"
    result = Table(
        title=f"{benchmark.title}\n{size['title']}: {parameters:.3g} M parameters, "
        f"{tensors:,} {plural}, medians of {size['rounds']} rounds",
        caption="\n".join(f"{name}: {reason}" for name, reason in size["skipped"].items()),
        min_width=84,
    )
    result.add_column("", no_wrap=True)
    for heading in ("ms (quartiles)", "time / ours", "GB/s", "of roofline"):
        result.add_column(heading, justify="right", no_wrap=True)
    for name, row in size["providers"].items():
        style = {benchmark.ours: "bold green", ROOFLINE: "cyan"}.get(name)
        result.add_row(
            name,
            milliseconds(row["seconds"]),
            significant(row["time_over_ours"]["median"]),
            significant(row["gigabytes_per_second"]),
            significant(row["fraction_of_roofline"]["median"]),
            style=style,
        )
    return result


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


def show(console: Console, benchmark: Benchmark, size: dict[str, Any]) -> None:
    console.print(table(benchmark, size))
    console.print()
