"""Every operator against float64, against the reference, and against what the formulas imply."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mas_ext import functional, reference
from tests.cases import (
    DTYPES,
    LAYOUTS,
    OP_CASES,
    OPS,
    PENALTY_OPS,
    READING_OPS,
    WRITING_OPS,
    Case,
    Exact,
    Outcome,
    Scalars,
    State,
    accumulation_dtype,
    arguments,
    assert_near,
    assert_value_near,
    call,
    exact_penalty,
    exact_tensors,
    list_arguments,
    make_state,
    raw_arguments,
    written_argument,
)

each_op = pytest.mark.parametrize("op", OPS)
each_case = pytest.mark.parametrize(("op", "case"), OP_CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def bits(tensor: Tensor) -> Tensor:
    """What is stored, so that -0.0 differs from 0.0 and NaN equals itself."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    assert left.dtype == right.dtype
    assert torch.equal(bits(left), bits(right))


def assert_same_outcome(left: Outcome, right: Outcome) -> None:
    assert (left.value is None) == (right.value is None)
    if left.value is not None:
        assert_same_bits(left.value, right.value)
    for mine, theirs in zip(left.tensors, right.tensors, strict=True):
        assert_same_bits(mine, theirs)


def assert_right(op: str, before: State, after: State, outcome: Outcome, scalars: Scalars) -> None:
    """The outcome is near float64's; the value is the penalty of the tensors as they are now."""
    for actual, exact in zip(outcome.tensors, exact_tensors(op, before, scalars), strict=True):
        assert_near(actual, exact)
    if op != "accumulate_importance_":
        dtype = outcome.value.dtype
        exact = exact_penalty(after, scalars.lambda_reg)
        assert_value_near(outcome.value, exact, dtype=dtype)


# ================================================================================================
# The case table
# ================================================================================================
@each_case
def test_float64_oracle(op: str, case: Case) -> None:
    state, scalars = case.state(), Scalars()
    assert_right(op, case.state(), state, call(functional, op, state, scalars), scalars)


@each_case
def test_reference(op: str, case: Case) -> None:
    fast, plain = case.state(), case.state()
    mine, theirs = call(functional, op, fast), call(reference, op, plain)
    terms = [exact.magnitude for exact in exact_tensors(op, case.state())]
    for actual, expected, magnitude in zip(mine.tensors, theirs.tensors, terms, strict=True):
        assert actual.dtype == expected.dtype
        assert_near(actual, Exact(expected.double(), magnitude), times=2)
    if theirs.value is not None:
        assert mine.value.dtype == theirs.value.dtype
        assert_value_near(mine.value, float(theirs.value), dtype=mine.value.dtype)


@each_case
def test_nothing_else_is_written(op: str, case: Case) -> None:
    state, untouched = case.state(), case.state()
    call(functional, op, state)
    for name in set(state.lists()) - {written_argument(op)}:
        for now, before in zip(state.lists()[name], untouched.lists()[name], strict=True):
            assert_same_bits(now, before)
    for tensor in itertools.chain(*state.lists().values()):
        parted = tensor._base is not None and tensor._base.numel() > tensor.numel()
        if parted and tensor.is_floating_point():
            # The layouts leave NaN between and before the elements.
            assert int(tensor._base.isnan().sum()) == tensor._base.numel() - tensor.numel()


@each_op
@each_dtype
def test_value_has_the_widest_dtype(op: str, dtype: torch.dtype) -> None:
    if op == "accumulate_importance_":
        assert call(functional, op, make_state([dtype], [(3,)])).value is None
        return
    value = call(functional, op, make_state([dtype, torch.bfloat16], [(3,), (2,)])).value
    assert value.dtype == accumulation_dtype(dtype)
    assert value.shape == ()


def test_gradient_has_the_parameters_dtype_and_layout() -> None:
    state = Case("bfloat16", "conv", "channels_last").state()
    _, grads = call(functional, "penalty_and_grad", state)
    for grad, param in zip(grads, state.params, strict=True):
        assert (grad.dtype, grad.stride()) == (param.dtype, param.stride())


@each_op
@pytest.mark.parametrize("layout", ["contiguous", "each_differently"])
def test_mixed_dtypes(op: str, layout: str) -> None:
    dtypes = list(DTYPES.values())
    shapes = [(33, 7), (17,), (4, 3, 2, 2), ()]
    pairs = list(itertools.product(dtypes, shapes))

    def make() -> State:
        return make_state([d for d, _ in pairs], [s for _, s in pairs], LAYOUTS[layout])

    state, scalars = make(), Scalars()
    outcome = call(functional, op, state, scalars)
    for actual, exact in zip(outcome.tensors, exact_tensors(op, make(), scalars), strict=True):
        assert_near(actual, exact)
    if outcome.value is not None:
        assert outcome.value.dtype == torch.float64
        assert_value_near(outcome.value, exact_penalty(state, scalars.lambda_reg))


