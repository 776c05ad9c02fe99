"""``python -m benchmarks``: times mas_ext and the alternatives to it on this machine.

Without a name, every benchmark runs except ``drift`` and ``retention``, which take hours.
``report`` measures nothing: it draws the plots and writes the HTML report again from results.json
in --out. If that is the committed results.json, the tables in the documentation are updated, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import report, runner
from benchmarks.drift.problems import PROBLEMS
from benchmarks.models import WORKLOADS
from benchmarks.registry import BENCHMARKS, JOBS
from benchmarks.retention.study import TEXTS
from benchmarks.state import SIZES


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=(), help=f"for {', '.join(JOBS)}"
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=(*WORKLOADS, *PROBLEMS, *TEXTS),
        default=(),
        metavar="NAME",
        help=f"for per_sample: {', '.join(WORKLOADS)}; for drift: {', '.join(PROBLEMS)}; "
        f"for retention: {', '.join(TEXTS)}",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="most rounds (20; 3 if quick)")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="for training runs")
    parser.add_argument("--quick", action="store_true", help="show that everything runs")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), metavar="DIR")
    arguments = parser.parse_args(words)
    for name in arguments.benchmark:
        if name not in {*BENCHMARKS, "all", "report"}:
            parser.error(f"unknown benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
    if arguments.repeats is None:
        arguments.repeats = 3 if arguments.quick else 20
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    arguments, console = _parse(words), Console(width=max(160, Console().width))
    if "report" in arguments.benchmark:
        for path in report.write_all(list(BENCHMARKS.values()), arguments.out):
            console.print(f"wrote {path}", highlight=False)
        return
    names = [name for name in arguments.benchmark if name != "all"]
    chosen = [
        benchmark
        for name, benchmark in BENCHMARKS.items()
        if (name in names if names else not benchmark.on_request)
    ]
    kept = None if names else [b.name for b in BENCHMARKS.values() if b.on_request]
    results = runner.load(arguments.out / "results.json", kept)
    options = {
        "quick": arguments.quick,
        "rounds": arguments.repeats,
        "sizes": tuple(arguments.sizes),
        "workloads": tuple(arguments.workloads),
        "seeds": tuple(arguments.seeds[:1] if arguments.quick else arguments.seeds),
    }
    runner.run(chosen, options, results, arguments.out, console)


if __name__ == "__main__":
    main()
