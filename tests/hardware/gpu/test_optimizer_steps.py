"""The optimizer steps on a GPU, judged on the CPU: with test_cuda.py, `equivalence` of `make gpu`.

Collected as that is, and on ``cpu`` a rehearsal as well.
"""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

import mas_ext
from tests import cases
from tests.cases import State
from tests.gpu import checks
from tests.step_cases import (
    MODES,
    RULES,
    Problem,
    Rule,
    Strengths,
    assert_right,
    call,
    from_case,
    make_problem,
)
from tests.test_cuda import DEVICE, REHEARSAL, VECTOR, behind_a_long_kernel, needs_gpu

each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_mode = pytest.mark.parametrize("mode", MODES)
each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
# test_cuda.py has every layout; a step has more lists, which lie differently in the second.
LAYOUTS = ("contiguous", "each_differently")
CASES = [case for case in cases.CASES if case.layout_name in LAYOUTS]


def copy_of(problem: Problem) -> Problem:
    """On the CPU, whatever becomes of the problem."""
    copy = problem.cpu()
    lists = {name: [t.clone() for t in ts] for name, ts in copy.lists().items()}
    state = State(**{field.name: lists.get(field.name, []) for field in fields(State)})
    return Problem(copy.rule, state, {name: lists[name] for name in copy.moments}, copy.steps)


def check(problem: Problem, mode: str, strengths: Strengths | None = None) -> Tensor:
    """Takes a step on the device and judges all that came of it in float64."""
    strengths = strengths or Strengths()
    before = copy_of(problem)
    value = call(mas_ext.functional, problem, mode, strengths)
    assert_right(before, problem.cpu(), value.cpu(), mode, strengths)
    return value


# ================================================================================================
# Lists
# ================================================================================================
@each_rule
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_against_the_oracle(rule: Rule, case: cases.Case) -> None:
    for mode in MODES:
        check(from_case(rule, case, DEVICE), mode)


