"""The peak memory of one call, measured in a process of its own.

The allocator is told to return freed memory at once, so that the high-water mark only contains what
was in use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import peak_of, resident_bytes, return_free_memory
from benchmarks.models import WORKLOADS, Batch
from benchmarks.per_sample.providers import MAS, UNCHUNKED, Step, providers, take, vmapped

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


def forward_and_backward(model: nn.Module, batch: Batch) -> Step:
    """A backward pass to the first layer's output, without gradients of weights."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        if not outputs and isinstance(output, Tensor) and output.requires_grad:
            outputs.append(output)

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(keep)

    def step() -> Mapping[str, Tensor]:
        outputs.clear()
        scalar = MAS.of(model, batch)
        torch.autograd.grad(scalar, outputs.pop())
        return {}

    return step


def measure(workload: str, provider: str, chunk: int) -> int:
    others = {PLAIN: forward_and_backward, UNCHUNKED: partial(vmapped, length=sys.maxsize)}
    prepare, chosen = {**providers(chunk), **others}[provider], WORKLOADS[workload]
    model, batch = chosen.model(), chosen.batch()
    # What is loaded, compiled or cached once per process counts for nobody.
    prepare(chosen.model(), take(batch, 0, 2))()
    return_free_memory()
    before = resident_bytes()
    step = prepare(model, batch)
    step()  # what it caches for the next call counts; what it needed only to plan does not
    return_free_memory()
    return peak_of(step) - before


if __name__ == "__main__":
    name, provider, chunk = sys.argv[1:]
    print(json.dumps(measure(name, provider, int(chunk))))
