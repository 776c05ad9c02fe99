"""The tests of this folder that need a device, under pytest, as one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hardware.gpu.checks import (
    DID_NOT_RUN,
    FAILED,
    NEEDS_GPU,
    NOT_HERE,
    PASSED,
    Check,
    Session,
)
from tests.hardware.gpu.steps import ROOT

FILES = ("test_operators.py", "test_compressed_omega.py", "test_mas.py")
MOST_FAILURES = 25  # after an illegal access all that follow fail


class Tally:
    """A pytest plugin: outcomes by test function, whose parameters are many."""

    def __init__(self) -> None:
        self.passed: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.others: list[Check] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2]
        test = name.partition("[")[0]
        self.seconds[test] = self.seconds.get(test, 0.0) + report.duration
        if report.failed:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", "")
            text = " ".join((message or str(report.longrepr)[-300:]).split())[:300]
            self.others.append(Check(name, FAILED, f"{report.when}: {text}"))
        elif report.skipped:
            self.others.append(Check(name, *verdict_of(skip_reason(report))))
        elif report.when == "call":
            self.passed[test] = self.passed.get(test, 0) + 1


def skip_reason(report: pytest.TestReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def verdict_of(reason: str) -> tuple[str, str]:
    """A skip says whether it needs a GPU or another machine; any other hides something."""
    for status in (NEEDS_GPU, NOT_HERE):
        if reason.startswith(status):
            return status, reason.removeprefix(status).removeprefix(": ")
    return DID_NOT_RUN, reason


def run(session: Session) -> None:
    tally = Tally()
    words = [str(Path(__file__).with_name(file)) for file in FILES]
    words += ["-q", "-p", "no:cacheprovider", "--tb=short"]
    words += [f"--maxfail={MOST_FAILURES}", f"--rootdir={ROOT}", "-o", "addopts="]
    code = pytest.main(words, plugins=[tally])
    for test, count in tally.passed.items():
        session.add(Check(test, PASSED, f"{count} cases", tally.seconds[test]))
    for check in tally.others:
        session.add(check)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        session.add(Check("pytest", FAILED, f"it ended with {code!r}"))
