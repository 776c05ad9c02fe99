"""What a step finds out: checks that passed or did not, and tables of figures, kept as JSON."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED = "passed"
FAILED = "failed"
DID_NOT_RUN = "did not run"
NEEDS_GPU = "needs a GPU"  # in a rehearsal
NOT_HERE = "not on this machine"  # a second device, more memory: says nothing about the kernels


class Verdict(Exception):
    """Ends a check with another status than passed or failed; its text says why."""

    status: str


class DidNotRun(Verdict):
    status = DID_NOT_RUN


class NeedsGpu(Verdict):
    status = NEEDS_GPU


@dataclass
class Check:
    name: str
    status: str
    note: str = ""
    seconds: float = 0.0


@dataclass
class Table:
    """Figures: the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""


@dataclass
class Session:
    """One step on one device. What is known so far is on disk after every check."""

    device: str
    file: Path | None = None
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    _lost: str = ""  # why nothing more can run in this process

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    def check(self, name: str, function: Callable[..., str | None], *arguments: Any) -> bool:
        """Runs a check; what it returns is a note for the report. Whether it passed."""
        begin = time.perf_counter()
        try:
            if self._lost:
                raise DidNotRun(self._lost)
            status, text = PASSED, function(*arguments) or ""
            self._wait()
        except Verdict as verdict:
            status, text = verdict.status, str(verdict)
        except Exception as error:
            traceback.print_exc()
            status, text = FAILED, in_one_line(error)
            self._look_at_the_context(name)
        self.add(Check(name, status, text, time.perf_counter() - begin))
        return status == PASSED

    def add(self, check: Check) -> None:
        self.checks.append(check)
        print(f"{check.status:>12}  {check.name}  {check.note}", flush=True)
        self.write()

    def table(self, title: str, columns: list[str], note: str = "") -> Table:
        self.tables.append(Table(title, columns, note=note))
        return self.tables[-1]

    def finish(self) -> None:
        self.finished = True
        self.write()

    def write(self) -> None:
        if self.file is not None:
            content = {k: v for k, v in asdict(self).items() if k not in ("file", "_lost")}
            self.file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")

    def _wait(self) -> None:
        """What a kernel did wrong belongs to the check that launched it."""
        if not self.rehearsal:
            import torch

            torch.cuda.synchronize()

    def _look_at_the_context(self, name: str) -> None:
        """After an illegal access every later call fails: those checks did not run."""
        try:
            self._wait()
        except Exception as error:
            self._lost = f"{name!r} left the device unusable ({in_one_line(error)})"


def in_one_line(error: BaseException, most: int = 300) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= most else text[:most] + " …"


def read(file: Path) -> Session | None:
    """What a step's process left on disk."""
    if not file.is_file():
        return None
    content = json.loads(file.read_text("utf-8"))
    return Session(
        content["device"],
        file,
        [Check(**check) for check in content["checks"]],
        [Table(**table) for table in content["tables"]],
        content["figures"],
        content["finished"],
    )
