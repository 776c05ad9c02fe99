"""Processes that learn together, of which one is killed, and their parent."""

from __future__ import annotations

import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mas_ext import MAS
from tests.distributed.models import net, samples, sharded
from tests.support.killed import BETWEEN, CONTEXT, LIMIT, MEASURING, SAVING, Stage, await_moment
from tests.support.processes import leave

TIMEOUT = 30.0  # seconds that a process waits for another, which may share its core with three
TASKS, SAMPLES = 2, 24
WAYS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp": sharded,
}


def share(task: int, rank: int, size: int) -> list[torch.Tensor]:
    """The batches of a rank, of which the last one has the most."""
    x = samples(SAMPLES * size, seed=task)
    few = SAMPLES // 2
    own = x[few * rank : few * (rank + 1)] if rank < size - 1 else x[few * rank :]
    return list(own.split(2))


def learn(folder: Path, stage: Stage, rank: int, size: int, way: str, attempt: int) -> None:
    """One of the processes; it takes up what was saved before."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store.{attempt}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT),
        )
        _learn(folder, stage, rank, size, way)
        leave()
    except Exception:
        (folder / f"error.{attempt}.{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _learn(folder: Path, stage: Stage, rank: int, size: int, way: str) -> None:
    model = WAYS[way](net())
    mas = MAS(model)
    start = [p.detach().clone() for p in model.parameters()]
    if (folder / "mas").exists():
        mas.load(folder / "mas")
    for task in range(mas.num_tasks, TASKS):
        with torch.no_grad():
            for p, before in zip(model.parameters(), start, strict=True):
                p.copy_(before * (1 + 0.1 * task))

        def progress(done: int, before: int = task * SAMPLES) -> None:
            stage.done = before + done

        stage.phase = MEASURING
        mas.consolidate(
            share(task, rank, size),
            checkpoint=folder / "measuring",
            save_every=4,
            progress=progress,
        )
        stage.phase = SAVING
        if way == "fsdp" or rank == 0:
            mas.save(folder / "mas")
        dist.barrier()
        stage.phase = BETWEEN


def together(
    folder: Path, size: int, way: str, attempt: int, victim: int, moment: int, delay: float
) -> tuple[list[int], float, int]:
    """Runs them all, and kills one.

    Returns:
        Their exit codes, the seconds from its death to the end of the last one, and its phase.
    """
    stages = [Stage() for _ in range(size)]
    processes = [
        CONTEXT.Process(target=learn, args=(folder, stages[rank], rank, size, way, attempt))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    await_moment(processes[victim], stages[victim], moment)
    processes[victim].join(delay)
    processes[victim].kill()
    died = time.monotonic()
    for process in processes:
        process.join(max(0, died + LIMIT - time.monotonic()))
    took = time.monotonic() - died
    codes = [process.exitcode for process in processes]
    for process in processes:  # only if it hangs, which the codes then tell
        process.kill()
    return [99 if code is None else code for code in codes], took, stages[victim].phase
