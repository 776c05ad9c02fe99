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

from tests import abs_matmul, cases, step_cases
from tests.hardware.gpu import calls
from tests.hardware.gpu.calls import Call, Place

# Around a vector, a warp, a block of threads and a chunk; and several of them in one list.
SHAPES: list[calls.Shapes] = [
    [(1,), (0,), (7,), (8,), (9,)],
    [(31,), (33,), (255,), (257,)],
    [(8191,), (8192,), (8193,)],
    [(16385,), (2, 3)],
]
KEPT_SHAPES: calls.Shapes = [(5,), (0,), (255,), (256,), (700,), (8193,)]
MANY: calls.Shapes = [(n % 5,) for n in range(1200)]  # tensors; more than one launch takes
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
    for dtype in cases.DTYPES.values():
        for op, shapes, ahead in product(cases.OPS, SHAPES, ("none", "all", "params", "omega")):
            yield of_lists(op, dtype, shapes, device, ahead)
        for rule, mode, shapes in product(step_cases.RULES, step_cases.MODES, SHAPES):
            yield from of_step(rule, mode, dtype, shapes, device)
        for size, layout in product(SIZES, LAYOUTS):
            yield calls.of_product(abs_matmul.make(size, dtype, layout), device)
        for kept in cases.KEPT if dtype != torch.float64 else ():
            for op, ahead in product(cases.PENALTY_OPS, ("none", "all", "omega")):
                yield of_lists(op, dtype, KEPT_SHAPES, device, ahead, kept)
            for rule in ("momentum", "adamw"):
                yield from of_step(rule, "gradient", dtype, KEPT_SHAPES, device, kept)
    yield of_lists("add_penalty_grad_", torch.float32, MANY, device, "none")
    yield from of_step("adamw", "gradient", torch.float32, MANY, device)


def place_on(device: str, ahead: str) -> Place:
    """Lists called ``ahead`` lie one element behind an aligned address; their memory ends there."""

    def place(name: str, tensor: Tensor) -> Tensor:
        elements = int(ahead in ("all", name))
        base = torch.cat([tensor.new_zeros(elements), tensor.reshape(-1)]).to(device)
        return base[elements:].view(tensor.shape)

    return place


def of_lists(
    op: str,
    dtype: torch.dtype,
    shapes: calls.Shapes,
    device: str,
    ahead: str,
    kept: str | None = None,
) -> Call:
    place = place_on(device, ahead)
    return calls.of_lists(op, dtype, shapes, place, torch.float32, device, kept)


def of_step(
    rule: str,
    mode: str,
    dtype: torch.dtype,
    shapes: calls.Shapes,
    device: str,
    kept: str | None = None,
) -> Iterator[Call]:
    """All aligned; θ an element ahead; and a step that is skipped."""
    for ahead, found in (("none", 0.0), ("params", 0.0), ("none", 1.0)):
        how = place_on(device, ahead), torch.float32, device, kept, found
        yield calls.of_step(step_cases.RULES[rule], mode, dtype, shapes, *how)


if __name__ == "__main__":
    main(*sys.argv[1:])
