"""The error of Ω that is kept in few bytes, after many tasks: ``python -m benchmarks.merging``.

Prints the table of ``docs/low_precision.md``: streams of tasks are merged in the state's dtype
and in float64. Ω spans the orders of magnitude that it spans within a layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from mas_ext._state.importance_state import ImportanceState
from mas_ext._state.task_accumulator import TaskAccumulator
from mas_ext.precision import BLOCK

TASKS = (1, 10, 100, 1_000, 10_000)
ELEMENTS = (64, BLOCK)
# (part of the stream that is over, numbers that are uniform in [0, 1)) → the factor of Ω.
STREAMS: dict[str, Callable[[float, Tensor], Tensor | float]] = {
    "the same Ω again": lambda part, uniform: 1.0,
    "three times as large from the middle on": lambda part, uniform: 1.0 if part < 0.5 else 3.0,
    "another Ω in every task": lambda part, uniform: -(1 - uniform).log(),
}


def errors(
    state_dtype: str, merge: str | tuple[str, float], stream: str, tasks: int
) -> tuple[float, float, float]:
    """The error of ΣΩ, the worst of single Ω, and the worst of those from 1 % of the largest on."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(ELEMENTS, generator=generator).mul(1.5).exp()
    kept, exact = ImportanceState(state_dtype), ImportanceState()
    for task in range(tasks):
        factor = STREAMS[stream](task / tasks, torch.rand(ELEMENTS, generator=generator))
        for state, dtype in ((kept, torch.float32), (exact, torch.float64)):
            omega = (base * factor).to(dtype)
            state.end_task(
                {"w": torch.zeros_like(omega)}, TaskAccumulator({"w": omega}, {"w": 1}), merge
            )
    found, right = kept.importance["w"].double(), exact.importance["w"]
    relative = (found - right).abs() / right
    large = right > 0.01 * right.amax(1, keepdim=True)
    total = float(found.sum() / right.sum()) - 1
    return total, float(relative.max()), float(relative[large].max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="*", default=TASKS)
    tasks = parser.parse_args().tasks
    print("| `state_dtype=` | merge | tasks | error of ΣΩ | worst Ω | worst large Ω |")
    print("|---|---|---|---|---|---|")
    for state_dtype in ("bfloat16", "uint8"):
        for merge in ("sum", ("ema", 0.999)):
            for count in tasks:
                found = [errors(state_dtype, merge, stream, count) for stream in STREAMS]
                worst = [max(abs(one[i]) for one in found) for i in range(3)]
                cells = " | ".join(f"{value:.2%}" for value in worst)
                name = merge if isinstance(merge, str) else f"{merge[0]}, {merge[1]}"
                print(f"| `{state_dtype}` | {name} | {count:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
