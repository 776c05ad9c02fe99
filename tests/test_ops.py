"""The operators as PyTorch sees them: schemas, fakes, autograd, torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
from tests.cases import (
    ARGUMENTS,
    KEPT,
    LAYOUTS,
    OP_CASES,
    OPS,
    PENALTY_OPS,
    READING_OPS,
    WRITING_OPS,
    Case,
    Scalars,
    State,
    arguments,
    assert_value_near,
    exact_penalty,
    make_state,
    raw_arguments,
    written_argument,
)

# ================================================================================================
# opcheck: schema, autograd registration, fake kernel, and tracing with dynamic shapes
# ================================================================================================
# Tracing does not depend on the values, so large tensors would only take time.
OPCHECK_SHAPES = ["empty_list", "zero_size", "0_dim", "conv"]
OPCHECK_CASES = [(op, case) for op, case in OP_CASES if case.shapes_name in OPCHECK_SHAPES]


@pytest.mark.parametrize(("op", "case"), OPCHECK_CASES, ids=str)
def test_opcheck(op: str, case: Case) -> None:
    inputs = raw_arguments(op, case.state())
    opcheck(getattr(torch.ops.mas_ext, op).default, tuple(inputs))


@pytest.mark.parametrize("wanting", ["params", "anchors", "omega", "lambda_reg", "all"])
@pytest.mark.parametrize("op", READING_OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_opcheck_with_gradients(op: str, wanting: str, dtype: str) -> None:
    inputs = raw_arguments(op, Case(dtype, "odd", "contiguous").state())
    names = ["params", "anchors", "omega", "omega_scales", "lambda_reg"]
    for name, argument in zip(names, inputs, strict=True):
        if wanting in (name, "all"):
            for tensor in [argument] if isinstance(argument, Tensor) else argument:
                tensor.requires_grad_()
    opcheck(getattr(torch.ops.mas_ext, op).default, tuple(inputs))


def test_the_optional_scale_may_be_left_out() -> None:
    state = make_state([torch.float32], [(5,)])
    inputs = raw_arguments("add_penalty_grad_", state)
    opcheck(torch.ops.mas_ext.add_penalty_grad_.default, (*inputs[:-1], None))
    opcheck(torch.ops.mas_ext.add_penalty_grad_.default, tuple(inputs[:-1]))


# ================================================================================================
# Without memory: fake tensors of a GPU that need not be there, and meta tensors
# ================================================================================================
def assert_results_are_like(results: Sequence[Tensor], state: State, device: torch.device) -> None:
    value, *grads = results
    assert (value.device, value.dtype, value.shape) == (device, torch.float64, ())
    for grad, param in zip(grads, state.params, strict=True):
        assert (grad.device, grad.dtype, grad.shape) == (device, param.dtype, param.shape)


def call_everything(state: State, strength: Tensor | float, device: torch.device) -> None:
    """Every operator on lists, and accumulate_abs_matmul_; what they return is like their input."""
    scalars = Scalars(strength, strength, strength)
    functional.accumulate_importance_(*arguments("accumulate_importance_", state, scalars))
    for op in PENALTY_OPS:
        result = getattr(functional, op)(*arguments(op, state, scalars))
        value, grads = result if op == "penalty_and_grad" else (result, state.params)
        assert_results_are_like([value, *grads], state, device)
    omega, left, right = (torch.empty(n, device=device) for n in ((5, 7), (2, 3, 5), (2, 3, 7)))
    functional.accumulate_abs_matmul_(omega, left, right, 0.5)


def empty_state(device: torch.device) -> State:
    """Lists of both accumulation dtypes, so that a value has to be float64."""
    state = make_state([torch.bfloat16, torch.float64, torch.float32], [(3, 4), (5,), ()])
    return State(*([t.to(device) for t in tensors] for tensors in state.lists().values()))


@pytest.mark.parametrize("where", ["cpu", "device", "number"])
@pytest.mark.parametrize("name", ["cuda:0", "meta"])
def test_without_memory(name: str, where: str) -> None:
    device = torch.device(name)
    with FakeTensorMode() if name == "cuda:0" else nullcontext():
        strength: Tensor | float = 0.5
        if where != "number":
            strength = torch.tensor(0.5, device=device if where == "device" else "cpu")
        call_everything(empty_state(device), strength, device)


def test_fake_tensors_of_a_gpu_are_checked_as_real_ones_are() -> None:
    with FakeTensorMode():
        state = empty_state(torch.device("cuda:0"))
        state.anchors[1] = state.anchors[1].cpu()
        with pytest.raises(
            RuntimeError, match=r"anchors\[1\] is on cpu but params\[0\] is on cuda"
        ):
            functional.penalty(state.params, state.anchors, state.omega, 0.5)


def test_fake_results_of_an_empty_list_are_where_the_strength_is() -> None:
    with FakeTensorMode():
        value = functional.penalty([], [], [], torch.tensor(0.5, device="cuda"))
    assert (value.device.type, value.dtype, value.shape) == ("cuda", torch.float32, ())


# ================================================================================================
# Gradients
# ================================================================================================
SHAPES = [(3,), (2, 2), (), (0,)]


def double_inputs(layout: str = "contiguous") -> list[Tensor]:
    """θ, θ* and Ω of every parameter, then λ, as one flat list of float64 leaves."""
    state = make_state([torch.float64] * len(SHAPES), SHAPES, LAYOUTS[layout])
    scale = torch.tensor(0.7, dtype=torch.float64)
    return [t.requires_grad_() for t in (*state.params, *state.anchors, *state.omega, scale)]


def flat(op: str) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as a function of the flat list, for gradcheck."""

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        n = len(SHAPES)
        lists = [list(inputs[k * n : (k + 1) * n]) for k in range(3)]
        result = getattr(functional, op)(*lists, inputs[-1])
        return (result,) if isinstance(result, Tensor) else (result[0], *result[1])

    return function