@each_op
def test_empty_list(op: str) -> None:
    outcome = call(functional, op, State([], [], [], []))
    assert outcome.tensors == []
    if outcome.value is not None:
        assert_same_bits(outcome.value, torch.zeros(()))


@each_op
def test_tuples_are_lists_too(op: str) -> None:
    state, plain = (make_state([torch.float32] * 2, [(5,), (3,)]) for _ in range(2))
    expected = call(functional, op, plain)
    as_tuples = State(*(tuple(tensors) for tensors in state.lists().values()))
    assert_same_outcome(call(functional, op, as_tuples), expected)


# ================================================================================================
# Scalars
# ================================================================================================
@pytest.mark.parametrize("kind", [float, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", PENALTY_OPS)
@each_dtype
def test_scalars_as_numbers_and_as_tensors(op: str, kind: type, dtype: torch.dtype) -> None:
    scalars = Scalars() if kind is float else Scalars().as_tensors(kind)
    state, before = (make_state([dtype] * 2, [(19,), (4, 3)], seed=1) for _ in range(2))
    assert_right(op, before, state, call(functional, op, state, scalars), scalars)


@pytest.mark.parametrize("grad_scale", [None, 1.0, 65536.0, 0.25, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_grad_scale(grad_scale: float | None, dtype: torch.dtype) -> None:
    scalars = Scalars(grad_scale=grad_scale)
    state, before = (make_state([dtype], [(1001,)]) for _ in range(2))
    outcome = call(functional, "add_penalty_grad_", state, scalars)
    assert_right("add_penalty_grad_", before, state, outcome, scalars)


def test_grad_scale_leaves_the_value_alone() -> None:
    values = [
        call(functional, "add_penalty_grad_", make_state([torch.float32], [(99,)]), scalars).value
        for scalars in [Scalars(grad_scale=None), Scalars(grad_scale=1024.0)]
    ]
    assert_same_bits(*values)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1 / 3, 1e-8, 1e8])
def test_importance_scale(scale: float) -> None:
    scalars = Scalars(scale=scale)
    state, before = (make_state([torch.float32], [(1001,)]) for _ in range(2))
    outcome = call(functional, "accumulate_importance_", state, scalars)
    assert_right("accumulate_importance_", before, state, outcome, scalars)


def test_importance_scale_is_one_by_default() -> None:
    omega = [torch.zeros(3)]
    functional.accumulate_importance_(omega, [torch.tensor([-2.0, 0.0, 3.0])])
    assert omega[0].tolist() == [2.0, 0.0, 3.0]


@pytest.mark.parametrize("op", PENALTY_OPS)
def test_zero_lambda_changes_nothing(op: str) -> None:
    state, before = (make_state([torch.float32, torch.float64], [(17,), (5,)]) for _ in range(2))
    outcome = call(functional, op, state, Scalars(lambda_reg=0.0))
    assert float(outcome.value) == 0
    written = written_argument(op)
    for now, old in zip(outcome.tensors, before.lists().get(written, []), strict=bool(written)):
        assert torch.equal(now, old)


# ================================================================================================
# What the formulas imply
# ================================================================================================
@pytest.mark.parametrize("op", PENALTY_OPS)
@each_dtype
def test_penalty_is_zero_at_the_anchors(op: str, dtype: torch.dtype) -> None:
    state = make_state([dtype] * 2, [(33,), (4, 5)])
    state.anchors = [param.clone() for param in state.params]
    grads = [grad.clone() for grad in state.grads]
    outcome = call(functional, op, state)
    assert float(outcome.value) == 0
    expected = {
        "penalty": [],
        "penalty_and_grad": [torch.zeros_like(param) for param in state.params],
        "add_penalty_grad_": grads,
        "proximal_step_": state.anchors,
    }[op]
    for actual, wanted in zip(outcome.tensors, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_is_autograds(dtype: torch.dtype) -> None:
    state = make_state([dtype] * 3, [(33,), (4, 5), ()])
    params = [param.clone().requires_grad_() for param in state.params]
    reference.penalty(params, state.anchors, state.omega, 0.7).backward()
    _, grads = functional.penalty_and_grad(*arguments("penalty", state))
    added = [torch.zeros_like(grad) for grad in grads]
    functional.add_penalty_grad_(added, *arguments("penalty", state))
    for param, grad, from_zero in zip(params, grads, added, strict=True):
        torch.testing.assert_close(grad, param.grad, rtol=1e-6, atol=0)
        assert torch.equal(from_zero, grad)


@pytest.mark.parametrize("op", ["penalty_and_grad", "add_penalty_grad_"])
@each_dtype
def test_all_penalties_agree_on_the_value(op: str, dtype: torch.dtype) -> None:
    state = make_state([dtype] * 2, [(20001,), (7, 11)])
    expected = functional.penalty(*arguments("penalty", state))
    assert_same_bits(call(functional, op, state).value, expected)


@each_dtype
@pytest.mark.parametrize("lambda_reg", [0.1, 3.0, 1e6])
def test_proximal_value_is_the_penalty_afterwards(dtype: torch.dtype, lambda_reg: float) -> None:
    state, scalars = make_state([dtype] * 2, [(20001,), (7, 11)]), Scalars(lambda_reg=lambda_reg)
    value = call(functional, "proximal_step_", state, scalars).value
    assert_same_bits(value, functional.penalty(*arguments("penalty", state, scalars)))


@pytest.mark.parametrize("lambda_reg", [1e-3, 1.0, 1e3])
def test_proximal_step_minimises_its_objective(lambda_reg: float) -> None:
    """λ/2 Σ Ω(x−θ*)² + Σ(x−θ)²/2η has no slope at the step's result, and is convex."""
    state, before = (make_state([torch.float64], [(501,)]) for _ in range(2))
    functional.proximal_step_(*arguments("proximal_step_", state, Scalars(lambda_reg=lambda_reg)))
    x = state.params[0].requires_grad_()
    distance = ((x - before.params[0]) ** 2).sum() / (2 * Scalars().lr)
    (reference.penalty([x], state.anchors, state.omega, lambda_reg) + distance).backward()
    steepness = lambda_reg * state.omega[0] + 1 / Scalars().lr
    assert bool((x.grad.abs() <= 1e-14 * steepness * (1 + x.detach().abs())).all())


@each_dtype
def test_proximal_step_keeps_the_bits_where_omega_is_zero(dtype: torch.dtype) -> None:
    state, before = (make_state([dtype], [(1000,)]) for _ in range(2))
    free = state.omega[0] == 0
    assert 100 < int(free.sum()) < 900
    functional.proximal_step_(*arguments("proximal_step_", state))
    assert_same_bits(state.params[0][free], before.params[0][free])
    assert not torch.equal(state.params[0][~free], before.params[0][~free])


SPECIAL = {
    "minus_zero": (-0.0, 1.0),
    "zero": (0.0, -1.0),
    "smallest": (2.0**-149, 1.0),
    "far_apart": (3e38, -3e38),
}


@pytest.mark.parametrize(("param", "anchor"), SPECIAL.values(), ids=SPECIAL)
def test_proximal_step_keeps_special_values_where_omega_is_zero(
    param: float, anchor: float
) -> None:
    params = [torch.full((17,), param)]
    before = params[0].clone()
    functional.proximal_step_(params, [torch.full((17,), anchor)], [torch.zeros(17)], 0.7, 0.3)
    assert_same_bits(params[0], before)


@each_dtype
@pytest.mark.parametrize("lambda_reg", [1e12, 1e38])
@pytest.mark.parametrize("lr", [0.3, 100.0])
@pytest.mark.parametrize("omega", [1e-3, 1.0, 1e30])
def test_huge_lambda_lands_on_the_anchor(
    dtype: torch.dtype, lambda_reg: float, lr: float, omega: float
) -> None:
    state = make_state([dtype], [(1001,)])
    state.omega[0].fill_(omega)
    terms = state.params[0].double().abs() + state.anchors[0].double().abs()
    functional.proximal_step_(state.params, state.anchors, state.omega, lambda_reg, lr)
    # 1/(1+c) of the way is left, c being at least 3e8.
    assert_near(state.params[0], Exact(state.anchors[0].double(), terms), dust=4e-9 * terms)


@pytest.mark.parametrize("kind", [float, torch.float32, torch.float64], ids=str)
def test_overflowing_step_still_keeps_parameters_without_importance(kind: type) -> None:
    """η·λ beyond float32 makes ∞·0 = NaN of a parameter that should not move at all."""
    scalars = Scalars(lambda_reg=1e38, lr=100.0)
    scalars = scalars if kind is float else scalars.as_tensors(kind)
    params = [torch.tensor([2.0, 2.0, 2.0])]
    omega = [torch.tensor([0.0, 1e-3, 1e38])]
    value = functional.proximal_step_(
        params, [torch.ones(3)], omega, scalars.lambda_reg, scalars.lr
    )
    assert params[0].tolist() == [2.0, 1.0, 1.0]
    assert float(value) == 0


def test_repeated_proximal_steps_converge_where_gradient_steps_diverge() -> None:
    proximal, gradient = (make_state([torch.float32], [(101,)]) for _ in range(2))
    for state in (proximal, gradient):
        state.omega[0].fill_(1.0)
    start = float(functional.penalty(*arguments("penalty", proximal)))
    for _ in range(20):
        functional.proximal_step_(proximal.params, proximal.anchors, proximal.omega, 10.0, 0.3)
        _, grads = functional.penalty_and_grad(
            gradient.params, gradient.anchors, gradient.omega, 10.0
        )
        gradient.params[0] -= 0.3 * grads[0]
    assert float(functional.penalty(*arguments("penalty", proximal))) < 1e-6 * start
    assert float(functional.penalty(*arguments("penalty", gradient))) > 1e6 * start


@each_dtype
def test_accumulating_many_gradients(dtype: torch.dtype) -> None:
    """1,000 equal additions: an importance kept in bfloat16 would stall at 256 of them."""
    omega = [torch.zeros(3, dtype=accumulation_dtype(dtype))]
    for _ in range(1000):
        functional.accumulate_importance_(omega, [torch.tensor([1.0, -2.0, 0.0], dtype=dtype)])
    assert omega[0].tolist() == [1000.0, 2000.0, 0.0]


def test_not_a_number_comes_through() -> None:
    """A NaN or Inf in a gradient must be seen in Ω, not hidden."""
    omega = [torch.zeros(40)]
    grad = torch.zeros(40)
    grad[3], grad[37] = math.nan, -math.inf
    functional.accumulate_importance_(omega, [grad])
    assert omega[0].isnan().nonzero().flatten().tolist() == [3]
    assert omega[0].isinf().nonzero().flatten().tolist() == [37]


@pytest.mark.parametrize("name", ["params", "anchors", "omega"])
@pytest.mark.parametrize("op", PENALTY_OPS)
def test_not_a_number_in_one_element_reaches_the_value(op: str, name: str) -> None:
    state = make_state([torch.float32] * 2, [(40,), (17,)])
    state.omega[1].fill_(1.0)
    state.lists()[name][1][16] = math.nan
    outcome = call(functional, op, state)
    assert math.isnan(float(outcome.value))
    for tensors in [outcome.tensors] if outcome.tensors else []:
        assert not tensors[0].isnan().any()
        assert tensors[1].isnan().nonzero().flatten().tolist() == [16]


# ================================================================================================
# Aliases and views
# ================================================================================================
@pytest.mark.parametrize("op", READING_OPS)
def test_read_only_arguments_may_be_one_tensor(op: str) -> None:
    tensor = torch.rand(33)
    outcome = getattr(functional, op)([tensor], [tensor], [tensor], 1.0)
    value, grads = outcome if isinstance(outcome, tuple) else (outcome, [])
    assert float(value) == 0
    assert all(torch.equal(grad, torch.zeros(33)) for grad in grads)


@pytest.mark.parametrize("op", WRITING_OPS)
@pytest.mark.parametrize("rows", [7, 20_000])
def test_interleaved_columns_of_one_base_are_written_apart(op: str, rows: int) -> None:
    """Their memory ranges meet although no element is shared, so they must not be refused."""

    def make() -> State:
        state = make_state([torch.float32] * 3, [(rows,)] * 3)
        written = state.lists()[written_argument(op)]
        base = torch.stack(written, dim=1)
        written[:] = [base[:, k] for k in range(3)]
        return state

    state, scalars = make(), Scalars()
    assert_right(op, make(), state, call(functional, op, state, scalars), scalars)


@each_op
def test_expanded_tensors_can_be_read(op: str) -> None:
    def make() -> State:
        state = make_state([torch.float32], [(9, 5)])
        for name in set(list_arguments(op)) - {written_argument(op)}:
            state.lists()[name] = [state.lists()[name][0][:, :1].expand(9, 5)]
        return state

    state, scalars = make(), Scalars()
    assert_right(op, make(), state, call(functional, op, state, scalars), scalars)


@each_op
def test_lazily_negated_tensors_can_be_read(op: str) -> None:
    """The imaginary part of a conjugate is stored with the other sign than it has."""

    def make() -> State:
        state = make_state([torch.float32], [(37,)])
        negated = torch.complex(*torch.rand(2, 37, generator=seeded())).conj().imag
        assert negated.is_neg()
        state.lists()["grads" if op == "accumulate_importance_" else "anchors"] = [negated]
        return state

    state, scalars = make(), Scalars()
    assert_right(op, make(), state, call(functional, op, state, scalars), scalars)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ================================================================================================
# Autograd's version counters
# ================================================================================================
def call_raw(op: str, state: State) -> None:
    with torch.no_grad():
        getattr(torch.ops.mas_ext, op)(*raw_arguments(op, state))


CALLERS = {"functional": lambda op, state: call(functional, op, state), "torch.ops": call_raw}
each_caller = pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)


@each_op
@each_caller
def test_versions_rise_where_written_and_nowhere_else(op: str, caller) -> None:
    state = make_state([torch.float32, torch.bfloat16], [(5,), (3, 2)])
    caller(op, state)
    for name, tensors in state.lists().items():
        risen = [tensor._version > 0 for tensor in tensors]
        assert risen == [name == written_argument(op)] * 2, name


@pytest.mark.parametrize("op", WRITING_OPS)
@each_caller
def test_overwriting_a_saved_tensor_is_noticed(op: str, caller) -> None:
    state = make_state([torch.float32] * 2, [(5,), (3, 2)])
    weight = torch.ones(3, 2, requires_grad=True)
    result = (weight * state.lists()[written_argument(op)][1]).sum()  # saves it for backward
    caller(op, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_parameters_that_require_gradients_can_be_stepped() -> None:
    state, plain = (make_state([torch.float32], [(33,)]) for _ in range(2))
    state.params[0].requires_grad_()
    value = functional.proximal_step_(*arguments("proximal_step_", state))
    expected = functional.proximal_step_(*arguments("proximal_step_", plain))
    assert_same_bits(value, expected)
    assert_same_bits(state.params[0], plain.params[0])
    assert state.params[0].is_leaf
    assert state.params[0].requires_grad
    assert not value.requires_grad


@each_op
def test_inference_mode(op: str) -> None:
    scalars, before = Scalars(), make_state([torch.float32], [(33,)])
    with torch.inference_mode():
        state = make_state([torch.float32], [(33,)])
        outcome = call(functional, op, state, scalars)
        assert_right(op, before, state, outcome, scalars)


# ================================================================================================
# The same bits every time
# ================================================================================================
LARGE = [(1_000_001,), (100, 1003), (250_000,)]


def large_outcome(op: str, dtype: torch.dtype, threads: int) -> Outcome:
    torch.set_num_threads(threads)
    return call(functional, op, make_state([dtype] * 3, LARGE))


@each_op
@each_dtype
def test_results_do_not_depend_on_the_number_of_threads(op: str, dtype: torch.dtype) -> None:
    alone = large_outcome(op, dtype, 1)
    for threads in (2, 3):
        assert_same_outcome(large_outcome(op, dtype, threads), alone)


@each_op
@each_dtype
def test_results_are_the_same_from_run_to_run(op: str, dtype: torch.dtype) -> None:
    first = large_outcome(op, dtype, 2)
    for _ in range(3):
        assert_same_outcome(large_outcome(op, dtype, 2), first)


@each_op
@pytest.mark.parametrize("threads", [1, 2])
def test_many_chunks_and_threads_are_right(op: str, threads: int) -> None:
    state, before = (make_state([torch.float32] * 3, LARGE) for _ in range(2))
    torch.set_num_threads(threads)
    outcome, scalars = call(functional, op, state), Scalars()
    assert_right(op, before, state, outcome, scalars)


@pytest.mark.slow
def test_penalty_of_64_million_elements() -> None:
    """A sum in float32 would be lost: the last terms are 1e-8 of it."""
    size, piece = 64_000_000, 1_000_000
    params = torch.empty(size).normal_(generator=seeded())
    anchors, omega = torch.full_like(params, 0.25), torch.rand(size, generator=seeded())
    value = float(functional.penalty([params], [anchors], [omega], 2.0))
    parts = zip(params.split(piece), anchors.split(piece), omega.split(piece), strict=True)
    exact = math.fsum(exact_penalty(State([p], [a], [o], []), 2.0) for p, a, o in parts)
    assert abs(value - exact) <= 1e-6 * exact
