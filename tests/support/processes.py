"""Processes that run checks together.

A program is a module of ``tests/distributed/``; its checks are its functions ``check_…(world)``.
Starting processes takes longer than what they check, so one start runs many programs.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = timedelta(seconds=300)  # after which a rank that waits for another raises


@dataclass(frozen=True)
class World:
    """What a check is told."""

    rank: int
    size: int
    folder: Path


def run(programs: list[str], ranks: int, folder: Path) -> None:
    """Runs programs, or ``PROGRAM:CHECK``; raises the first error of any process, and ends all."""
    folder.mkdir(exist_ok=True)
    mp.start_processes(_main, (programs, ranks, folder), ranks, start_method="forkserver")


def checks(program: str) -> list[Callable[[World], None]]:
    program, _, only = program.partition(":")
    module = importlib.import_module(f"tests.distributed.{program}")
    found = [
        check
        for name, check in vars(module).items()
        if name.startswith(only or "check_") and check.__module__ == module.__name__
    ]
    assert found, program
    return found


def _main(rank: int, programs: list[str], ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=ranks, timeout=PATIENCE
    )
    for program in programs:
        for check in checks(program):
            torch.manual_seed(0)
            check(World(rank, ranks, folder))
            dist.barrier()
    leave()


def leave() -> None:
    """Leaves the group, when gloo's threads have let go of their last tensors.

    They need the GIL for it. Asked for when Python is already leaving, it aborts the process
    (pytorch/pytorch#190489); a group that a device mesh knows keeps its threads until then.
    """
    time.sleep(0.5)
    dist.destroy_process_group()
