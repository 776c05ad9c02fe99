"""Processes that run checks together: what starts them, and what each of them does.

A program is a module of ``tests/distributed/``; its checks are its functions ``check_…(world)``.
Starting processes takes longer than what they check, so one start runs many programs. A process
is ``python -m tests.support.processes PROGRAMS RANK RANKS FOLDER``.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
}
STARTING = 300.0  # seconds until the first check is done: mostly imports, on a machine that is busy


@dataclass(frozen=True)
class World:
    """What a check is told."""

    rank: int
    size: int
    folder: Path


# -- What starts them ------------------------------------------------------------------------------
def run(
    programs: list[str], ranks: int, folder: Path, silence: float = 300
) -> dict[str, list[str]]:
    """Runs programs one after the other, in so many processes.

    Args:
        programs: their names, or ``PROGRAM:CHECK``.
        ranks: how many processes.
        folder: theirs; each writes a line for every check into a file of its own.
        silence: seconds without a new line after which they are taken for hung, and ended.

    Returns:
        Check → what went wrong in it, a line for each rank; empty where all went well.
    """
    processes = []
    for rank in range(ranks):
        command = [sys.executable, "-m", "tests.support.processes", ",".join(programs)]
        command += [str(rank), str(ranks), str(folder)]
        with open(folder / f"output.{rank}", "w") as output:
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
                )
            )
    try:
        _wait(processes, folder, silence)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return _found(folder, [process.returncode for process in processes])


def assert_all_is_well(programs: list[str], ranks: int, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    found = run(programs, ranks, folder)
    wrong = {check: problems for check, problems in found.items() if problems}
    report = [f"{check}\n{text}" for check, problems in wrong.items() for text in problems]
    assert not wrong, "\n".join(report)
    for program in programs:
        assert any(check.startswith(program.replace(":", ".")) for check in found), program


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, silence: float) -> None:
    """Until all have ended, one has failed, or nothing has been heard of them for too long."""
    heard, deadline = 0, time.monotonic() + STARTING
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes) or any(codes):
            break
        said = sum(report.stat().st_size for report in folder.glob("report.*"))
        if said > heard:
            heard, deadline = said, time.monotonic() + silence
        time.sleep(0.05)


def _found(folder: Path, codes: list[int]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for rank, code in enumerate(codes):
        file = folder / f"report.{rank}"
        lines = file.read_text().splitlines() if file.exists() else []
        reports = [json.loads(line) for line in lines]
        for report in reports:
            found.setdefault(report["check"], [])
            if report["problem"]:
                found[report["check"]].append(f"rank {rank}: {report['problem']}")
        if code != 0:
            tail = (folder / f"output.{rank}").read_text()[-2000:]
            last = reports[-1]["check"] if reports else "none"
            found[f"rank {rank} ended with {code} after {last}"] = [tail]
    return found


# -- What each of them does ------------------------------------------------------------------------
def checks(program: str) -> Iterator[Callable[[World], None]]:
    program, _, only = program.partition(":")
    module = importlib.import_module(f"tests.distributed.{program}")
    for name, check in list(vars(module).items()):
        if name.startswith(only or "check_") and check.__module__ == module.__name__:
            yield check


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
            for check in checks(program):
                name = f"{program.partition(':')[0]}.{check.__name__}"
                report.write(json.dumps({"check": name, "problem": _problem(check, world)}) + "\n")
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
        print(f"{check.__qualname__}: {time.monotonic() - started:.1f} s", flush=True)


def leave() -> None:
    """Leaves the group, when gloo's threads have let go of their last tensors.

    They need the GIL for it. Asked for when Python is already leaving, it aborts the process
    (pytorch/pytorch#190489); a group that a device mesh knows keeps its threads until then.
    """
    time.sleep(0.5)
    dist.destroy_process_group()


if __name__ == "__main__":
    names, own, size, directory = sys.argv[1:]
    # Under its own name, which is that of the programs' ``World``.
    this = importlib.import_module("tests.support.processes")
    this.main(names.split(","), this.World(int(own), int(size), Path(directory)))
