"""What the operators' unit tests do not ask of kernels on a device; judged on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import mas_ext
from mas_ext.precision import num_scales
from tests.hardware.gpu.device import DEVICE, REHEARSAL, needs_gpu
from tests.hardware.gpu.steps import NOT_HERE
from tests.support import low_rank, outer
from tests.support.exact import assert_value_near
from tests.support.operators import (
    ALL,
    LOW_RANK_OPS,
    OPERATORS,
    OPS,
    OUTER_OPS,
    PENALTY_OPS,
    Outcome,
    Scalars,
    assert_right,
    call,
    make,
    small,
)
from tests.support.tensors import DTYPES, KEPT, State, assert_gaps_untouched, behind

LISTS = [op for op in ALL if OPERATORS[op].takes_lists]
each_op = pytest.mark.parametrize("op", LISTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(op: str, state: State, what: str = "") -> Outcome:
    """Runs an operator on what is on the device, and judges all that came of it in float64."""
    before = state.copy()
    outcome = call(mas_ext.functional, op, state)
    assert_right(op, before, outcome, what=what)
    for tensor in outcome.tensors:
        assert_gaps_untouched(tensor)
    return outcome


# ================================================================================================
# Sizes and alignments of the CUDA kernels
# ================================================================================================
# Tiles of 64 × 64; 16 (sample, position) pairs are staged at a time.
@pytest.mark.parametrize("layout", outer.LAYOUTS)
@pytest.mark.parametrize("op", OUTER_OPS)
@each_dtype
def test_outer_around_its_tiles(dtype: torch.dtype, op: str, layout: str) -> None:
    for size in (outer.Size(3, 5, 63, 65), outer.Size(2, 8, 64, 128), outer.Size(9, 1, 64, 72)):
        problem = outer.make(size, dtype, layout, device=DEVICE)
        check(op, problem, what=str(size))


# Tiles of 64 × 64; 16 ranks at a time, 32 a block; rows that are divided into parts.
@pytest.mark.parametrize("kept", [None, *KEPT])
@pytest.mark.parametrize("layout", low_rank.LAYOUTS)
@pytest.mark.parametrize("op", LOW_RANK_OPS)
@each_dtype
def test_low_rank_around_its_tiles(
    dtype: torch.dtype, op: str, layout: str, kept: str | None
) -> None:
    for size in ((63, 65, 15), (64, 128, 33), (65, 64, 70), (400, 70, 3)):
        problem = low_rank.make(low_rank.Size(*size), dtype, layout, device=DEVICE, kept=kept)
        check(op, problem, what=str(size))


VECTOR = 16  # bytes


def distances(dtype: torch.dtype) -> range | tuple[int, ...]:
    """In elements, from a vector's boundary; the last is a whole vector, beside codes."""
    vector = VECTOR // dtype.itemsize
    return (1, vector) if REHEARSAL else range(1, vector + 1)


@each_dtype
@each_op
def test_views_at_every_distance_from_a_vector_boundary(op: str, dtype: torch.dtype) -> None:
    """All lists off by as many elements, which can still be walked by vectors; then one alone."""
    for elements in distances(dtype):
        for shifted in (OPERATORS[op].lists, *([name] for name in OPERATORS[op].lists)):
            state = make(op, [dtype] * 2, [(8193,), (37,)], device=DEVICE)
            check(op, moved(state, shifted, elements))


@each_dtype
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("op", PENALTY_OPS)
def test_a_stored_omega_at_every_distance(op: str, kept: str, dtype: torch.dtype) -> None:
    """Vectors that end in the next block of codes; then lists that have no boundary in common."""
    values, omega = ["params", "anchors", "grads"], ["omega", "omega_scales"]
    for elements in distances(dtype):
        for shifted in (values + omega, ["params", "grads"], omega):
            state = make(op, [dtype] * 2, [(8193,), (700,)], device=DEVICE, kept=kept)
            check(op, moved(state, shifted, elements))


def moved(state: State, names: list[str], elements: int) -> State:
    for name in names:
        setattr(state, name, [behind(t, elements) for t in getattr(state, name)])
    return state


@each_op
def test_more_tensors_than_one_launch_holds(op: str) -> None:
    """For a step, each parameter at another count; empty ones are counted."""
    shapes = [(n % 97,) for n in range(3000)]
    dtypes = [torch.bfloat16 if n % 7 == 0 else torch.float32 for n in range(3000)]
    check(op, make(op, dtypes, shapes, device=DEVICE))