@each_rule
@each_dtype
def test_step_of_views_at_every_distance_from_a_vector_boundary(
    rule: Rule, dtype: torch.dtype
) -> None:
    for elements in range(1, VECTOR // dtype.itemsize):
        for shifted in ("all", *rule.lists):
            problem = make_problem(rule, [dtype] * 2, [(8193,), (37,)], device=DEVICE)
            for name, tensors in problem.lists().items():
                if shifted in ("all", name):
                    tensors[:] = [cases.behind(t, elements) for t in tensors]
            check(problem, "gradient")


@each_rule
@each_mode
def test_step_of_mixed_dtypes_in_one_list(rule: Rule, mode: str) -> None:
    dtypes = [*cases.DTYPES.values()] * 3
    shapes = [(8193,), (5, 7), (), (0,), (17,), (128, 65), (1,), (3,), (33,), (16384,), (2,), (9,)]
    check(make_problem(rule, dtypes, shapes, device=DEVICE), mode)


@each_rule
@each_mode
def test_step_of_more_tensors_than_one_launch_holds(rule: Rule, mode: str) -> None:
    """Each at another step, empty ones counted."""
    shapes = [(n % 97,) for n in range(3000)]
    dtypes = [torch.bfloat16 if n % 7 == 0 else torch.float32 for n in range(3000)]
    check(make_problem(rule, dtypes, shapes, device=DEVICE), mode)


@each_rule
@each_mode
def test_step_gives_the_same_bits_from_run_to_run(rule: Rule, mode: str) -> None:
    runs = []
    for _ in range(3):
        shapes = [(1000, 1000), (17,), (16385,)]
        problem = make_problem(rule, [torch.float32] * 3, shapes, device=DEVICE)
        value = call(mas_ext.functional, problem, mode)
        runs.append([value, *problem.written()])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


# ================================================================================================
# Scalars, streams, devices
# ================================================================================================
@each_rule
@each_mode
@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_step_with_scalars_as_tensors(rule: Rule, mode: str, kind: torch.dtype, where: str) -> None:
    strengths = Strengths(found_inf=0.0).as_tensors(kind)
    if where == "device":
        strengths = Strengths(*(t.to(DEVICE) for t in strengths))
    for dtype in cases.DTYPES.values():
        problem = make_problem(rule, [dtype] * 2, [(9000,), (5,)], device=DEVICE)
        problem.steps = problem.steps.to(kind)
        check(problem, mode, strengths)


@each_rule
@each_mode
@each_dtype
def test_a_skipped_step_keeps_every_bit(rule: Rule, mode: str, dtype: torch.dtype) -> None:
    for found in (1.0, torch.tensor(2.0, device=DEVICE)):
        problem = make_problem(rule, [dtype] * 3, [(9000,), (0,), (5,)], device=DEVICE)
        for grad in problem.state.grads:
            grad.fill_(math.nan)
        before = copy_of(problem)
        value = call(mas_ext.functional, problem, mode, Strengths(found_inf=found))
        for now, old in zip(problem.written(), before.written(), strict=True):
            assert torch.equal(now.cpu(), old)
        exact = cases.exact_penalty(before.state, Strengths().lambda_reg)
        cases.assert_value_near(value.cpu(), exact, dtype=value.dtype)


@each_rule
@each_mode
def test_step_on_a_stream_that_is_not_the_default(rule: Rule, mode: str) -> None:
    shapes = [(100_000,), (3,)]
    before = make_problem(rule, [torch.float32] * 2, shapes)
    problem = make_problem(rule, [torch.float32] * 2, shapes, device=DEVICE)
    written = [(t if REHEARSAL else t.pin_memory()) for t in before.written()]
    for tensor in problem.written():
        tensor.zero_()
    with behind_a_long_kernel():
        for target, source in zip(problem.written(), written, strict=True):
            target.copy_(source, non_blocking=True)
        value = call(mas_ext.functional, problem, mode)
    assert_right(before, problem.cpu(), value.cpu(), mode, Strengths())


@needs_gpu
@each_rule
def test_step_on_a_device_that_is_not_the_current(rule: Rule) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{checks.NOT_HERE}: one GPU, and this needs two")
    problem = make_problem(rule, [torch.float32] * 2, [(20_000,), (3,)], device="cuda:1")
    assert check(problem, "gradient").device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0


# ================================================================================================
# mas_ext.optim
# ================================================================================================
RATE, SCALE = 1e-2, 2.0**10
OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"weight_decay": 0.1},
    "AdamW": {},
}


def trained(name: str, mode: str, device: str, scaled: bool = False) -> list[Tensor]:
    """Penalty and parameters after three steps of a model that has moved away from its anchors.

    ``scaled``: under a loss scaler, with one more step that overflows and is skipped.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 4)).to(device)
    data = torch.randn(16, 20, generator=torch.Generator().manual_seed(1)).to(device)
    mas = mas_ext.MAS(model, lambda_reg=2.0)
    mas.consolidate([data])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    kind = getattr(mas_ext.optim, name)
    optimizer = kind(model.parameters(), lr=RATE, mas=mas, mode=mode, **OPTIMIZERS[name])
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, enabled=scaled)
    for factor in (1.0, math.inf, 1.0, 1.0) if scaled else (1.0, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale((model(data) - 1).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    return [t.detach().cpu() for t in (optimizer.last_penalty, *model.parameters())]


@each_mode
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_on_the_device_is_that_on_the_cpu(name: str, mode: str) -> None:
    here, there = (trained(name, mode, device) for device in (DEVICE, "cpu"))
    for mine, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-2 * RATE)


@each_mode
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_under_a_loss_scaler_skips_what_overflowed(name: str, mode: str) -> None:
    scaled, plain = (trained(name, mode, DEVICE, scaled) for scaled in (True, False))
    for mine, theirs in zip(scaled, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-2 * RATE)