@pytest.mark.parametrize("layout", ["contiguous", "each_differently"])
@pytest.mark.parametrize("op", READING_OPS)
def test_gradcheck(op: str, layout: str) -> None:
    assert gradcheck(flat(op), double_inputs(layout))


@pytest.mark.parametrize("op", READING_OPS)
def test_gradgradcheck(op: str) -> None:
    assert gradgradcheck(flat(op), double_inputs())


def subsets() -> dict[str, list[int]]:
    """Which of the flat inputs require gradients."""
    n = len(SHAPES)
    whole = {
        name: range(k * n, (k + 1) * n) for k, name in enumerate(["params", "anchors", "omega"])
    }
    return {
        **{name: list(indices) for name, indices in whole.items()},
        "lambda": [3 * n],
        "one_param": [1],
        "one_param_and_another_omega": [0, 2 * n + 1],
        "anchors_and_lambda": [*whole["anchors"], 3 * n],
    }


@pytest.mark.parametrize("chosen", subsets().values(), ids=subsets())
@pytest.mark.parametrize("op", READING_OPS)
def test_gradcheck_with_some_inputs_only(op: str, chosen: list[int]) -> None:
    inputs = [t.detach().requires_grad_(k in chosen) for k, t in enumerate(double_inputs())]
    assert gradcheck(flat(op), inputs)
    assert gradgradcheck(flat(op), inputs)


def gradients(module, state: State, strength: Tensor) -> Sequence[Tensor]:
    leaves = [*state.params, *state.anchors, *state.omega, strength]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    n = len(state.params)
    value = module.penalty(leaves[:n], leaves[n : 2 * n], leaves[2 * n : 3 * n], leaves[-1])
    return torch.autograd.grad(3 * value, leaves)


# One rounding to the dtype in each of two computations.
AUTOGRAD_RTOL = {"float32": 2e-6, "float64": 1e-14, "bfloat16": 2**-7, "float16": 2**-10}


