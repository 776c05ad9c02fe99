"""``python -m tests.hardware.gpu``: settles on a card what no machine without one can show.

Exit status 0 only if every step passed. ``--device cpu`` is a rehearsal without a card.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.hardware.gpu import report
from tests.hardware.gpu.steps import STEPS, Result, run

SECONDS = {"cuda": 480, "cpu": 2400}  # at most; a rehearsal shares its machine with other tests


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hardware.gpu", description=__doc__)
    parser.add_argument("--device", choices=SECONDS, default="cuda")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR")
    parser.add_argument("--seconds", type=float, help="for all steps together (480 on a card)")
    return parser.parse_args()


def run_all(names: list[str], device: str, out: Path, seconds: float) -> Iterator[Result]:
    """One after another; without a GPU that works and kernels for it, only the first."""
    end, why_not = time.monotonic() + seconds, ""
    for name in names:
        left = end - time.monotonic()
        if left < 1:
            why_not = why_not or f"the {seconds:.0f} s for all steps are over"
        result = Result(name, why_not) if why_not else run(name, device, out, left)
        if name == "card" and not result.is_good:
            why_not = "there is no GPU, or there are no kernels for it"
        yield result


def main() -> int:
    arguments = parse()
    device, out = arguments.device, arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in STEPS if name in ("card", *(arguments.only or STEPS))]
    seconds = SECONDS[device] if arguments.seconds is None else arguments.seconds
    begin, results = time.monotonic(), []
    for result in run_all(chosen, device, out, seconds):
        results.append(result)
        print(f"{result.name:<12} {result.seconds:6.1f} s  {result.summary}", flush=True)
    text = report.markdown(results, device, time.monotonic() - begin)
    (out / "report.md").write_text(text, "utf-8")
    print(f"\n{text}\nwrote {out / 'report.md'}")
    return 0 if all(result.is_good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
