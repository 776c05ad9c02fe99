"""The operators as PyTorch sees them: schemas, fakes, autograd, versions, modes, torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mas_ext import functional, reference
from tests.support.exact import assert_value_near, penalty_value
from tests.support.operators import (
    ALL,
    DIFFERENTIABLE,
    LOW_RANK_OPS,
    OPERATORS,
    OPS,
    OUTER_OPS,
    PENALTY_OPS,
    WRITING,
    Outcome,
    Scalars,
    call,
    lists_of,
    raw,
    raw_arguments,
    samples,
    small,
    written,
)
from tests.support.tensors import (
    DTYPES,
    KEPT,
    LAYOUTS,
    STATE_LISTS,
    Sample,
    State,
    accumulation_dtype,
    make_state,
)

each_op = pytest.mark.parametrize("op", ALL)
each_writing_op = pytest.mark.parametrize("op", WRITING)
each_differentiable = pytest.mark.parametrize("op", DIFFERENTIABLE)


def call_function(op: str, state: State) -> Outcome:
    return call(functional, op, state, Scalars(found_inf=0.0).as_tensors())


def call_operator(op: str, state: State) -> Outcome:
    with torch.no_grad():
        raw(op)(*raw_arguments(op, state))
    return Outcome(None, written(op, state))


each_caller = pytest.mark.parametrize("caller", [call_function, call_operator])


def versions(op: str, state: State) -> list[int]:
    return [t._version for t in written(op, state)]


def assert_states_close(mine: State, theirs: State) -> None:
    torch.testing.assert_close(vars(mine), vars(theirs))


# -- opcheck: schema, autograd registration, fake kernel, and tracing with dynamic shapes ----------
# Tracing doesn't depend on the values, so large tensors would only take time.
OPCHECK = [
    Sample("float32", "empty_list"),
    Sample("bfloat16", "zero_size", "sliced"),
    Sample("float64", "0_dim"),
    Sample("float16", "conv", "each_differently"),
    Sample("bfloat16", "conv", "channels_last", "uint8"),
    Sample("float32", "conv", "transposed", "bfloat16"),
]
OPCHECK_CASES: list[tuple[str, Any]] = [
    (op, sample)
    for op in ALL
    for sample in (OPCHECK if OPERATORS[op].takes_lists else samples(op)[:30:5])
    if sample.kept is None or OPERATORS[op].has_penalty
]


@pytest.mark.parametrize(("op", "sample"), OPCHECK_CASES, ids=str)
def test_opcheck(op: str, sample: Any) -> None:
    opcheck(raw(op), tuple(raw_arguments(op, sample.make(OPERATORS[op].moments))))


@pytest.mark.parametrize("wanting", ["params", "anchors", "omega", "lambda_reg", "all"])
@each_differentiable
def test_opcheck_with_gradients(op: str, wanting: str) -> None:
    inputs = raw_arguments(op, small(op, torch.bfloat16 if wanting == "all" else torch.float32))
    names = ["params", "anchors", "omega", "omega_scales", "lambda_reg"]
    for name, argument in zip(names, inputs, strict=True):
        if wanting in (name, "all"):
            for tensor in [argument] if isinstance(argument, Tensor) else argument:
                tensor.requires_grad_()
    opcheck(raw(op), tuple(inputs))


@each_op
def test_arguments_with_defaults_may_be_left_out(op: str) -> None:
    schema = raw(op)._schema.arguments
    needed = sum(not argument.has_default_value() for argument in schema)
    if "mas_ext::sgd_step_" in str(raw(op)._schema) and OPERATORS[op].moments:
        return  # momentum buffers without a momentum are refused
    opcheck(raw(op), tuple(raw_arguments(op, small(op))[:needed]))


# -- Without memory: fake tensors of a GPU that needn't be there, and meta tensors -----------------
def on_device(op: str, device: torch.device) -> State:
    """Lists of both accumulation dtypes, so that a value has to be float64."""
    if not OPERATORS[op].takes_lists:
        return small(op).map(lambda t: t.to(device))
    dtypes, shapes = [torch.bfloat16, torch.float64, torch.float32], [(3, 4), (5,), ()]
    return make_state(dtypes, shapes, moments=OPERATORS[op].moments).map(lambda t: t.to(device))


@pytest.mark.parametrize("where", ["cpu", "device", "number"])
@pytest.mark.parametrize("name", ["cuda:0", "meta"])
@each_op
def test_without_memory(op: str, name: str, where: str) -> None:
    device = torch.device(name)
    with FakeTensorMode() if name == "cuda:0" else nullcontext():
        scalars = Scalars(found_inf=0.0)
        if where != "number":
            scalars = scalars.as_tensors(device=str(device) if where == "device" else "cpu")
        state = on_device(op, device)
        value, tensors = call(functional, op, state, scalars)
    if value is not None:
        dtype = torch.float64 if OPERATORS[op].takes_lists else torch.float32
        assert (value.device, value.dtype, value.shape) == (device, dtype, ())
    like = state.params if op == "penalty_and_grad" else written(op, state)
    for actual, expected in zip(tensors, like, strict=True):
        assert actual.device == device
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)


def test_fake_results_of_an_empty_list_are_where_the_strength_is() -> None:
    with FakeTensorMode():
        value = functional.penalty([], [], [], torch.tensor(0.5, device="cuda"))
    assert (value.device.type, value.dtype, value.shape) == ("cuda", torch.float32, ())


# -- Gradients -------------------------------------------------------------------------------------
SHAPES = [(3,), (2, 2), (), (0,)]
N = len(SHAPES)


def double_inputs(layout: str = "contiguous") -> list[Tensor]:
    """θ, θ* and Ω of every parameter, then λ, as one flat list of float64 leaves."""
    state = make_state([torch.float64] * N, SHAPES, layout)
    scale = torch.tensor(0.7, dtype=torch.float64)
    return [t.requires_grad_() for t in (*state.params, *state.anchors, *state.omega, scale)]


def flat(op: str) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as a function of the flat list, for gradcheck."""

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        lists = [list(inputs[k * N : (k + 1) * N]) for k in range(3)]
        result = getattr(functional, op)(*lists, inputs[-1])
        return (result,) if isinstance(result, Tensor) else (result[0], *result[1])

    return function


