"""Every operator as a call that can be made again from the same start, and judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import mas_ext
from tests import abs_matmul, cases, step_cases

ABS_MATMUL = "accumulate_abs_matmul_"
KEPT = {f"{op}, Ω in {kept}": (op, kept) for op in cases.PENALTY_OPS for kept in cases.KEPT}
OPS = [*cases.OPS, ABS_MATMUL]
STEPS = [f"{rule}, {mode} step" for rule in step_cases.RULES for mode in step_cases.MODES]
SCALARS = ("lambda_reg", "grad_scale", "lr")
SHAPES = [(20_000,), (33, 7), (), (8192,)]


@dataclass
class Call:
    """An operator with its tensors, and its scalars as tensors that can be given other values."""

    op: str
    run: Callable[[], object]  # calls it and keeps what it returns
    assert_right: Callable[[], None]  # of the last run
    restore: Callable[[], None]  # what it writes, to what it was at the start
    scalars: dict[str, Tensor] = field(default_factory=dict)

    def set_scalars(self, factor: float) -> None:
        for scalar in self.scalars.values():
            scalar.mul_(factor)


def make(op: str, device: str, dtype: torch.dtype, scalar_dtype: torch.dtype, where: str) -> Call:
    """``where`` the scalars are: ``cpu`` or ``device``."""
    if op == ABS_MATMUL:
        return make_abs_matmul(device, dtype)
    if op in STEPS:
        return make_step(op, device, dtype, scalar_dtype, where)
    op, kept = KEPT.get(op, (op, None))
    dtypes = [dtype] * len(SHAPES)
    state = cases.make_state(dtypes, SHAPES, device=device, kept=kept)
    before = cases.make_state(dtypes, SHAPES, kept=kept)
    scalars = cases.Scalars().as_tensors(scalar_dtype)
    if where == "device":
        scalars = cases.Scalars(*(t.to(device) for t in scalars[:3]), scale=scalars.scale)
    last: list[cases.Outcome] = []

    def run() -> None:
        last[:] = [cases.call(mas_ext.functional, op, state, scalars)]

    def assert_right() -> None:
        (outcome,) = last
        for actual, exact in zip(
            outcome.tensors, cases.exact_tensors(op, before, scalars), strict=True
        ):
            cases.assert_near(actual.cpu(), exact)
        if outcome.value is not None:
            now = cases.State(**before.lists())
            if op == "proximal_step_":
                now.params = [t.cpu() for t in outcome.tensors]
            exact = cases.exact_penalty(now, scalars.lambda_reg)
            cases.assert_value_near(outcome.value.cpu(), exact, dtype=dtype)

    def restore() -> None:
        written = cases.written_argument(op)
        for mine, start in zip(
            state.lists()[written] if written else [],
            before.lists()[written] if written else [],
            strict=True,
        ):
            mine.copy_(start)

    used = {n: s for n, s in scalars._asdict().items() if n in SCALARS and n in cases.ARGUMENTS[op]}
    return Call(op, run, assert_right, restore, used)


def make_abs_matmul(device: str, dtype: torch.dtype) -> Call:
    size = abs_matmul.Size(5, 17, 70, 90)
    problem = abs_matmul.make(size, dtype, device=device)
    before = abs_matmul.make(size, dtype)

    def assert_right() -> None:
        abs_matmul.assert_near(problem.omega.cpu(), abs_matmul.exact(before))

    return Call(
        ABS_MATMUL,
        lambda: abs_matmul.call(problem),
        assert_right,
        lambda: problem.omega.copy_(before.omega),  # type: ignore[arg-type,return-value]
    )


def make_step(
    op: str, device: str, dtype: torch.dtype, scalar_dtype: torch.dtype, where: str
) -> Call:
    rule, mode = op.removesuffix(" step").split(", ")

    def fresh(on: str) -> step_cases.Problem:
        dtypes = [dtype] * len(SHAPES)
        return step_cases.make_problem(step_cases.RULES[rule], dtypes, SHAPES, device=on)

    problem, before = fresh(device), fresh("cpu")
    strengths = step_cases.Strengths(found_inf=0.0).as_tensors(scalar_dtype)
    if where == "device":
        strengths = step_cases.Strengths(*(t.to(device) for t in strengths))
    last: list[Tensor] = []

    def run() -> None:
        last[:] = [step_cases.call(mas_ext.functional, problem, mode, strengths)]

    def assert_right() -> None:
        (value,) = last
        step_cases.assert_right(before, problem.cpu(), value.cpu(), mode, strengths)

    def restore() -> None:
        for mine, start in zip(problem.written(), before.written(), strict=True):
            mine.copy_(start)

    used = {name: getattr(strengths, name) for name in SCALARS}
    return Call(op, run, assert_right, restore, used)
