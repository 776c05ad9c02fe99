"""Processes that are killed at any moment, and the parent that does it.

They are forked from a server that has imported everything and computed nothing, so one costs
milliseconds. They compute with one thread, as a fork and OpenMP's threads do not go together.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from ctypes import c_int64
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.deaths", "pytest", "safetensors.torch"])
LIMIT = 180.0  # seconds until a process is taken for hung
Program = Callable[..., None]
STARTING, MEASURING, SAVING, BETWEEN = range(4)


class Stage:
    """What a program is doing, for its parent to see: its phase, and samples or files done."""

    def __init__(self) -> None:
        self._shared = CONTEXT.RawArray(c_int64, 2)

    @property
    def phase(self) -> int:
        return self._shared[0]

    @phase.setter
    def phase(self, value: int) -> None:
        self._shared[0] = value

    @property
    def done(self) -> int:
        return self._shared[1]

    @done.setter
    def done(self, value: int) -> None:
        self._shared[1] = value


def killed(program: Program, folder: Path, *args: Any, moment: int, delay: float) -> Stage | None:
    """Runs a program and kills it ``delay`` seconds after it has done so much.

    Returns:
        Where it was; None if it ended before.
    """
    stage = Stage()
    process = CONTEXT.Process(target=program, args=(folder, stage, *args))
    process.start()
    await_moment(process, stage, moment)
    process.join(delay)
    process.kill()
    process.join(LIMIT)
    assert process.exitcode in (0, -9), process.exitcode
    return stage if process.exitcode == -9 else None


def await_moment(process: BaseProcess, stage: Stage, moment: int) -> None:
    """Until a process has done so much, or has ended."""
    end = time.monotonic() + LIMIT
    while process.is_alive() and (stage.phase == STARTING or stage.done < moment):
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.0002)


def ended(program: Program, folder: Path, *args: Any) -> None:
    """Runs a program to its end."""
    process = CONTEXT.Process(target=program, args=(folder, Stage(), *args))
    process.start()
    process.join(LIMIT)
    assert process.exitcode == 0, process.exitcode