# Which of the flat inputs require gradients.
SUBSETS = {
    "all": list(range(3 * N + 1)),
    "params": list(range(N)),
    "anchors": list(range(N, 2 * N)),
    "omega": list(range(2 * N, 3 * N)),
    "lambda": [3 * N],
    "one_param_and_another_omega": [0, 2 * N + 1],
    "anchors_and_lambda": [*range(N, 2 * N), 3 * N],
}


@pytest.mark.parametrize("subset", SUBSETS)
@each_differentiable
def test_gradcheck(op: str, subset: str) -> None:
    leaves = double_inputs("each_differently" if subset == "all" else "contiguous")
    inputs = [t.detach().requires_grad_(k in SUBSETS[subset]) for k, t in enumerate(leaves)]
    assert gradcheck(flat(op), inputs)
    assert gradgradcheck(flat(op), inputs)


# One or a few roundings to the dtype in each of two computations.
AUTOGRAD = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 2**-5, "float16": 2**-8}


@pytest.mark.parametrize("kept", [None, *KEPT])
@pytest.mark.parametrize("dtype", AUTOGRAD)
@each_differentiable
def test_gradients_are_those_of_autograd(op: str, dtype: str, kept: str | None) -> None:
    """First and second ones, of θ, θ*, λ and an Ω that has one, as autograd forms them."""

    def both_orders(module: ModuleType) -> list[Tensor]:
        state = Sample(dtype, "mixed", "each_differently", kept).make()
        strength = torch.tensor(0.7, dtype=accumulation_dtype(DTYPES[dtype]))
        leaves = [*state.params, *state.anchors, strength]
        leaves += [o for o in state.omega if o.is_floating_point()]
        for leaf in leaves:
            leaf.requires_grad_()
        value, grads = call(module, op, state, Scalars(strength))
        total = 3 * value + sum((grad.to(value.dtype) ** 2).sum() for grad in grads)
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.to(value.dtype).square().sum() for g in first), leaves)
        return [*first, *second]

    is_rounded = kept == "bfloat16" and dtype != "float64"
    bound = max(AUTOGRAD[dtype], AUTOGRAD["bfloat16"] if is_rounded else 0)
    for mine, theirs in zip(both_orders(functional), both_orders(reference), strict=True):
        largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound * largest)


@each_differentiable
def test_a_negative_strength_in_a_tensor(op: str) -> None:
    """A backward pass with a negative incoming gradient calls the operator with one."""
    state, strength = small(op), torch.tensor(-0.5)
    value = call(functional, op, state, Scalars(strength)).value
    assert_value_near(value, penalty_value(state, strength))
    assert float(value) < 0


@each_writing_op
def test_writing_operators_record_nothing(op: str) -> None:
    """All tensors require gradients, and parameters stay leaves."""
    state, plain = small(op), small(op)
    for tensor in (t for ts in vars(state).values() for t in ts):
        tensor.requires_grad_()
    scalars = Scalars().as_tensors()
    for scalar in (scalars.lambda_reg, scalars.lr, scalars.grad_scale):
        scalar.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = call(functional, op, state, scalars).value
    assert value is None or not value.requires_grad
    assert all(t.is_leaf and t.requires_grad for t in written(op, state))
    call(functional, op, plain)
    assert all(torch.equal(a, b) for a, b in zip(written(op, state), written(op, plain)))  # noqa: B905


