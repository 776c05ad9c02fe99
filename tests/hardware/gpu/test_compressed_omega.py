"""An Ω kept in bfloat16 or in codes, on a GPU: with test_cuda.py, `equivalence` of `make gpu`.

Collected as that is, and on ``cpu`` a rehearsal as well.
"""

from __future__ import annotations

import pytest
import torch

import mas_ext
from mas_ext.precision import num_scales
from tests import cases
from tests.step_cases import (
    MODES,
    RULES,
    Problem,
    Rule,
    Strengths,
    call,
    from_case,
    make_problem,
)
from tests.test_cuda import (
    BEYOND,
    DEVICE,
    REHEARSAL,
    VECTOR,
    assert_right,
    images,
    network,
    skip_without_memory,
)
from tests.test_cuda_steps import check, copy_of

DTYPES = {name: dtype for name, dtype in cases.DTYPES.items() if dtype != torch.float64}
each_op = pytest.mark.parametrize("op", cases.PENALTY_OPS)
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
each_mode = pytest.mark.parametrize("mode", MODES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_kept = pytest.mark.parametrize("kept", cases.KEPT)
# Around a block of codes and a chunk; a chunk that begins within the codes, and several.
SHAPES = [(1,), (255,), (256,), (257,), (33, 31), (8191,), (8193,), (0,), (16640,), (4, 8, 5, 5)]
TENSORS = 700 * 12  # of each kind more than one launch holds
SIDE = 1000
CASES = cases.KEPT_CASES
if REHEARSAL:
    CASES, TENSORS, SIDE = CASES[::9], 120, 100


# ================================================================================================
# The operators on lists
# ================================================================================================
@pytest.mark.parametrize("case", CASES, ids=str)
@each_op
def test_kept_omega_against_the_oracle(op: str, case: cases.Case) -> None:
    assert_right(op, case.state(DEVICE))


@each_dtype
@each_kept
@each_op
def test_kept_omega_around_blocks(op: str, kept: str, dtype: torch.dtype) -> None:
    assert_right(op, cases.make_state([dtype] * len(SHAPES), SHAPES, device=DEVICE, kept=kept))


@each_dtype
@each_kept
@each_op
def test_kept_omega_at_every_distance_from_a_vector_boundary(
    op: str, kept: str, dtype: torch.dtype
) -> None:
    """Vectors that end in the next block of codes; then lists that have no boundary in common."""
    vector = VECTOR // dtype.itemsize
    omega = {"omega", "omega_scales"}
    for elements in (1, vector) if REHEARSAL else range(1, vector + 1):
        for shifted in ({"params", "anchors", "grads", *omega}, {"params", "grads"}, omega):
            shapes = [(8193,), (700,)]
            state = cases.make_state([dtype] * 2, shapes, device=DEVICE, kept=kept)
            for name, tensors in state.lists().items():
                if name in shifted:
                    tensors[:] = [cases.behind(t, elements) for t in tensors]
            assert_right(op, state)


@each_op
def test_omega_of_every_kind_in_one_list(op: str) -> None:
    """Beside values of every dtype, in more tensors than a launch of any kind holds."""
    every = [*cases.DTYPES.values()]
    dtypes = [every[n % 4] for n in range(TENSORS)]
    shapes = [(n % 97 if n % 50 else 8195,) for n in range(TENSORS)]
    state, rounded, codes = (
        cases.make_state(dtypes, shapes, device=DEVICE, kept=kept) for kept in (None, *cases.KEPT)
    )
    none = torch.empty(0, device=DEVICE)
    wide = state.omega
    state.omega = [(wide, rounded.omega, codes.omega)[n // 4 % 3][n] for n in range(TENSORS)]
    state.omega_scales = [
        codes.omega_scales[n] if n // 4 % 3 == 2 else none for n in range(TENSORS)
    ]
    assert_right(op, state)


@each_kept
@each_op
def test_results_of_a_kept_omega_are_the_same_bits(op: str, kept: str) -> None:
    runs = []
    for _ in range(3):
        shapes = [(SIDE, SIDE), (16385,)]
        state = cases.make_state([torch.float32] * 2, shapes, device=DEVICE, kept=kept)
        outcome = cases.call(mas_ext.functional, op, state)
        runs.append([outcome.value, *outcome.tensors])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_codes_of_more_than_two_to_the_31_elements() -> None:
    """Ω = ½ but in the last block, where it is 2; δ = 1: the sum is known exactly."""
    skip_without_memory(2 + 2 + 1)
    params, anchors = (
        torch.full((BEYOND,), value, dtype=torch.bfloat16, device=DEVICE) for value in (2.0, 1.0)
    )
    codes = torch.full((BEYOND,), 255, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((num_scales(BEYOND),), 0.5, device=DEVICE)
    scales[-1] = 2.0
    last = BEYOND - (len(scales) - 1) * 256
    value = mas_ext.functional.penalty([params], [anchors], [codes], 2.0, omega_scales=[scales])
    cases.assert_value_near(value.cpu(), 0.5 * (BEYOND - last) + 2.0 * last)


# ================================================================================================
# The optimizer steps
# ================================================================================================
@each_rule
@each_mode
@each_dtype
@each_kept
def test_step_of_a_kept_omega(kept: str, dtype: torch.dtype, mode: str, rule: Rule) -> None:
    check(make_problem(rule, [dtype] * len(SHAPES), SHAPES, device=DEVICE, kept=kept), mode)


@each_rule
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_of_a_kept_omega_against_the_oracle(rule: Rule, case: cases.Case) -> None:
    check(from_case(rule, case, DEVICE), "gradient")


@each_rule
@each_mode
def test_a_skipped_step_of_codes_keeps_every_bit(rule: Rule, mode: str) -> None:
    problem: Problem = make_problem(
        rule, [torch.bfloat16] * 2, [(9000,), (5,)], device=DEVICE, kept="uint8"
    )
    before = copy_of(problem)
    value = call(mas_ext.functional, problem, mode, Strengths(found_inf=1.0))
    for now, old in zip(problem.written(), before.written(), strict=True):
        assert torch.equal(now.cpu(), old)
    exact = cases.exact_penalty(before.state, Strengths().lambda_reg)
    cases.assert_value_near(value.cpu(), exact)


# ================================================================================================
# MAS
# ================================================================================================
@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
def test_mas_keeps_a_narrow_state_on_the_device(state_dtype: str) -> None:
    model = network(DEVICE)
    mas = mas_ext.MAS(model, lambda_reg=2.0, state_dtype=state_dtype)
    mas.consolidate([images(DEVICE)])
    assert all(t.device.type == torch.device(DEVICE).type for t in mas.importance.values())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    params = dict(model.named_parameters())
    seen = {name: mas.importance[name].cpu().double() for name in params}
    delta = {n: p.detach().cpu().double() - mas.anchor[n].cpu().double() for n, p in params.items()}
    expected = sum(float((seen[n] * delta[n] ** 2).sum()) for n in params)  # λ/2 is 1
    for p in params.values():
        p.grad = torch.zeros_like(p)
    assert float(mas.add_penalty_grad_()) == pytest.approx(expected, rel=1e-5)
    for name, p in params.items():
        exact = 2.0 * seen[name] * delta[name]
        torch.testing.assert_close(p.grad.cpu().double(), exact, rtol=1e-5, atol=1e-12)
