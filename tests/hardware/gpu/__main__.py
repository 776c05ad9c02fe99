"""``python -m tests.hardware.gpu``: settles on a card what no machine without one can show.

Exit status 0 only if every step passed. ``--device cpu`` is a rehearsal: what needs a GPU is said
to need one, and all else must pass.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.hardware.gpu import report
from tests.hardware.gpu.checks import DID_NOT_RUN, PASSED
from tests.hardware.gpu.steps import AT_MOST, STEPS, Result, Step, is_good, run

NAMES = [step.name for step in STEPS]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hardware.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="STEP", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR")
    parser.add_argument(
        "--seconds", type=float, help=f"for all steps together (default {AT_MOST} on a card)"
    )
    arguments = parser.parse_args()
    if arguments.seconds is None:
        arguments.seconds = AT_MOST * patience(arguments.device)
    return arguments


def patience(device: str) -> int:
    """A rehearsal shares its machine with other tests."""
    return 5 if device == "cpu" else 1


def chosen(only: list[str] | None) -> list[Step]:
    """The machine always: the report would mean nothing without it."""
    return [step for step in STEPS if only is None or step.name in ("machine", *only)]


def run_all(steps: list[Step], device: str, out: Path, seconds: float) -> Iterator[Result]:
    """One after another; without a GPU that works none but the first is tried."""
    begin, why_not = time.monotonic(), ""
    for step in steps:
        left = seconds - (time.monotonic() - begin)
        if not why_not and left < 1:
            why_not = f"the {seconds:.0f} s for all steps are over"
        if why_not:
            yield Result(step, DID_NOT_RUN, why_not)
            continue
        result = run(step, device, out, min(step.limit * patience(device), left))
        if step.name == "machine" and not is_good(result, device == "cpu"):
            reasons = [c.note for c in result.session.checks if c.status != PASSED]
            result.note = "; ".join(reasons) or result.note
            why_not = "there is no GPU to run on"
        yield result


def main() -> int:
    arguments = parse()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    begin, results = time.monotonic(), []
    for result in run_all(chosen(arguments.only), arguments.device, out, arguments.seconds):
        results.append(result)
        print(f"{result.step.name:<12} {result.status:<12} {result.seconds:6.1f} s  {result.note}")
        sys.stdout.flush()
    text = report.write(out, results, arguments.device, time.monotonic() - begin)
    print(f"\n{text}\nwrote {out / 'report.md'} and {out / 'results.json'}")
    return 0 if all(is_good(r, arguments.device == "cpu") for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
