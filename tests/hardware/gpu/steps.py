"""The steps of `make gpu`, in order, and how one is run so that it takes no other with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.hardware.gpu import checks
from tests.hardware.gpu.checks import DID_NOT_RUN, FAILED, NEEDS_GPU, PASSED, Session

ROOT = Path(__file__).resolve().parents[3]
AT_MOST = 480  # seconds, all steps together


@dataclass(frozen=True)
class Step:
    """A module of this package, and the most seconds it may take."""

    name: str
    title: str
    limit: int


STEPS = (
    Step("machine", "The machine", 60),
    Step("build", "The kernels are built for this card", 240),
    Step("equivalence", "Every operator and MAS against the oracle", 150),
    Step("graphs", "CUDA graphs: capture, and replay with new scalars", 60),
    Step("syncs", "Nothing waits for the device", 60),
    Step("compiled", "torch.compile with CUDA graphs", 90),
    Step("sanitizer", "compute-sanitizer", 180),
    Step("bandwidth", "Every operator, against a copy and other ways to do its job", 195),
    Step("optimizers", "Steps with the penalty in them, against torch.optim", 60),
    Step("products", "accumulate_abs_matmul_, against bmm and mm", 60),
)


@dataclass
class Result:
    """A step, how it ended, and what it left."""

    step: Step
    status: str
    note: str = ""
    seconds: float = 0.0
    session: Session = field(default_factory=lambda: Session("none"))


def run(step: Step, device: str, out: Path, limit: float) -> Result:
    """In a process (and a group of processes) of its own, which ends with its time."""
    file, log = out / f"{step.name}.json", out / f"{step.name}.log"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.hardware.gpu.step", step.name, device, str(file)]
    begin = time.perf_counter()
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(device),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        in_time = _wait(process, limit)
    session = checks.read(file) or Session(device)
    status, note = judge(session, process.returncode, in_time, limit)
    if status == FAILED:
        note += f"; see {log}"
    return Result(step, status, note, time.perf_counter() - begin, session)


def environment(device: str) -> dict[str, str]:
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "MAS_EXT_TEST_DEVICE": device}


def _wait(process: subprocess.Popen[bytes], limit: float) -> bool:
    """Whether it ended by itself; if not, it is ended, and in any case all that it started."""
    try:
        process.wait(limit)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):  # nothing is left of the group
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def judge(session: Session, code: int, in_time: bool, limit: float) -> tuple[str, str]:
    """The status of a step, from its checks and from how its process ended."""
    counts: dict[str, int] = {}
    for check in session.checks:
        counts[check.status] = counts.get(check.status, 0) + 1
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    last = session.checks[-1].name if session.checks else "the first check"
    if not in_time:
        return FAILED, f"{limit:.0f} s were not enough, after {last!r} ({said})"
    if code != 0 or not session.finished:
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        return FAILED, f"its process ended with {end} after {last!r} ({said})"
    for status in (FAILED, DID_NOT_RUN, NEEDS_GPU):
        if counts.get(status):
            return status, said
    if counts.get(PASSED):
        return PASSED, said
    return DID_NOT_RUN, said or "it had nothing to check"


def is_good(result: Result, rehearsal: bool) -> bool:
    return result.status == PASSED or (rehearsal and result.status == NEEDS_GPU)
