"""``python -m benchmarks penalty``: every way of doing a thing, side by side, on this machine.

``predict`` alone is about another: what GPUs are predicted to take.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import abs_matmul, accumulate, demo, penalty, per_sample, plot, report, step
from benchmarks.predict import GPUS
from benchmarks.predict import report as predict
from benchmarks.providers import Benchmark
from benchmarks.shapes import QUICK, SIZES
from benchmarks.timing import measure

BENCHMARKS = {b.name: b for b in (penalty.BENCHMARK, accumulate.BENCHMARK, *step.BENCHMARKS)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "benchmark", choices=[*BENCHMARKS, "abs_matmul", "per_sample", "predict", "demo", "all"]
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: all of them")
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=per_sample.WORKLOADS,
        help="of per_sample; default: all of them",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds (default 20, quick 5)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the demo")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["h100"], help="of predict")
    parser.add_argument(
        "--quick", action="store_true", help=f"only {', '.join(QUICK + per_sample.QUICK)}"
    )
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), metavar="DIR")
    arguments = parser.parse_args()
    arguments.sizes = arguments.sizes or list(QUICK if arguments.quick else SIZES)
    workloads = per_sample.QUICK if arguments.quick else per_sample.WORKLOADS
    arguments.workloads = arguments.workloads or list(workloads)
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


def _run_all(
    names: list[str], arguments: argparse.Namespace, machine: dict[str, Any], console: Console
) -> None:
    """Benchmarks of lists of tensors: their tables, ``results.json`` and a plot each."""
    results: dict[str, Any] = {"machine": machine, "benchmarks": {}}
    for name in names:
        sizes = results["benchmarks"][name] = {}
        for size, result in _run(BENCHMARKS[name], arguments.sizes, arguments.repeats, console):
            sizes[size] = result
            report.write_json(arguments.out / "results.json", results)  # a long run may be cut off
        picture = plot.draw(BENCHMARKS[name], sizes, machine, arguments.out)
        console.print(f"wrote {picture}")
    console.print(f"wrote {arguments.out / 'results.json'}")


def main() -> None:
    arguments, console = _parse(), Console(width=max(104, Console().width))
    if arguments.benchmark == "demo":
        demo.run(arguments.seeds, arguments.out, console)
        return
    if arguments.benchmark in ("predict", "all"):
        predict.run(arguments.gpu, arguments.out, console)
    if arguments.benchmark == "predict":
        return
    machine = report.machine()
    console.print(report.describe(machine), end="\n\n")
    every = [*BENCHMARKS, "abs_matmul", "per_sample"]
    chosen = every if arguments.benchmark == "all" else [arguments.benchmark]
    of_lists = [name for name in chosen if name in BENCHMARKS]
    if of_lists:
        _run_all(of_lists, arguments, machine, console)
    if "abs_matmul" in chosen:
        result = abs_matmul.run(arguments.quick, arguments.repeats, console)
        written = {"machine": machine, "benchmarks": {"abs_matmul": result}}
        report.write_json(arguments.out / "abs_matmul.json", written)
    if "per_sample" in chosen:
        rounds, quick = arguments.repeats, arguments.quick
        per_sample.run(arguments.workloads, rounds, quick, arguments.out, machine, console)


if __name__ == "__main__":
    main()
