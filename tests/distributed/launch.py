"""Starts the processes of a program, and tells what its checks found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


STARTING = 300.0  # seconds until the first check is done: mostly imports, on a machine that is busy


def run(
    programs: list[str], ranks: int, folder: Path, silence: float = 300
) -> dict[str, list[str]]:
    """Runs ``tests/distributed/PROGRAM.py``, one after the other, in so many processes.

    Args:
        programs: their names, or ``PROGRAM:CHECK``.
        ranks: how many processes.
        folder: theirs; each writes a line for every check into a file of its own.
        silence: seconds without a new line after which they are taken for hung, and ended.

    Returns:
        Check → what went wrong in it, a line a rank; empty where all went well.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    processes = []
    for rank in range(ranks):
        command = [sys.executable, "-m", "tests.distributed.worker", ",".join(programs)]
        command += [str(rank), str(ranks), str(folder)]
        with open(folder / f"output.{rank}", "w") as output:
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            )
    try:
        _wait(processes, folder, silence)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return _found(folder, [process.returncode for process in processes])


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
