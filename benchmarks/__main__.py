"""``python -m benchmarks penalty``: every way of doing a thing, side by side, on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import abs_matmul, accumulate, demo, penalty, plot, report
from benchmarks.providers import Benchmark
from benchmarks.shapes import QUICK, SIZES
from benchmarks.timing import measure

BENCHMARKS = {b.name: b for b in (penalty.BENCHMARK, accumulate.BENCHMARK)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "abs_matmul", "demo", "all"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: all of them")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds (default 20, quick 5)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the demo")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}; 2 products")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), metavar="DIR")
    arguments = parser.parse_args()
    arguments.sizes = arguments.sizes or list(QUICK if arguments.quick else SIZES)
    if arguments.repeats is None:
        arguments.repeats = 5 if arguments.quick else 20
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    return arguments


def _run(
    benchmark: Benchmark, sizes: list[str], repeats: int, console: Console
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of one size after another."""
    for name in sizes:
        title = SIZES[name].title
        with console.status(f"{benchmark.name}, {title}") as status:

            def tell(text: str, title: str = title) -> None:
                status.update(f"{benchmark.name}, {title}: {text}")

            measured = measure(benchmark, SIZES[name], repeats, tell)
        result = report.summary(benchmark, measured)
        report.show(console, benchmark, result)
        yield name, result


def main() -> None:
    arguments, console = _parse(), Console(width=max(96, Console().width))
    if arguments.benchmark == "demo":
        demo.run(arguments.seeds, arguments.out, console)
        return
    every = [*BENCHMARKS, "abs_matmul"]
    chosen = every if arguments.benchmark == "all" else [arguments.benchmark]
    machine = report.machine()
    console.print(report.describe(machine), end="\n\n")
    results: dict[str, Any] = {"machine": machine, "benchmarks": {}}
    for name in chosen:
        if name == "abs_matmul":
            measured = abs_matmul.run(arguments.quick, arguments.repeats, console)
            results["benchmarks"][name] = measured
            report.write_json(arguments.out / "results.json", results)
            continue
        sizes = results["benchmarks"][name] = {}
        for size, result in _run(BENCHMARKS[name], arguments.sizes, arguments.repeats, console):
            sizes[size] = result
            report.write_json(arguments.out / "results.json", results)  # a long run may be cut off
        picture = plot.draw(BENCHMARKS[name], sizes, machine, arguments.out)
        console.print(f"wrote {picture}")
    console.print(f"wrote {arguments.out / 'results.json'}")


if __name__ == "__main__":
    main()
