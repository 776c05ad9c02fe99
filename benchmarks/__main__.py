"""``python -m benchmarks``: every way of doing a thing, side by side, on this machine.

Without a name, all of them but ``drift``, which takes as long as all others. ``predict`` alone is
about another machine: what GPUs are predicted to take. ``report`` measures nothing: it draws the
plots and the page again from results.json, and writes the READMEs' tables from it if it is the
committed one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import lists, per_sample, runner
from benchmarks.lists.shapes import SIZES
from benchmarks.predict import GPUS
from benchmarks.predict import report as predict
from benchmarks.registry import ALONE, ENTRIES
from benchmarks.show import readme


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "benchmark", nargs="?", default="all", choices=["all", *ENTRIES, "predict", "report"]
    )
    of_lists = ", ".join(lists.JOBS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=(), help=f"of {of_lists}")
    parser.add_argument(
        "--workloads", nargs="+", choices=per_sample.WORKLOADS, default=(), help="of per_sample"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="most rounds (20, quick 5)")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="of the demo")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=["h100"], help="of predict")
    parser.add_argument("--quick", action="store_true", help="a first look, in two minutes")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), metavar="DIR")
    arguments = parser.parse_args(words)
    if arguments.repeats is None:
        arguments.repeats = 5 if arguments.quick else 20
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    return arguments


def _report(out: Path, console: Console) -> None:
    results = runner.read_json(out / "results.json")
    for path in runner.write_pages(ENTRIES.values(), results, out):
        console.print(f"wrote {path}", highlight=False)
    if (out / "results.json").resolve() != readme.RESULTS:
        return
    for path, plots in readme.READMES.items():
        text = path.read_text(encoding="utf-8")
        new = readme.rewritten(text, list(ENTRIES.values()), results, plots)
        if new != text:
            path.write_text(new, encoding="utf-8")
            console.print(f"wrote {path}", highlight=False)


def main(words: Sequence[str] | None = None) -> None:
    arguments, console = _parse(words), Console(width=max(140, Console().width))
    name, out = arguments.benchmark, arguments.out
    if name == "report":
        _report(out, console)
        return
    if name in ("all", "predict"):
        predict.run(arguments.gpu, out, console)
    if name == "predict":
        return
    everything = [entry for entry in ENTRIES.values() if not entry.alone]
    chosen = everything if name == "all" else [ENTRIES[name]]
    results = runner.opened(out / "results.json", ALONE if name == "all" else None)
    asked = {
        "quick": arguments.quick,
        "rounds": arguments.repeats,
        "sizes": tuple(arguments.sizes),
        "workloads": tuple(arguments.workloads),
        "seeds": tuple(arguments.seeds[:1] if arguments.quick else arguments.seeds),
    }
    runner.run(chosen, asked, results, out, console)


if __name__ == "__main__":
    main()
