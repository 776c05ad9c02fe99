"""One bug that could be in a kernel, and what should notice it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[3] / "csrc"


class Run(NamedTuple):
    """One program of test_simt.py, or of its cases those of an operation or a dtype.

    Without a sanitizer, which doubles the time to compile it, where a wrong value gives it away.
    """

    program: str
    sanitizer: str = "none"
    only: str = ""  # as in C++

    def sanitized(self) -> Run:
        """The same, watched for accesses that are out of bounds or misaligned."""
        return self._replace(sanitizer="address")


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    run: Run  # that should notice

    def original(self) -> str:
        return (CSRC / self.file).read_text()

    def apply(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(
                f"the mutant {self.name!r} is stale: its text occurs {text.count(self.old)} times "
                f"in csrc/{self.file}"
            )
        return text.replace(self.old, self.new)


def planted_in(file: str, *mutants: tuple[str, str, str, Run]) -> list[Mutant]:
    return [Mutant(name, file, old, new, run) for name, old, new, run in mutants]
