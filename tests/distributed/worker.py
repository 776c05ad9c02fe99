"""One process of a program: python -m tests.distributed.worker PROGRAMS RANK RANKS FOLDER.

A program is a module of this folder, all of whose checks are run, or MODULE:CHECK.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.leaving import leave


@dataclass(frozen=True)
class World:
    """What a check is told."""

    rank: int
    size: int
    folder: Path


def main(programs: list[str], world: World) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{world.folder}/store",
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=300),
    )
    with open(world.folder / f"report.{world.rank}", "w", buffering=1) as report:
        for program in programs:
            program, _, only = program.partition(":")
            module = importlib.import_module(f"tests.distributed.{program}")
            for name in [name for name in vars(module) if name.startswith(only or "check_")]:
                if (check := getattr(module, name)).__module__ == module.__name__:
                    said = {"check": f"{program}.{name}", "problem": _problem(check, world)}
                    report.write(json.dumps(said) + "\n")
                    dist.barrier()  # what failed on one rank is not to disturb the next check
    leave()


def _problem(check: Callable[[World], None], world: World) -> str | None:
    torch.manual_seed(0)
    started = time.monotonic()
    try:
        check(world)
        return None
    except (Exception, pytest.fail.Exception):
        return traceback.format_exc()
    finally:
        print(
            f"{check.__module__}.{check.__name__}: {time.monotonic() - started:.1f} s", flush=True
        )


if __name__ == "__main__":
    names, own, size, directory = sys.argv[1:]
    main(names.split(","), World(int(own), int(size), Path(directory)))
