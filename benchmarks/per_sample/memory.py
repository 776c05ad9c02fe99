"""The peak memory of one call, measured in a process of its own.

The allocator is told to return freed memory at once, so that the high-water mark only contains what
was in use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

from benchmarks.measure import peak_of, resident_bytes, return_free_memory
from benchmarks.models import WORKLOADS
from benchmarks.per_sample.floor import backward_alone
from benchmarks.per_sample.providers import UNCHUNKED, providers, take, vmapped

PLAIN = "forward and backward"
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
}


def used_by(workload: str, provider: str, chunk: int) -> int | None:
    """Bytes at the peak of a call beyond model and batch; None if the process failed."""
    command = [sys.executable, "-m", "benchmarks.per_sample.memory"]
    done = subprocess.run(
        [*command, workload, provider, str(chunk)],
        env={**os.environ, **_ALLOCATOR},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def measure(workload: str, provider: str, chunk: int) -> int:
    others = {PLAIN: backward_alone, UNCHUNKED: partial(vmapped, length=sys.maxsize)}
    prepare, chosen = {**providers(chunk), **others}[provider], WORKLOADS[workload]
    model, batch = chosen.model(), chosen.batch()
    # What is loaded, compiled or cached once per process counts for nobody.
    prepare(chosen.model(), [take(batch, 0, 2)])()
    return_free_memory()
    before = resident_bytes()
    step = prepare(model, [batch])
    step()  # what it caches for the next call counts; what it needed only to plan does not
    return_free_memory()
    return peak_of(step) - before


if __name__ == "__main__":
    name, provider, chunk = sys.argv[1:]
    print(json.dumps(measure(name, provider, int(chunk))))