# -- Version counters ---------------------------------------------------------------------------
# Functions that write skip the dispatcher's upper half where nobody is in it.
@each_op
@each_caller
def test_versions_rise_where_written_and_nowhere_else(op: str, caller: Callable) -> None:
    state = small(op)
    caller(op, state)
    for name, tensors in lists_of(op, state).items():
        assert [t._version for t in tensors] == [int(name in OPERATORS[op].written)] * len(tensors)


class SeenByDispatchMode(TorchDispatchMode):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def count_a_write(argument: Any) -> None:
    (argument if isinstance(argument, Tensor) else argument[0]).add_(0)


class SeenByFunctionMode(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if isinstance(func, torch._ops.OpOverload):
            self.seen.append(func.name())
            count_a_write(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "rise"), [(SeenByDispatchMode, 1), (SeenByFunctionMode, 2)])
@each_writing_op
def test_modes_see_the_call(op: str, mode: type, rise: int) -> None:
    state, plain = small(op), small(op)
    with mode() as watcher:
        call_function(op, state)
    call_function(op, plain)
    assert watcher.seen.count(f"mas_ext::{OPERATORS[op].function}") == 1
    assert versions(op, state)[0] == rise
    assert_states_close(state, plain)


class Watched(Tensor):
    """A subclass that looks at the functions it is given to."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if isinstance(func, torch._ops.OpOverload):
            with torch._C.DisableTorchFunctionSubclass():
                count_a_write(args[0])
        return super().__torch_function__(func, types, args, kwargs)


@each_writing_op
def test_subclasses_see_the_call(op: str) -> None:
    for name in OPERATORS[op].lists:
        state = small(op)
        getattr(state, name)[:] = [t.as_subclass(Watched) for t in getattr(state, name)]
        call_function(op, state)
        assert versions(op, state)[0] == 2, name


@each_writing_op
@each_caller
def test_wrapper_subclasses_are_written(op: str, caller: Callable) -> None:
    states = [small(op, seed=seed) for seed in (0, 1)]
    lists = {
        name: [TwoTensor(*ts) for ts in zip(*(getattr(s, name) for s in states), strict=True)]
        for name in STATE_LISTS
    }
    pairs = State(**lists)
    caller(op, pairs)
    assert set(versions(op, pairs)) == {1}
    for seed, state in enumerate(states):
        plain = small(op, seed=seed)
        call_function(op, plain)
        assert_states_close(state, plain)


@each_writing_op
@each_caller
def test_fake_tensors_have_versions(op: str, caller: Callable) -> None:
    with FakeTensorMode():
        state = small(op).map(torch.empty_like)
        before = versions(op, state)
        caller(op, state)
        assert versions(op, state) == [version + 1 for version in before]


@each_writing_op
@each_caller
def test_tensors_of_inference_mode_are_written_outside_it(op: str, caller: Callable) -> None:
    with torch.inference_mode():
        state = small(op)
    plain = small(op)
    caller(op, state)
    caller(op, plain)
    assert_states_close(state, plain)


@pytest.mark.parametrize("pre_dispatch", [False, True])
@each_writing_op
def test_make_fx_records_one_call(op: str, pre_dispatch: bool) -> None:
    def step(lists: dict[str, list[Tensor]]) -> Tensor | None:
        return call_function(op, State(**lists)).value

    state, plain = small(op), small(op)
    traced = make_fx(step, pre_dispatch=pre_dispatch)(dict(vars(small(op))))
    calls = [node for node in traced.graph.nodes if str(node.target).startswith("mas_ext.")]
    assert [str(node.target) for node in calls] == [f"mas_ext.{OPERATORS[op].function}.default"]
    traced(dict(vars(state)))
    step(dict(vars(plain)))
    assert_states_close(state, plain)


def vmapped(caller: Callable, op: str) -> None:
    def step(first: Tensor) -> None:
        state = small(op)
        getattr(state, OPERATORS[op].written[0])[0] = first
        caller(op, state)

    torch.func.vmap(step)(torch.zeros(2, *written(op, small(op))[0].shape))


def differentiated(caller: Callable, op: str) -> Tensor:
    def loss(first: Tensor) -> Tensor:
        state, copy = small(op), first * 2
        getattr(state, OPERATORS[op].written[0])[0] = copy
        caller(op, state)
        return copy.square().sum()

    return torch.func.grad(loss)(torch.ones_like(written(op, small(op))[0]))


@pytest.mark.parametrize("transformed", [vmapped, differentiated])
@each_writing_op
def test_transforms_give_what_they_give_of_the_operator(op: str, transformed: Callable) -> None:
    def outcome(caller: Callable) -> Any:
        try:
            return transformed(caller, op)
        except Exception as error:
            return type(error), str(error)

    mine, theirs = outcome(call_function), outcome(call_operator)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(mine, theirs)
    else:
        assert mine == theirs


# -- torch.compile ---------------------------------------------------------------------------------
Lists = dict[str, list[Tensor]]


def training_step(op: str) -> Callable[[Lists, Scalars], list[Tensor]]:
    """A function around the operator, with work before and after it; one writes in place."""

    def step(lists: Lists, scalars: Scalars) -> list[Tensor]:
        changed = {
            name: ts if name in (*OPERATORS[op].written, "omega_scales") else [t * 1 for t in ts]
            for name, ts in lists.items()
        }
        scalars = Scalars(**{**scalars.by_name(), "lambda_reg": 2 * scalars.lambda_reg})
        value, tensors = call(functional, op, State(**changed), scalars)
        new = [] if op in WRITING else [t + 1 for t in tensors]
        return new + ([] if value is None else [value * 2])

    return step


def compile_and_count(
    function: Callable, backend: str
) -> tuple[Callable, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def check_compiled(
    op: str,
    make: Callable[[], State],
    scalars: list[Scalars],
    backend: str = "aot_eager",
    compilations: int = 1,
) -> None:
    """Compiled equals eager, writes only where it should, and is compiled no more than that."""
    step = training_step(op)
    compiled, counter = compile_and_count(step, backend)
    counts = set()
    for one in scalars:
        mine, theirs = make(), make()
        results, expected = compiled(dict(vars(mine)), one), step(dict(vars(theirs)), one)
        torch.testing.assert_close(results, expected)
        assert_states_close(mine, theirs)
        counts.add(counter.frame_count)
    assert len(counts) <= compilations


STRENGTHS = [Scalars(lambda_reg=strength, lr=strength / 3) for strength in (0.5, 2.0, 7.0)]
# Every kind of signature with the backend that compiles; it takes seconds for each.
INDUCTOR = ["penalty_and_grad", "add_penalty_grad_", "accumulate_outer_", "low_rank_penalty_grad_"]


@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, "aot_eager") for op in ALL] + [(op, "inductor") for op in INDUCTOR],
)
def test_compiled_equals_eager_and_new_strengths_do_not_recompile(op: str, backend: str) -> None:
    check_compiled(op, lambda: small(op), [s.as_tensors() for s in STRENGTHS], backend)
    if backend != "inductor" and "nesterov" not in op:  # a number becomes symbolic at the second
        numbers = STRENGTHS if op in ("penalty", "proximal_step_") else STRENGTHS[:1]
        check_compiled(op, lambda: small(op, torch.bfloat16), numbers, compilations=len(numbers))


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("op", [*PENALTY_OPS, "momentum gradient", "adamw proximal"])
def test_compiled_with_a_kept_omega(op: str, kept: str) -> None:
    sample = Sample("bfloat16", "255_256_257", kept=kept)
    make = partial(sample.make, OPERATORS[op].moments)
    check_compiled(op, make, [s.as_tensors() for s in STRENGTHS[:2]])


@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, "aot_eager") for op in DIFFERENTIABLE] + [("penalty", "inductor")],
)
def test_compiled_backward_is_autograds(op: str, backend: str) -> None:
    def loss(module: ModuleType, lists: Lists, strength: Tensor) -> Tensor:
        value, grads = call(module, op, State(**lists), Scalars(strength))
        return 3 * value + sum((grad**2).sum() for grad in grads)

    compiled, counter = compile_and_count(lambda *inputs: loss(functional, *inputs), backend)
    for strength in (0.5, 2.0):
        mine, theirs = small(op), small(op)
        for param in (*mine.params, *theirs.params):
            param.requires_grad_()
        compiled(dict(vars(mine)), torch.tensor(strength)).backward()
        loss(reference, dict(vars(theirs)), torch.tensor(strength)).backward()
        for param, expected in zip(mine.params, theirs.params, strict=True):
            torch.testing.assert_close(param.grad, expected.grad)
    assert counter.frame_count == 1


def test_every_pair_of_dtype_and_layout_is_in_the_record() -> None:
    """Otherwise the pairwise selection has lost its point."""
    for op in [*OPS, *OUTER_OPS, *LOW_RANK_OPS]:
        found = samples(op)
        for layout in {s.layout for s in found}:
            assert {s.dtype for s in found if s.layout == layout} == set(DTYPES), layout
        if OPERATORS[op].takes_lists:
            assert {s.layout for s in found} == set(LAYOUTS)
        if OPERATORS[op].has_penalty:
            assert {s.kept for s in found} == {None, *KEPT}
