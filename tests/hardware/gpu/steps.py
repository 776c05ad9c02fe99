"""The steps of `make gpu`, in order, and how one is run so that it takes no other with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[3]
GPU, UNIT = "tests/hardware/gpu", "tests/unit/operators"
PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
NOT_HERE = "not on this machine"  # begins the reason of a skip that says nothing of the kernels
MOST_FAILURES = 25  # after an illegal access, all that follow fail


@dataclass(frozen=True)
class Step:
    """What pytest is given, and the most seconds that it may take on a card."""

    title: str
    seconds: int
    words: tuple[str, ...]


def _step(title: str, seconds: int, *files: str) -> Step:
    return Step(title, seconds, tuple(f"{GPU}/{file}" for file in files))


PYTEST = ("-o", "addopts=", "-p", "no:cacheprovider", "-p", "tests.hardware.gpu.device")
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # of whatever else is installed
REDIRECT = ("-p", "tests.hardware.gpu.redirect", f"{UNIT}/test_results.py")
STEPS = {
    "card": _step("A card, and kernels that are built for it", 240, "card.py"),
    "unit": Step(
        "The operators' unit tests, with the operators on the device",
        150,
        (*REDIRECT, f"{UNIT}/test_optimizer_steps.py", f"{UNIT}/test_outer.py"),
    ),
    "device": _step(
        "Operators and MAS on the device", 120, "operators.py", "mas.py", "host_state.py"
    ),
    "graphs": _step("CUDA graphs: capture, and replay with new scalars", 60, "graphs.py"),
    "syncs": _step("Nothing waits for the device", 60, "syncs.py"),
    "compiled": _step("torch.compile with CUDA graphs", 90, "compiled.py"),
    "sanitizer": _step("compute-sanitizer", 180, "sanitizer.py"),
    "timings": _step("Times, beside a copy and other ways to do the job", 240, "timings.py"),
}


@dataclass
class Case:
    """One test."""

    name: str
    status: str
    reason: str = ""
    properties: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Result:
    """A step, what is wrong with it as a whole, and its tests."""

    name: str
    problem: str = ""
    cases: list[Case] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        statuses = {case.status for case in self.cases}
        return not self.problem and FAILED not in statuses and PASSED in statuses

    @property
    def summary(self) -> str:
        counts = Counter(case.status for case in self.cases)
        return ", ".join([*filter(None, [self.problem]), *(f"{n} {s}" for s, n in counts.items())])


def run(name: str, device: str, out: Path, seconds: float) -> Result:
    """In a process (and a group of processes) of its own, which ends with its time."""
    step, log, xml = STEPS[name], out / f"{name}.log", out / f"{name}.xml"
    xml.unlink(missing_ok=True)
    limit = min(seconds, step.seconds) if device == "cuda" else seconds
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", f"--rootdir={ROOT}"]
    command += ["-m", "not slow", f"--maxfail={MOST_FAILURES}", f"--junit-xml={xml}", *PYTEST]
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [*command, *step.words],
            cwd=ROOT,
            env={**os.environ, "MAS_EXT_TEST_DEVICE": device, **NO_PLUGINS},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = _wait(process, limit)
    result = Result(name, "", read(xml) if xml.exists() else [], time.monotonic() - begin)
    for case in result.cases:
        if device == "cuda" and case.status == SKIPPED and not case.reason.startswith(NOT_HERE):
            case.status = FAILED  # it hides something
    if code not in (0, 1) or not result.cases or (code == 1 and result.is_good):
        ended = f"ended with {code}" if code is not None else f"was stopped after {limit:.0f} s"
        last = " ".join(log.read_text("utf-8", errors="replace").splitlines()[-1:])
        result.problem = f"it {ended}, at {last[-200:]!r}; see {log}"
    return result


def _wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """Its exit code, or None if it had to be ended; in any case all that it started is ended."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # nothing is left of the group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(xml: Path) -> list[Case]:
    """From pytest's report in JUnit's format."""
    found = []
    for case in ElementTree.parse(xml).iter("testcase"):
        properties = [(p.attrib["name"], p.attrib["value"]) for p in case.iter("property")]
        status, reason = PASSED, ""
        for element in case:
            if element.tag in ("failure", "error", "skipped"):
                status = SKIPPED if element.tag == "skipped" else FAILED
                reason = " ".join(element.attrib.get("message", "").split())[:300]
        found.append(Case(case.attrib["name"], status, reason, properties))
    return found
