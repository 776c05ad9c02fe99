"""Every operator's results against float64, and what its formula implies."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mas_ext import functional, reference
from tests.support.exact import Exact, assert_near, penalty_value
from tests.support.operators import (
    ALL,
    OPERATORS,
    OPS,
    PENALTY_OPS,
    STEPS,
    Outcome,
    Scalars,
    assert_right,
    call,
    lists_of,
    make,
    samples,
    small,
    written_argument,
)
from tests.support.tensors import DTYPES, State, assert_gaps_untouched, assert_same_bits, make_state

MODULES = (functional, reference)
LISTS = [op for op in ALL if OPERATORS[op].takes_lists]
each_op = pytest.mark.parametrize("op", ALL)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_sample = pytest.mark.parametrize(
    ("op", "sample"), [(op, sample) for op in ALL for sample in samples(op)], ids=str
)


def check(op: str, state: State, scalars: Scalars = Scalars(), module: Any = functional) -> Outcome:  # noqa: B008
    before = state.copy()
    outcome = call(module, op, state, scalars)
    assert_right(op, before, outcome, scalars)
    return outcome


@each_sample
def test_float64_oracle_and_nothing_else_is_written(op: str, sample: Any) -> None:
    for module in MODULES:
        state, untouched = (sample.make(OPERATORS[op].moments) for _ in range(2))
        outcome = call(module, op, state)
        assert_right(op, untouched, outcome, what=module.__name__)
        for name, tensors in lists_of(op, state).items():
            for now, before in zip(tensors, lists_of(op, untouched)[name], strict=True):
                assert_gaps_untouched(now)
                if name not in OPERATORS[op].written:
                    assert_same_bits(now, before)
        if op == "penalty_and_grad":
            for grad, param in zip(outcome.tensors, state.params, strict=True):
                assert (grad.dtype, grad.shape) == (param.dtype, param.shape)
                if module is functional:
                    assert grad.stride() == torch.empty_like(param).stride()


@pytest.mark.parametrize("layout", ["contiguous", "each_differently"])
@pytest.mark.parametrize("op", LISTS)
def test_mixed_dtypes(op: str, layout: str) -> None:
    pairs = itertools.product(DTYPES.values(), [(33, 7), (17,), (4, 3, 2, 2), ()])
    dtypes, shapes = zip(*pairs, strict=True)
    check(op, make(op, dtypes, shapes, layouts=layout))


@pytest.mark.parametrize("op", LISTS)
def test_tuples_are_lists_too(op: str) -> None:
    state, plain = small(op), small(op)
    expected = call(functional, op, plain)
    for name, tensors in vars(state).items():
        setattr(state, name, tuple(tensors))
    outcome = call(functional, op, state)
    for mine, theirs in zip(outcome.tensors, expected.tensors, strict=True):
        assert_same_bits(mine, theirs)
    assert outcome.value == expected.value


@each_op
def test_inference_mode(op: str) -> None:
    with torch.inference_mode():
        check(op, small(op))


# -- Scalars ---------------------------------------------------------------------------------------
SCALARS = {
    "no_grad_scale": Scalars(grad_scale=None),
    "loss_scale": Scalars(grad_scale=65536.0),
    "small_grad_scale": Scalars(grad_scale=0.25),
    "no_lr": Scalars(lr=0.0),
    "no_penalty": Scalars(lambda_reg=0.0, scale=0.0),
    "strong": Scalars(lambda_reg=1e6, scale=1e8),
    "weak": Scalars(lambda_reg=1e-8, scale=1e-8),
    "found_nothing": Scalars(found_inf=0.0),
}


@pytest.mark.parametrize("kind", [float, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scalars", SCALARS.values(), ids=SCALARS)
@each_op
def test_scalars(op: str, scalars: Scalars, kind: Any) -> None:
    scalars = scalars if kind is float else scalars.as_tensors(kind)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check(op, small(op, dtype), scalars)


def test_add_penalty_grad_with_a_scale_of_zero() -> None:
    check("add_penalty_grad_", small("add_penalty_grad_"), Scalars(grad_scale=0.0))


def test_importance_scale_is_one_by_default() -> None:
    for module in MODULES:
        omega = torch.zeros(3)
        module.accumulate_importance_([omega], [torch.tensor([-2.0, 0.0, 3.0])])
        assert omega.tolist() == [2.0, 0.0, 3.0]
        omega = torch.zeros(1, 1)
        module.accumulate_outer_(omega, torch.tensor([[[-2.0]]]), torch.tensor([[[3.0]]]))
        assert omega.item() == 6.0


def test_the_old_name_of_accumulate_outer() -> None:
    for module in MODULES:
        state, expected = small("accumulate_outer_"), small("accumulate_outer_")
        module.accumulate_abs_matmul_(*state.omega, *state.left, *state.right, 0.6)
        assert_same_bits(state.omega[0], call(module, "accumulate_outer_", expected).tensors[0])


@pytest.mark.parametrize("op", PENALTY_OPS)
@pytest.mark.parametrize("why", ["no_strength", "at_the_anchors"])
@each_dtype
def test_no_penalty_changes_nothing(op: str, why: str, dtype: torch.dtype) -> None:
    state = small(op, dtype)
    if why == "at_the_anchors":
        state.anchors = [param.clone() for param in state.params]
    before, scalars = state.copy(), Scalars(lambda_reg=0.0 if why == "no_strength" else 0.7)
    outcome = call(functional, op, state, scalars)
    assert float(outcome.value) == 0
    expected = lists_of(op, before).get(written_argument(op) or "", [])
    for now, old in itertools.zip_longest(outcome.tensors, expected):
        assert torch.equal(now, torch.zeros_like(now) if old is None else old)


# -- What the formulas imply -----------------------------------------------------------------------
@each_dtype
@pytest.mark.parametrize("op", [op for op in PENALTY_OPS if op != "penalty"])
def test_values_have_the_bits_of_the_penalty(op: str, dtype: torch.dtype) -> None:
    state = make(op, [dtype] * 2, [(20001,), (7, 11)])
    before = state.copy()
    value = call(functional, op, state).value
    penalised = state if "proximal" in op else before
    expected = functional.penalty(penalised.params, state.anchors, state.omega, 0.7)
    assert_same_bits(value, expected)


def test_gradients_added_to_zero_have_the_bits_of_the_gradients() -> None:
    state = small("add_penalty_grad_")
    state.grads = [torch.zeros_like(g) for g in state.grads]
    call(functional, "add_penalty_grad_", state, Scalars(grad_scale=None))
    for mine, theirs in zip(
        state.grads, call(functional, "penalty_and_grad", state).tensors, strict=True
    ):
        assert torch.equal(mine, theirs)


SPECIAL = [(-0.0, 1.0), (0.0, -1.0), (2.0**-149, 1.0), (3e38, -3e38)]


@each_dtype
def test_proximal_step_keeps_the_bits_where_omega_is_zero(dtype: torch.dtype) -> None:
    for module in MODULES:
        state, before = (make_state([dtype], [(1000,)]) for _ in range(2))
        free = state.omega[0] == 0
        assert 100 < int(free.sum()) < 900
        call(module, "proximal_step_", state)
        assert_same_bits(state.params[0][free], before.params[0][free])
        assert not torch.equal(state.params[0][~free], before.params[0][~free])
        for param, anchor in SPECIAL:
            params = [torch.full((17,), param).to(dtype)]
            old, anchors = params[0].clone(), [torch.full((17,), anchor).to(dtype)]
            omega = [torch.zeros_like(state.omega[0][:17])]
            module.proximal_step_(params, anchors, omega, 0.7, 0.3)
            assert_same_bits(params[0], old)


@each_dtype
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_huge_strengths_land_on_the_anchor(module: Any, dtype: torch.dtype) -> None:
    for lambda_reg, lr, omega in itertools.product([1e12, 1e38], [0.3, 100.0], [1e-3, 1.0, 1e30]):
        state = make_state([dtype], [(101,)])
        state.omega[0].fill_(omega)
        terms = state.params[0].double().abs() + state.anchors[0].double().abs()
        call(module, "proximal_step_", state, Scalars(lambda_reg=lambda_reg, lr=lr))
        # 1/(1+c) of the way is left, c being at least 3e8.
        exact = Exact(state.anchors[0].double(), terms)
        assert_near(state.params[0], exact, dust=4e-9 * terms)


@pytest.mark.parametrize("kind", [float, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", [op for op in ALL if "proximal" in op])
def test_overflowing_strengths_keep_parameters_without_importance(op: str, kind: Any) -> None:
    """η·λ beyond float32 would make ∞·0 = NaN of a parameter that shouldn't move at all."""
    scalars = Scalars(lambda_reg=1e38, lr=100.0, grad_scale=None)
    for module in MODULES:
        state = small(op)
        state.grads = [torch.zeros_like(g) for g in state.grads]
        state.params[0].fill_(2.0)
        state.anchors[0].fill_(1.0)
        state.omega[0][:2], state.omega[0][2:] = torch.tensor([0.0, 1e-3]), 1e38
        call(module, op, state, scalars if kind is float else scalars.as_tensors(kind))
        assert bool(((state.params[0][1:] - 1).abs() <= 1e-5).all())
        assert bool(state.params[0][0].isfinite())


