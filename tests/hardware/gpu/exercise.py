"""A small program for compute-sanitizer: every operator, dtype and path of the kernels, few bytes.

``python -m tests.hardware.gpu.exercise DEVICE``. Tensors are made on the CPU and copied, so that it
launches next to nothing of torch's. Results are verified: a run that computes nothing is noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from tests.hardware.gpu.calls import Call
from tests.support import abs_matmul, operators
from tests.support.operators import OPS, PENALTY_OPS, STEPS, Scalars
from tests.support.tensors import DTYPES, KEPT, State

Shapes = list[tuple[int, ...]]

# Around a vector, a warp, a block of threads and a chunk; and several of them in one list.
SHAPES: list[Shapes] = [
    [(1,), (0,), (7,), (8,), (9,)],
    [(31,), (33,), (255,), (257,)],
    [(8191,), (8192,), (8193,)],
    [(16385,), (2, 3)],
]
KEPT_SHAPES: Shapes = [(5,), (0,), (255,), (256,), (700,), (8193,)]
KEPT_OPS = [*PENALTY_OPS, "momentum gradient", "adamw gradient"]
MANY: Shapes = [(n % 5,) for n in range(1200)]  # tensors; more than one launch takes
SIZES = [
    abs_matmul.Size(1, 1, 1, 1),
    abs_matmul.Size(3, 5, 65, 63),
    abs_matmul.Size(2, 17, 64, 64),
    abs_matmul.Size(20, 1, 70, 5),
]
LAYOUTS = ("contiguous", "positions_last", "transposed_omega")


def main(device: str) -> None:
    for call in every_call(device):
        call.run()
        call.assert_right()
    print("all results are right")


def every_call(device: str) -> Iterator[Call]:
    for dtype in DTYPES.values():
        for op, shapes in product([*OPS, *STEPS], SHAPES):
            yield from on_lists(op, dtype, shapes, device)
        for size, layout in product(SIZES, LAYOUTS):
            before = abs_matmul.make(size, dtype, layout)
            scalars = Scalars().as_tensors(torch.float32, device)
            yield Call("accumulate_abs_matmul_", before, before.copy(device), scalars)
        for op, kept in product(KEPT_OPS, KEPT if dtype != torch.float64 else ()):
            yield from on_lists(op, dtype, KEPT_SHAPES, device, kept)
    for op in ("add_penalty_grad_", "adamw gradient"):
        yield from on_lists(op, torch.float32, MANY, device)


def on_lists(
    op: str, dtype: torch.dtype, shapes: Shapes, device: str, kept: str | None = None
) -> Iterator[Call]:
    """All aligned, some lists an element ahead and, of an optimizer step, one that is skipped."""
    variants = [(ahead, 0.0) for ahead in ("none", "all", "params", "omega")]
    if op in STEPS:
        variants = [("none", 0.0), ("params", 0.0), ("none", 1.0)]
    for ahead, found_inf in variants:
        before = operators.make(op, [dtype] * len(shapes), shapes, kept=kept)
        scalars = Scalars(found_inf=found_inf).as_tensors(torch.float32, device)
        yield Call(op, before, placed(before, device, ahead), scalars)


def placed(state: State, device: str, ahead: str) -> State:
    """Lists called ``ahead`` lie one element behind an aligned address; their memory ends there."""

    def place(name: str, tensor: Tensor) -> Tensor:
        elements = int(ahead in ("all", name))
        base = torch.cat([tensor.new_zeros(elements), tensor.reshape(-1)]).to(device, copy=True)
        return base[elements:].view(tensor.shape)

    return State(**{name: [place(name, t) for t in ts] for name, ts in vars(state).items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