@pytest.mark.parametrize("layout", ["contiguous", "each_differently"])
@pytest.mark.parametrize("dtype", AUTOGRAD_RTOL)
def test_backward_is_the_references(dtype: str, layout: str) -> None:
    state, strength = Case(dtype, "mixed", layout).state(), torch.tensor(0.7)
    mine, theirs = (gradients(module, state, strength) for module in (functional, reference))
    for actual, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=AUTOGRAD_RTOL[dtype], atol=1e-7)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("op", READING_OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_beside_a_kept_omega(op: str, kept: str, dtype: str) -> None:
    """First and second ones, of θ, θ*, λ and an Ω that has one, as the reference's autograd has."""

    def both_orders(module: ModuleType) -> list[Tensor]:
        state = Case(dtype, "mixed", "each_differently", kept).state()
        strength = torch.tensor(0.7)
        leaves = [*state.params, *state.anchors, strength]
        leaves += [o for o in state.omega if o.is_floating_point()]
        for leaf in leaves:
            leaf.requires_grad_()
        result = getattr(module, op)(
            *arguments(op, state, Scalars(strength)), omega_scales=state.omega_scales
        )
        value, grads = result if op == "penalty_and_grad" else (result, [])
        total = 3 * value + sum((grad.float() ** 2).sum() for grad in grads)
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.float().square().sum() for g in first), leaves)
        return [*first, *second]

    for mine, theirs in zip(both_orders(functional), both_orders(reference), strict=True):
        bound = 2**-5 if "bfloat16" in (str(mine.dtype)[6:], dtype) else 1e-5
        largest = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound * largest)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("op", PENALTY_OPS)
def test_compiled_with_a_kept_omega(op: str, kept: str) -> None:
    def step(lists: Lists, strength: Tensor) -> list[Tensor]:
        known = {**lists, "lambda_reg": strength, "lr": strength, "grad_scale": strength}
        scales = lists.get("omega_scales", [])
        inputs = [known[name] for name in ARGUMENTS[op]]
        result = getattr(functional, op)(*inputs, omega_scales=scales)
        value, grads = result if op == "penalty_and_grad" else (result, [])
        return [value * 2, *grads]

    def make() -> Lists:
        shapes = [(33,), (4, 5), (300,)]
        return make_state([torch.bfloat16] * 3, shapes, kept=kept).lists()

    compiled, counter = compile_and_count(step, "aot_eager")
    for strength in (0.5, 2.0):
        mine, theirs = make(), make()
        results = compiled(mine, torch.tensor(strength))
        torch.testing.assert_close(results, step(theirs, torch.tensor(strength)))
        torch.testing.assert_close(mine, theirs)
    assert counter.frame_count == 1


def test_gradient_of_the_gradients_alone() -> None:
    """Backward where the value takes no part, and where one of the gradients does not."""
    inputs = double_inputs()
    results = flat("penalty_and_grad")(*inputs)
    (curvature,) = torch.autograd.grad(results[1].sum(), inputs[0])
    omega, strength = inputs[2 * len(SHAPES)], inputs[-1]
    torch.testing.assert_close(curvature, strength * omega, rtol=1e-14, atol=0)


@pytest.mark.parametrize("op", READING_OPS)
def test_negative_strength_in_a_tensor(op: str) -> None:
    """What a backward pass with a negative incoming gradient calls."""
    state = make_state([torch.float32], [(17,)])
    strength = torch.tensor(-0.5)
    result = getattr(functional, op)(state.params, state.anchors, state.omega, strength)
    value = result if isinstance(result, Tensor) else result[0]
    assert_value_near(value, exact_penalty(state, strength))
    assert float(value) < 0


@pytest.mark.parametrize("op", WRITING_OPS)
def test_writing_operators_record_nothing(op: str) -> None:
    state = make_state([torch.float32], [(5,)])
    for tensors in state.lists().values():
        tensors[0].requires_grad_()
    inputs = arguments(op, state, Scalars().as_tensors())
    for scalar in inputs:
        if isinstance(scalar, Tensor):
            scalar.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = getattr(functional, op)(*inputs)
    assert value is None or value.grad_fn is None
    assert state.lists()[written_argument(op)][0].grad_fn is None


# ================================================================================================
# Functions that write skip the dispatcher's upper half where nobody is in it, and only there
# ================================================================================================
def call_operator(op: str, inputs: list) -> Tensor | None:
    with torch.no_grad():
        scales = [[]] if op in PENALTY_OPS else []
        place = ARGUMENTS[op].index("omega") + 1
        return getattr(torch.ops.mas_ext, op)(*inputs[:place], *scales, *inputs[place:])


def call_function(op: str, inputs: list) -> Tensor | None:
    return getattr(functional, op)(*inputs)


def tensor_inputs(op: str, state: State) -> list:
    return arguments(op, state, Scalars().as_tensors())


def written_versions(op: str, state: State) -> list[int]:
    return [tensor._version for tensor in state.lists()[written_argument(op)]]


each_writing_op = pytest.mark.parametrize("op", WRITING_OPS)
each_caller = pytest.mark.parametrize("caller", [call_function, call_operator])


