"""Starts the processes of a program, and tells what its checks found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(
    programs: list[str], ranks: int, folder: Path, timeout: float = 300
) -> dict[str, list[str]]:
    """Runs ``tests/distributed/PROGRAM.py``, one after the other, in so many processes.

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
        _wait(processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return _found(folder, [process.returncode for process in processes])


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Until all have ended, one has failed, or it took too long."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes) or any(codes):
            break
        time.sleep(0.05)


def _found(folder: Path, codes: list[int]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for rank, code in enumerate(codes):
        lines = (folder / f"report.{rank}").read_text().splitlines()
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
