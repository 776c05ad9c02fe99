"""``python -m benchmarks.predict.host``: what a call costs the host, measured with next to no work.

Tensors of one element, on the CPU: arguments, checks and PyTorch's dispatch are the same in front
of a CUDA kernel; ``model.HOSTS`` has the figures, and adds what a launch costs.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from benchmarks.predict import ways
from benchmarks.predict.traffic import JOBS

TENSORS, ROUNDS = 500, 30


def best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls: what the code takes when nothing disturbs it."""
    call()
    times = []
    for _ in range(ROUNDS):
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    one, many = ways.make([1], "float32"), ways.make([1] * TENSORS, "float32")
    print(f"{'µs':40}{'a call':>10}{'a tensor':>10}{'a kernel':>10}")
    for job, way in ways.STEPS:
        step = ways.step(job, way, "float32")
        single, several = best(lambda step=step: step(one)), best(lambda step=step: step(many))
        tensor = (several - single) / (TENSORS - 1)
        kernels = sum(len(phase) for phase in JOBS[job][way].phases)
        row = (single * 1e6, tensor * 1e6, tensor / kernels * 1e6)
        print(f"{job + ', ' + way:40}" + "".join(f"{value:10.2f}" for value in row))


if __name__ == "__main__":
    main()
