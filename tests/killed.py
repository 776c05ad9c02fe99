"""Programs that are killed at any moment, and the parent that does it.

Processes are forked from a server that has imported everything and computed nothing, so one costs
milliseconds; they compute with one thread, as a fork and OpenMP's threads do not go together.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from ctypes import c_int64
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mas_ext import MAS
from tests.models import vectors

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.deaths", "pytest", "safetensors.torch"])
LIMIT = 180.0  # seconds until a process is taken for hung
Program = Callable[..., None]


# -- the programs --------------------------------------------------------------------------------

STARTING, MEASURING, SAVING, BETWEEN = range(4)
SAMPLES, TASKS = 128, 2


class Stage:
    """What a program is at, for its parent to see."""

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
        """Samples, or files."""
        return self._shared[1]

    @done.setter
    def done(self, value: int) -> None:
        self._shared[1] = value


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 4))


def task_data(task: int) -> DataLoader:
    """Shuffled, by random numbers of which a restarted process has to draw the same."""
    return DataLoader(TensorDataset(vectors(SAMPLES, torch.float32) + task), 4, shuffle=True)


def move(model: nn.Module, task: int) -> None:
    """What training would do."""
    torch.manual_seed(task)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))


HOW: dict[str, dict[str, Any]] = {
    "per_sample": {},
    "batch": {"estimator": "batch", "weighting": "batches", "training": True},  # dropout
}


def learn(folder: Path, stage: Stage, how: str, kept: bool = True) -> None:
    """Learns the tasks that its file does not have yet."""
    torch.set_num_threads(1)
    model = network()
    mas = MAS(model)
    if (folder / "mas").exists():
        mas.load(folder / "mas")
    for task in range(mas.num_tasks, TASKS):
        move(model, task)
        if (folder / "measuring").exists():
            torch.manual_seed(os.getpid())  # whoever restarts has other random numbers

        def progress(done: int, task: int = task) -> None:
            stage.done = task * SAMPLES + done

        stage.phase = MEASURING
        keep = {"checkpoint": folder / "measuring", "save_every": 8} if kept else {}
        mas.consolidate(task_data(task), progress=progress, **HOW[how], **keep)
        stage.phase = SAVING
        mas.save(folder / "mas")
        stage.phase = BETWEEN


def states() -> list[MAS]:
    """Two states of one model, a file of either taking some milliseconds."""
    both = []
    for task in range(2):
        model = nn.Linear(512, 512)
        move(model, task)
        both.append(MAS(model))
        both[-1].consolidate([torch.ones(1, 512)], estimator="batch")
    return both


def save(folder: Path, stage: Stage) -> None:
    """Saves the two in turn, for ever."""
    torch.set_num_threads(1)
    both = states()
    stage.phase = SAVING
    while True:
        both[stage.done % 2].save(folder / "mas")
        stage.done += 1


# -- their parent --------------------------------------------------------------------------------


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