# -- What isn't finite must be seen, not hidden ----------------------------------------------------
NAMES = [(op, name) for op in LISTS for name in OPERATORS[op].lists]


@pytest.mark.parametrize(("op", "name"), NAMES)
def test_not_a_number_in_one_element_comes_through(op: str, name: str) -> None:
    for module in MODULES:
        state = make(op, [torch.float32] * 2, [(40,), (17,)])
        state.omega[1].fill_(1.0)
        getattr(state, name)[1][16] = math.nan
        outcome = call(module, op, state)
        if name in ("params", "anchors", "omega") or ("proximal" in op):
            assert outcome.value is None or math.isnan(float(outcome.value))
        else:
            assert outcome.value is None or math.isfinite(float(outcome.value))
        if outcome.tensors:
            first, second = outcome.tensors[:2]
            assert not first.isnan().any()
            assert second.isnan().nonzero().flatten().tolist() == [16]


def test_infinite_gradients_come_through() -> None:
    for module in MODULES:
        omega, grad = torch.zeros(40), torch.zeros(40)
        grad[37] = -math.inf
        module.accumulate_importance_([omega], [grad])
        assert omega.isinf().nonzero().flatten().tolist() == [37]


# -- Views (see also test_properties.py) -----------------------------------------------------------
@pytest.mark.parametrize(("op", "name"), [pair for pair in NAMES if pair[1] != "omega"])
def test_lazily_negated_tensors_can_be_read(op: str, name: str) -> None:
    """The imaginary part of a conjugate is stored with the other sign than it has."""
    if name in OPERATORS[op].written:
        return
    state = make(op, [torch.float32], [(37,)])
    negated = torch.complex(*torch.rand(2, 37)).conj().imag
    assert negated.is_neg()
    getattr(state, name)[:] = [negated]
    check(op, state)


