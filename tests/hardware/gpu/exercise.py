"""A small program for compute-sanitizer: every operator, dtype and path of the kernels, few bytes.

``python -m tests.hardware.gpu.exercise DEVICE``. It launches next to nothing of torch's: tensors are made on
the CPU and copied. Its results are judged, so that a run that computes nothing is noticed.
"""

from __future__ import annotations

import sys

import torch

import mas_ext
from tests import abs_matmul, cases, step_cases

# Around a vector, a warp, a block of threads and a chunk; and several of them in one list.
SHAPES: list[list[tuple[int, ...]]] = [
    [(1,), (0,), (7,), (8,), (9,)],
    [(31,), (33,), (255,), (257,)],
    [(8191,), (8192,), (8193,)],
    [(16385,), (2, 3)],
]
KEPT_SHAPES: list[tuple[int, ...]] = [(5,), (0,), (255,), (256,), (700,), (8193,)]
ALONE = ("none", "all", "params", "omega")  # which lists are not aligned to a vector
SIZES = [
    abs_matmul.Size(1, 1, 1, 1),
    abs_matmul.Size(3, 5, 65, 63),
    abs_matmul.Size(2, 17, 64, 64),
    abs_matmul.Size(20, 1, 70, 5),
]


def main(device: str) -> None:
    for dtype in cases.DTYPES.values():
        for op in cases.OPS:
            for shapes in SHAPES:
                for unaligned in ALONE:
                    exercise(op, dtype, shapes, unaligned, device)
        exercise_kept(dtype, device)
        for rule in step_cases.RULES.values():
            for mode in step_cases.MODES:
                for shapes in SHAPES:
                    exercise_step(rule, mode, dtype, shapes, device)
        for size in SIZES:
            for layout in ("contiguous", "positions_last", "transposed_omega"):
                exercise_abs_matmul(size, dtype, layout, device)
    exercise_many_tensors(device)
    print("all results are right")


def behind_on(device: str, tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """On the device, so many elements behind the start of memory that ends with the tensor."""
    base = torch.cat([tensor.new_zeros(elements), tensor.reshape(-1)]).to(device)
    return base[elements:].view(tensor.shape)


def exercise(
    op: str,
    dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    unaligned: str,
    device: str,
    kept: str | None = None,
) -> None:
    before = cases.make_state([dtype] * len(shapes), shapes, kept=kept)
    lists = {
        name: [behind_on(device, t, int(unaligned in ("all", name))) for t in tensors]
        for name, tensors in before.lists().items()
    }
    judge(op, before, cases.State(**lists), device)


def exercise_kept(dtype: torch.dtype, device: str) -> None:
    """An Ω of fewer bytes; unaligned, vectors end in the next block of codes."""
    if dtype == torch.float64:
        return
    for kept in cases.KEPT:
        for op in cases.PENALTY_OPS:
            for unaligned in ("none", "all", "omega"):
                exercise(op, dtype, KEPT_SHAPES, unaligned, device, kept)
        for rule in ("momentum", "adamw"):
            exercise_step(step_cases.RULES[rule], "gradient", dtype, KEPT_SHAPES, device, kept)


def judge(op: str, before: cases.State, state: cases.State, device: str) -> None:
    scalars = cases.Scalars().as_tensors(torch.float32)
    scalars = cases.Scalars(*(t.to(device) for t in scalars[:3]), scale=scalars.scale)
    outcome = cases.call(mas_ext.functional, op, state, scalars)
    expected = cases.exact_tensors(op, before, scalars)
    for actual, exact in zip(outcome.tensors, expected, strict=True):
        cases.assert_near(actual.cpu(), exact)
    if outcome.value is not None and op != "proximal_step_":
        exact_value = cases.exact_penalty(before, scalars.lambda_reg)
        cases.assert_value_near(outcome.value.cpu(), exact_value, dtype=before.params[0].dtype)


def exercise_many_tensors(device: str) -> None:
    """More than one launch holds."""
    shapes = [(n % 5,) for n in range(1200)]
    before = cases.make_state([torch.float32] * len(shapes), shapes)
    flat = {n: torch.cat([t.reshape(-1) for t in ts]) for n, ts in before.lists().items()}
    lists = {n: list(t.to(device).split([s[0] for s in shapes])) for n, t in flat.items()}
    judge("add_penalty_grad_", before, cases.State(**lists), device)
    exercise_step(step_cases.RULES["adamw"], "gradient", torch.float32, shapes, device)


def exercise_step(
    rule: step_cases.Rule,
    mode: str,
    dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    device: str,
    kept: str | None = None,
) -> None:
    """Aligned to a vector; with θ, which is written, an element behind; and a step skipped."""
    dtypes = [dtype] * len(shapes)
    for elements, found in ((0, 0.0), (1, 0.0), (0, 1.0)):
        before = step_cases.make_problem(rule, dtypes, shapes, kept=kept)
        moved = step_cases.make_problem(rule, dtypes, shapes, kept=kept)
        moved.steps = before.steps.to(device)
        for name, tensors in moved.lists().items():
            distance = elements if name == "params" else 0
            tensors[:] = [behind_on(device, t, distance) for t in tensors]
        strengths = step_cases.Strengths(found_inf=found).as_tensors(torch.float32)
        strengths = step_cases.Strengths(*(t.to(device) for t in strengths))
        value = step_cases.call(mas_ext.functional, moved, mode, strengths)
        if found:
            assert all(map(torch.equal, moved.cpu().written(), before.written()))
        else:
            step_cases.assert_right(before, moved.cpu(), value.cpu(), mode, strengths)


def exercise_abs_matmul(
    size: abs_matmul.Size, dtype: torch.dtype, layout: str, device: str
) -> None:
    problem = abs_matmul.make(size, dtype, layout)
    wanted = abs_matmul.exact(problem)
    moved = abs_matmul.Problem(*(t.to(device) for t in problem))
    abs_matmul.assert_near(abs_matmul.call(moved).cpu(), wanted, str(size))


if __name__ == "__main__":
    main(*sys.argv[1:])