@each_writing_op
@each_caller
def test_a_refused_call_leaves_the_versions(op: str, caller: Callable) -> None:
    state = make_state([torch.float32] * 2, [(5,), (3, 2)])
    inputs = tensor_inputs(op, state)
    inputs[1] = [inputs[1][0], inputs[1][1].T]
    with pytest.raises(RuntimeError, match="must have one shape"):
        caller(op, inputs)
    assert written_versions(op, state) == [0, 0]


class SeenByDispatchMode(TorchDispatchMode):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class SeenByFunctionMode(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if isinstance(func, torch._ops.OpOverload):
            self.seen.append(func.name())
            args[0][0].add_(0)  # counts, too
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "rise"), [(SeenByDispatchMode, 1), (SeenByFunctionMode, 2)])
@each_writing_op
def test_modes_see_the_call(op: str, mode: type, rise: int) -> None:
    state, plain = make_state([torch.float32], [(5,)]), make_state([torch.float32], [(5,)])
    with mode() as watcher:
        call_function(op, tensor_inputs(op, state))
    call_function(op, tensor_inputs(op, plain))
    assert watcher.seen.count(f"mas_ext::{op}") == 1
    assert written_versions(op, state) == [rise]
    torch.testing.assert_close(state.lists(), plain.lists())


class Watched(Tensor):
    """A subclass that looks at the functions it is given to."""

    added = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if isinstance(func, torch._ops.OpOverload):
            with torch._C.DisableTorchFunctionSubclass():
                args[0][0].add_(0)  # counts, too
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("place", [0, 1])
@each_writing_op
def test_subclasses_see_the_call(op: str, place: int) -> None:
    state = make_state([torch.float32], [(5,)])
    inputs = tensor_inputs(op, state)
    inputs[place] = [tensor.as_subclass(Watched) for tensor in inputs[place]]
    call_function(op, inputs)
    assert written_versions(op, state) == [2]


@each_writing_op
@each_caller
def test_wrapper_subclasses_are_written(op: str, caller: Callable) -> None:
    states = [make_state([torch.float32], [(5,)], seed=seed) for seed in (0, 1)]
    pairs = State(
        *(
            [TwoTensor(*ts) for ts in zip(*lists, strict=True)]
            for lists in zip(*(state.lists().values() for state in states), strict=True)
        )
    )
    caller(op, tensor_inputs(op, pairs))
    assert written_versions(op, pairs) == [1]
    for seed, state in enumerate(states):
        plain = make_state([torch.float32], [(5,)], seed=seed)
        call_function(op, tensor_inputs(op, plain))
        torch.testing.assert_close(state.lists(), plain.lists())


@each_writing_op
@each_caller
def test_fake_tensors_have_versions(op: str, caller: Callable) -> None:
    with FakeTensorMode():
        state = make_state([torch.float32], [(5,)], device="cpu")
        before = written_versions(op, state)
        caller(op, tensor_inputs(op, state))
        assert written_versions(op, state) == [before[0] + 1]