# -- The same bits every time ----------------------------------------------------------------------
LARGE = [(140_001,), (100, 1003), (7,)]  # threads are woken from 131072 elements on
# Every list operator with every dtype, every step with two of them in turn.
LARGE_CASES = [(op, dtype) for op in OPS for dtype in DTYPES]
LARGE_CASES += [(op, [*DTYPES][(i + j) % 4]) for i, op in enumerate(STEPS) for j in (0, 1)]


@pytest.mark.parametrize(("op", "dtype"), LARGE_CASES)
def test_results_do_not_depend_on_the_number_of_threads(op: str, dtype: str) -> None:
    outcomes: list[list[Tensor]] = []
    for threads in (2, 1, 3, 2):
        torch.set_num_threads(threads)
        state = make(op, [DTYPES[dtype]] * 3, LARGE)
        outcome = call(functional, op, state) if outcomes else check(op, state)
        outcomes.append([t for t in (outcome.value, *outcome.tensors) if t is not None])
    for other in outcomes[1:]:
        for mine, first in zip(other, outcomes[0], strict=True):
            assert_same_bits(mine, first)


@pytest.mark.slow
def test_penalty_of_64_million_elements() -> None:
    """A sum in float32 would be lost: the last terms are 1e-8 of it."""
    size, piece = 64_000_000, 1_000_000
    params = torch.empty(size).normal_()
    anchors, omega = torch.full_like(params, 0.25), torch.rand(size)
    value = float(functional.penalty([params], [anchors], [omega], 2.0))
    parts = zip(params.split(piece), anchors.split(piece), omega.split(piece), strict=True)
    exact = math.fsum(penalty_value(State([p], [a], [o]), 2.0) for p, a, o in parts)
    assert abs(value - exact) <= 1e-6 * exact