@pytest.mark.parametrize("op", PENALTY_OPS)
def test_every_kind_of_omega_in_one_list(op: str) -> None:
    """Beside values of every dtype, in more tensors than a launch of any kind holds."""
    count = 120 if REHEARSAL else 700 * 12
    every = [*DTYPES.values()]
    dtypes = [every[n % 4] for n in range(count)]
    shapes = [(n % 97 if n % 50 else 8195,) for n in range(count)]
    kinds = [make(op, dtypes, shapes, device=DEVICE, kept=kept) for kept in (None, *KEPT)]
    state: State = kinds[0]
    state.omega = [kinds[n // 4 % 3].omega[n] for n in range(count)]
    none = torch.empty(0, device=DEVICE)
    scales = kinds[2].omega_scales
    state.omega_scales = [scales[n] if n // 4 % 3 == 2 else none for n in range(count)]
    check(op, state)


# ================================================================================================
# More elements than 32 bits count
# ================================================================================================
BEYOND = 2**31 + 8193 if not REHEARSAL else 3 * 8192 + 11
SLICE = 2**27
# Where a wrong index would show: at the ends, and around what 31 bits (or a chunk) count.
PLACES = [0, 8191, 8192, BEYOND // 2, BEYOND - 8194, BEYOND - 8193, BEYOND - 1]


def constant(value: float, marks: list[float], dtype: torch.dtype) -> Tensor:
    tensor = torch.full((BEYOND,), value, dtype=dtype, device=DEVICE)
    for place, mark in zip(PLACES, marks, strict=True):
        tensor[place] = mark
    return tensor


def skip_without_memory(bytes_per_element: int) -> None:
    torch.cuda.empty_cache()
    needed = 1.1 * BEYOND * bytes_per_element
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{NOT_HERE}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free")


def assert_constant_but(tensor: Tensor, value: float, marks: list[float]) -> None:
    """Slice by slice, so that nothing of the tensor's size is made beside it."""
    others = sum(int((part != value).sum()) for part in tensor.split(SLICE))
    assert [tensor[place].item() for place in PLACES] == marks
    assert others == sum(mark != value for mark in marks)


@pytest.mark.parametrize("op", OPS)
def test_one_tensor_of_more_than_two_to_the_31_elements(op: str) -> None:
    """Constants but for a few places, so that every element's result is known exactly.

    θ = 2, θ* = 1, Ω = ½, g = 1; at the marked places θ = 3, 4, …. λ, s and ηλ are powers of two.
    """
    names = OPERATORS[op].lists
    returned = 2 if op == "penalty_and_grad" else 0
    skip_without_memory(sum(4 if name == "omega" else 2 for name in names) + returned)
    count = len(PLACES)
    thetas = [3.0 + k for k in range(count)]
    columns = {
        "params": (2.0, thetas, torch.bfloat16),
        "anchors": (1.0, [1.0] * count, torch.bfloat16),
        "omega": (0.5, [0.5] * count, torch.float32),
        "grads": (1.0, thetas, torch.bfloat16),
    }
    state = State(**{name: [constant(*columns[name])] for name in names})
    scalars = Scalars(lambda_reg=2.0, grad_scale=4.0, lr=1.0, scale=0.5)
    outcome = call(mas_ext.functional, op, state, scalars)
    by_element = {  # each as a function of the only thing that varies
        "accumulate_importance_": lambda theta, g: 0.5 + 0.5 * g,
        "accumulate_importance_ square": lambda theta, g: 0.5 + 0.5 * g**2,
        "penalty_and_grad": lambda theta, g: theta - 1,
        "add_penalty_grad_": lambda theta, g: g + 4 * (theta - 1),
        "proximal_step_": lambda theta, g: (theta + 1) / 2,
    }
    if outcome.tensors:
        formula = by_element[op]
        (written,) = outcome.tensors
        assert_constant_but(written, formula(2.0, 1.0), [formula(t, t) for t in thetas])
    if outcome.value is not None:
        after = by_element[op] if op == "proximal_step_" else lambda theta, g: theta
        squares = [(after(t, t) - 1) ** 2 for t in thetas]
        exact = 0.5 * ((BEYOND - count) * (after(2.0, 1.0) - 1) ** 2 + sum(squares))
        assert_value_near(outcome.value.cpu(), exact)


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
    assert_value_near(value.cpu(), 0.5 * (BEYOND - last) + 2.0 * last)


# ================================================================================================
# Streams, devices
# ================================================================================================
@contextmanager
def behind_a_long_kernel() -> Iterator[None]:
    """A stream of its own that is busy: what doesn't wait for it comes too early."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        yield
    torch.cuda.synchronize()


@each_op
def test_on_a_stream_that_is_not_the_default(op: str) -> None:
    before = make(op, [torch.float32] * 2, [(100_000,), (3,)])
    state = before.map(lambda t: torch.zeros_like(t, device=DEVICE))
    pairs = [
        (target, source if REHEARSAL else source.pin_memory())
        for name in vars(before)
        for target, source in zip(getattr(state, name), getattr(before, name), strict=True)
    ]
    with behind_a_long_kernel():
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        outcome = call(mas_ext.functional, op, state)
    assert_right(op, before, outcome)


@needs_gpu
@pytest.mark.parametrize("op", ALL)
def test_on_a_device_that_is_not_the_current(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{NOT_HERE}: one GPU, and this needs two")
    outcome = check(op, small(op, device="cuda:1"))
    results = [t for t in (outcome.value, *outcome.tensors) if t is not None]
    assert all(t.device == torch.device("cuda:1") for t in results)
    assert torch.cuda.current_device() == 0


@needs_gpu
@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("penalty", "params"),
        ("adam gradient", "grads"),
        ("accumulate_outer_", "right"),
        ("low_rank_penalty_grad_", "omega"),
    ],
)
def test_tensors_on_different_devices_are_refused(op: str, name: str) -> None:
    state = small(op, device="cuda")
    setattr(state, name, [t.cpu() for t in getattr(state, name)])
    with pytest.raises(RuntimeError, match=rf"{name}.*one device|one device"):
        call(mas_ext.functional, op, state)