@each_writing_op
@each_caller
def test_tensors_of_inference_mode_are_written_outside_it(op: str, caller: Callable) -> None:
    with torch.inference_mode():
        state = make_state([torch.float32], [(5,)])
    plain = make_state([torch.float32], [(5,)])
    caller(op, tensor_inputs(op, state))
    caller(op, tensor_inputs(op, plain))
    for mine, theirs in zip(state.lists().values(), plain.lists().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("pre_dispatch", [False, True])
@each_writing_op
def test_make_fx_records_one_call(op: str, pre_dispatch: bool) -> None:
    def step(*inputs: Any) -> Tensor | None:
        return call_function(op, list(inputs))

    state, plain = make_state([torch.float32], [(5,)]), make_state([torch.float32], [(5,)])
    traced = make_fx(step, pre_dispatch=pre_dispatch)(
        *tensor_inputs(op, make_state([torch.float32], [(5,)]))
    )
    calls = [node for node in traced.graph.nodes if str(node.target).startswith("mas_ext.")]
    assert [str(node.target) for node in calls] == [f"mas_ext.{op}.default"]
    traced(*tensor_inputs(op, state))
    step(*tensor_inputs(op, plain))
    torch.testing.assert_close(state.lists(), plain.lists())


def vmapped(caller: Callable, op: str, state: State) -> None:
    def step(written: Tensor) -> None:
        caller(op, [[written], *tensor_inputs(op, state)[1:]])

    torch.func.vmap(step)(torch.zeros(2, 5))


def differentiated(caller: Callable, op: str, state: State) -> Tensor:
    def loss(written: Tensor) -> Tensor:
        copy = written * 2
        caller(op, [[copy], *tensor_inputs(op, state)[1:]])
        return copy.square().sum()

    return torch.func.grad(loss)(torch.ones(5))


@pytest.mark.parametrize("transformed", [vmapped, differentiated])
@each_writing_op
def test_transforms_give_what_they_give_of_the_operator(op: str, transformed: Callable) -> None:
    def outcome(caller: Callable) -> Tensor | tuple[type, str] | None:
        try:
            return transformed(caller, op, make_state([torch.float32], [(5,)]))
        except Exception as error:
            return type(error), str(error)

    mine, theirs = outcome(call_function), outcome(call_operator)
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(mine, theirs)
    else:
        assert mine == theirs


# ================================================================================================
# torch.compile
# ================================================================================================
Lists = dict[str, list[Tensor]]


def training_step(op: str) -> Callable[[Lists, float | Tensor, float | Tensor], list[Tensor]]:
    """A function around the operator, with work before and after it; one writes in place."""

    def step(lists: Lists, lambda_reg: float | Tensor, other: float | Tensor) -> list[Tensor]:
        known = {name: [t * 1.5 for t in tensors] for name, tensors in lists.items()}
        known |= {"lambda_reg": 2 * lambda_reg, "lr": other, "grad_scale": other, "scale": 0.6}
        if op in WRITING_OPS:
            known[ARGUMENTS[op][0]] = lists[ARGUMENTS[op][0]]
        result = getattr(functional, op)(*[known[name] for name in ARGUMENTS[op]])
        value, grads = result if op == "penalty_and_grad" else (result, [])
        return [t + 1 for t in grads] + ([] if value is None else [value * 2])

    return step


def compile_and_count(
    function: Callable, backend: str
) -> tuple[Callable, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def make_lists(dtype: torch.dtype = torch.float32) -> Lists:
    return make_state([dtype] * 3, [(33,), (4, 5), ()]).lists()


each_backend = pytest.mark.parametrize("backend", ["inductor", "aot_eager"])


@each_backend
@pytest.mark.parametrize("op", OPS)
def test_compiled_equals_eager_and_new_strengths_do_not_recompile(op: str, backend: str) -> None:
    step = training_step(op)
    compiled, counter = compile_and_count(step, backend)
    for strength in (0.5, 2.0, 7.0):
        mine, theirs = make_lists(), make_lists()
        scalars = [torch.tensor(strength), torch.tensor(strength / 3)]
        results, expected = compiled(mine, *scalars), step(theirs, *scalars)
        torch.testing.assert_close(results, expected)
        torch.testing.assert_close(mine, theirs)  # written in place, and only where it should be
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", OPS)
def test_compiled_with_numbers(op: str) -> None:
    step = training_step(op)
    compiled, _ = compile_and_count(step, "aot_eager")
    mine, theirs = make_lists(torch.bfloat16), make_lists(torch.bfloat16)
    torch.testing.assert_close(compiled(mine, 0.7, 0.3), step(theirs, 0.7, 0.3))
    torch.testing.assert_close(mine, theirs)


@each_backend
@pytest.mark.parametrize("op", READING_OPS)
def test_compiled_backward_is_the_references(op: str, backend: str) -> None:
    def loss(module, lists: Lists, strength: Tensor) -> Tensor:
        result = getattr(module, op)(lists["params"], lists["anchors"], lists["omega"], strength)
        value, grads = result if op == "penalty_and_grad" else (result, [])
        return 3 * value + sum((grad**2).sum() for grad in grads)

    compiled, counter = compile_and_count(lambda *inputs: loss(functional, *inputs), backend)
    for strength in (0.5, 2.0):
        mine, theirs = make_lists(), make_lists()
        for param in (*mine["params"], *theirs["params"]):
            param.requires_grad_()
        compiled(mine, torch.tensor(strength)).backward()
        loss(reference, theirs, torch.tensor(strength)).backward()
        for param, expected in zip(mine["params"], theirs["params"], strict=True):
            torch.testing.assert_close(param.grad, expected.grad)
    assert counter.frame_count == 1
