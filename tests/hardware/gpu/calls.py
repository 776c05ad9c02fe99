"""Every operator as a call that can be repeated from the same start, and verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import mas_ext
from tests import abs_matmul, cases, step_cases

Place = Callable[[str, Tensor], Tensor]  # puts a tensor of the list with this name on the device
Shapes = Sequence[tuple[int, ...]]

ABS_MATMUL = "accumulate_abs_matmul_"
OPS = [*cases.OPS, ABS_MATMUL]
KEPT = {f"{op}, Ω in {kept}": (op, kept) for op in cases.PENALTY_OPS for kept in cases.KEPT}
STEPS = {f"{r}, {m} step": (r, m) for r in step_cases.RULES for m in step_cases.MODES}
ALL = [*OPS, *KEPT, *STEPS]
SCALARS = ("lambda_reg", "grad_scale", "lr")
SHAPES = [(20_000,), (33, 7), (), (8192,)]


@dataclass
class Call:
    """An operator with its tensors, and its scalars as tensors whose values can be changed."""

    run: Callable[[], object]  # calls it and keeps what it returns
    assert_right: Callable[[], None]  # of the last run
    written: list[Tensor]
    start: list[Tensor]  # what `written` held at first
    scalars: dict[str, Tensor] = field(default_factory=dict)

    def set_scalars(self, factor: float) -> None:
        for scalar in self.scalars.values():
            scalar.mul_(factor)

    def restore(self) -> None:
        for mine, start in zip(self.written, self.start, strict=True):
            mine.copy_(start)


def make(
    name: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    scalar_dtype: torch.dtype = torch.float32,
    scalars_on: str = "device",  # or "cpu"
) -> Call:
    """An operator of ``ALL`` on lists of a few shapes."""
    where = device if scalars_on == "device" else "cpu"

    def place(_: str, tensor: Tensor) -> Tensor:
        return tensor.to(device, copy=True)

    if name == ABS_MATMUL:
        return of_product(abs_matmul.make(abs_matmul.Size(5, 17, 70, 90), dtype), device)
    if name in STEPS:
        rule, mode = STEPS[name]
        return of_step(step_cases.RULES[rule], mode, dtype, SHAPES, place, scalar_dtype, where)
    op, kept = KEPT.get(name, (name, None))
    return of_lists(op, dtype, SHAPES, place, scalar_dtype, where, kept)


def placed(lists: dict[str, list[Tensor]], place: Place) -> dict[str, list[Tensor]]:
    return {name: [place(name, t) for t in tensors] for name, tensors in lists.items()}


def of_lists(
    op: str,
    dtype: torch.dtype,
    shapes: Shapes,
    place: Place,
    scalar_dtype: torch.dtype,
    where: str,
    kept: str | None = None,
) -> Call:
    before = cases.make_state([dtype] * len(shapes), shapes, kept=kept)
    state = cases.State(**placed(before.lists(), place))
    scalars = cases.Scalars().as_tensors(scalar_dtype)
    scalars = cases.Scalars(*(t.to(where) for t in scalars[:3]), scale=scalars.scale)
    written = cases.written_argument(op)
    last: list[cases.Outcome] = []

    def run() -> None:
        last[:] = [cases.call(mas_ext.functional, op, state, scalars)]

    def assert_right() -> None:
        (outcome,) = last
        tensors = [t.cpu() for t in outcome.tensors]
        exact = cases.exact_tensors(op, before, scalars)
        for actual, wanted in zip(tensors, exact, strict=True):
            cases.assert_near(actual, wanted)
        if outcome.value is not None:
            now = cases.State(**before.lists())
            if op == "proximal_step_":
                now.params = tensors
            wanted_value = cases.exact_penalty(now, scalars.lambda_reg)
            cases.assert_value_near(outcome.value.cpu(), wanted_value, dtype=dtype)

    used = {n: s for n, s in scalars._asdict().items() if n in SCALARS and n in cases.ARGUMENTS[op]}
    pair = [(s.lists()[written] if written else []) for s in (state, before)]
    return Call(run, assert_right, *pair, used)


def of_product(before: abs_matmul.Problem, device: str) -> Call:
    problem = abs_matmul.Problem(*(t.to(device) for t in before))

    def assert_right() -> None:
        abs_matmul.assert_near(problem.omega.cpu(), wanted)

    wanted, start = abs_matmul.exact(before), [before.omega.clone()]
    return Call(lambda: abs_matmul.call(problem), assert_right, [problem.omega], start)


def of_step(
    rule: step_cases.Rule,
    mode: str,
    dtype: torch.dtype,
    shapes: Shapes,
    place: Place,
    scalar_dtype: torch.dtype,
    where: str,
    kept: str | None = None,
    found_inf: float = 0.0,
) -> Call:
    dtypes = [dtype] * len(shapes)
    before, problem = (
        step_cases.make_problem(rule, dtypes, list(shapes), kept=kept) for _ in range(2)
    )
    for name, tensors in problem.lists().items():
        tensors[:] = [place(name, t) for t in tensors]
    problem.steps = before.steps.to(problem.state.params[0].device)
    strengths = step_cases.Strengths(found_inf=found_inf).as_tensors(scalar_dtype)
    strengths = step_cases.Strengths(*(t.to(where) for t in strengths))
    last: list[Tensor] = []

    def run() -> None:
        last[:] = [step_cases.call(mas_ext.functional, problem, mode, strengths)]

    def assert_right() -> None:
        (value,) = last
        after = problem.cpu()
        if found_inf:
            assert all(map(torch.equal, after.written(), before.written()))
        else:
            step_cases.assert_right(before, after, value.cpu(), mode, strengths)

    used = {name: getattr(strengths, name) for name in SCALARS}
    return Call(run, assert_right, problem.written(), before.written(), used)
