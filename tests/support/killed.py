"""Processes that learn, are killed at any moment and started again, and their parent.

They are forked from a server that has imported everything and computed nothing, so one costs
milliseconds. They compute with one thread, as a fork and OpenMP's threads do not go together.
A program is a function of a folder, a :class:`Stage`, its rank, and more.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from ctypes import c_int64
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from mas_ext._state import checkpoint

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.models", "pytest", "safetensors.torch"])
LIMIT = 180.0  # seconds until a process is taken for hung
NEVER = 10**6
Program = Callable[..., None]
STARTING, MEASURING, SAVING, BETWEEN = range(4)


class Stage:
    """What a program is doing, for its parent to see.

    Attributes:
        store: a file for the ranks to meet at.
        phase: one of those above.
        done: samples, or files.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
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


class Ended(NamedTuple):
    """How processes ended, with the phase and the count of the one that was to be killed."""

    codes: list[int | None]  # None: it hung
    seconds: float  # from the death to the end of the last one
    phase: int
    done: int


def run(
    program: Program,
    folder: Path,
    *args: Any,
    ranks: int = 1,
    victim: int = 0,
    moment: int = NEVER,
    delay: float = 0.0,
) -> Ended:
    """Runs processes, and kills one of them ``delay`` seconds after it has done so much."""
    store = folder.parent / f"store.{uuid4()}"
    stages = [Stage(store) for _ in range(ranks)]
    processes = [
        CONTEXT.Process(target=program, args=(folder, stages[rank], rank, *args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    doomed, stage, end = processes[victim], stages[victim], time.monotonic() + LIMIT
    while doomed.is_alive() and (stage.phase == STARTING or stage.done < moment):
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.0002)
    doomed.join(delay)
    doomed.kill()
    died = time.monotonic()
    for process in processes:
        process.join(max(0, died + LIMIT - time.monotonic()))
    ended = Ended([p.exitcode for p in processes], time.monotonic() - died, stage.phase, stage.done)
    for process in processes:  # only if it hangs
        process.kill()
    return ended


def kill_while_learning(
    program: Program,
    folder: Path,
    *args: Any,
    ranks: int = 1,
    kills: int,
    seed: int,
    moment: Callable[[random.Random], int],
    longest: float,
    patience: float = LIMIT,
) -> list[int]:
    """Kills one process at a time, so often, and compares with processes that nobody killed.

    Args:
        program: learns two tasks, as far as they are not in its file ``mas`` yet.
        moment: chooses one.
        longest: the delay at most.
        patience: seconds that the others may take to notice.

    Returns:
        The phases in which one was killed.
    """
    chance, phases = random.Random(seed), []
    whole, parts = folder / "whole", folder / "parts"
    whole.mkdir()
    parts.mkdir()
    unhurt = [0] * ranks
    assert run(program, whole, *args, ranks=ranks).codes == unhurt
    expected = (whole / "mas").read_bytes()
    while len(phases) < kills:
        victim = chance.randrange(ranks)
        when = {"moment": moment(chance), "delay": chance.uniform(0, longest)}
        codes, seconds, phase, _ = run(program, parts, *args, ranks=ranks, victim=victim, **when)
        assert seconds < patience, "nobody waits for the dead longer than the timeout"
        assert codes[victim] in (0, -9), codes
        if codes[victim] == -9:
            phases.append(phase)
            others = codes[:victim] + codes[victim + 1 :]
            is_over = (parts / "mas").exists() and checkpoint.read(parts / "mas")["num_tasks"] == 2
            assert set(others) <= {1} or (is_over and set(others) <= {0, 1}), codes
        if codes == unhurt:
            assert (parts / "mas").read_bytes() == expected
            (parts / "mas").unlink()  # from the beginning
    assert run(program, parts, *args, ranks=ranks).codes == unhurt
    assert (parts / "mas").read_bytes() == expected
    assert os.listdir(parts) == ["mas"], "nothing piles up"
    return phases
