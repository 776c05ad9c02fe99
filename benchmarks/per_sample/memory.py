"""The peak memory of one call, in a process of its own.

The allocator is told to give back at once what is freed, so that the mark is what was in use.
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

from benchmarks.per_sample import providers
from benchmarks.per_sample.providers import Prepare, Step
from benchmarks.per_sample.workloads import WORKLOADS, Batch
from benchmarks.tools.memory import is_available, peak_of, resident, settle

__all__ = ["PLAIN", "is_available", "used_by"]

PLAIN = "forward and backward"
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
}


def used_by(workload: str, provider: str, chunk: int) -> int | None:
    """Bytes at the peak of a steady call beyond model and batch; None where it fell over."""
    command = [sys.executable, "-m", "benchmarks.per_sample.memory"]
    done = subprocess.run(
        [*command, workload, provider, str(chunk)],
        env={**os.environ, **_ALLOCATOR},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def forward_and_backward(model: nn.Module, batch: Batch) -> Step:
    """No gradient of a weight: back to the first layer's output and no further."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        if not outputs and isinstance(output, Tensor) and output.requires_grad:
            outputs.append(output)

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(keep)

    def step() -> Mapping[str, Tensor]:
        outputs.clear()
        scalar = providers.objective(model, batch)
        torch.autograd.grad(scalar, outputs.pop())
        return {}

    return step


def _prepare(provider: str, chunk: int) -> Prepare:
    others = {
        PLAIN: forward_and_backward,
        providers.UNCHUNKED: partial(providers.vmapped, length=sys.maxsize),
    }
    return {**providers.providers(chunk), **others}[provider]


def measure(workload: str, provider: str, chunk: int) -> int:
    prepare, chosen = _prepare(provider, chunk), WORKLOADS[workload]
    model, batch = chosen.model(), chosen.batch()
    # What is loaded, compiled or cached once a process is in nobody's bill.
    prepare(chosen.model(), providers.take(batch, 0, 2))()
    settle()
    before = resident()
    step = prepare(model, batch)
    step()  # what it keeps for the next call is in the bill, what it needed to plan is not
    settle()
    return peak_of(step) - before


if __name__ == "__main__":
    name, provider, chunk = sys.argv[1:]
    print(json.dumps(measure(name, provider, int(chunk))))
