"""The operators on a GPU, judged on the CPU: part of the step `equivalence` of `make gpu`.

Collected only where MAS_EXT_TEST_DEVICE names a device (see conftest.py). On ``cuda`` a missing GPU
or missing kernels are failures. On ``cpu`` this is a rehearsal: every test that can runs in small.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import mas_ext
from tests.hardware.gpu import checks
from tests.support import abs_matmul
from tests.support.exact import assert_value_near
from tests.support.operators import (
    ALL,
    OPERATORS,
    OPS,
    STEPS,
    Outcome,
    Scalars,
    assert_right,
    call,
    exact_value,
    make,
    samples,
    small,
)
from tests.support.tensors import DTYPES, State, assert_gaps_untouched, behind

DEVICE = os.environ["MAS_EXT_TEST_DEVICE"]
REHEARSAL = DEVICE == "cpu"

LISTS = [op for op in ALL if OPERATORS[op].takes_lists]
each_op = pytest.mark.parametrize("op", LISTS)
each_operator = pytest.mark.parametrize("op", ALL)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
needs_gpu = pytest.mark.skipif(REHEARSAL, reason=checks.NEEDS_GPU)


def check(op: str, state: State, scalars: Scalars = Scalars(), what: str = "") -> Outcome:  # noqa: B008
    """Runs an operator on what is on the device, and judges all that came of it in float64."""
    before = state.copy()
    outcome = call(mas_ext.functional, op, state, scalars)
    assert_right(op, before, outcome, scalars, what=what)
    for tensor in outcome.tensors:
        assert_gaps_untouched(tensor)
    return outcome


def assert_same_bits_from_run_to_run(op: str, fresh: Any) -> None:
    runs = []
    for _ in range(3):
        outcome = call(mas_ext.functional, op, fresh())
        runs.append([t for t in (outcome.value, *outcome.tensors) if t is not None])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@needs_gpu
def test_there_is_a_gpu_and_kernels_for_it() -> None:
    assert torch.cuda.is_available()
    assert mas_ext.build_info()["cuda_kernels"]


# ================================================================================================
# Samples
# ================================================================================================
@pytest.mark.parametrize(("op", "sample"), [(op, s) for op in ALL for s in samples(op)], ids=str)
def test_against_the_oracle(op: str, sample: Any) -> None:
    check(op, sample.make(OPERATORS[op].moments, DEVICE))


# The CUDA kernel's tiles are 64 × 64; it stages 16 (sample, position) pairs at a time.
@pytest.mark.parametrize("layout", abs_matmul.LAYOUTS)
@each_dtype
def test_abs_matmul_around_its_tiles(dtype: torch.dtype, layout: str) -> None:
    for size in (abs_matmul.Size(3, 5, 63, 65), abs_matmul.Size(2, 8, 64, 128)):
        problem = abs_matmul.make(size, dtype, layout, device=DEVICE)
        check("accumulate_abs_matmul_", problem, what=str(size))


VECTOR = 16  # bytes


@each_dtype
@each_op
def test_views_at_every_distance_from_a_vector_boundary(op: str, dtype: torch.dtype) -> None:
    """All lists off by as many elements, which can still be walked by vectors; then one alone."""
    for elements in range(1, VECTOR // dtype.itemsize):
        for shifted in ("all", *OPERATORS[op].lists):
            state = make(op, [dtype] * 2, [(8193,), (37,)], device=DEVICE)
            for name in OPERATORS[op].lists:
                if shifted in ("all", name):
                    setattr(state, name, [behind(t, elements) for t in getattr(state, name)])
            check(op, state)


@each_op
def test_mixed_dtypes_in_one_list(op: str) -> None:
    dtypes = [*DTYPES.values()] * 3
    shapes = [(8193,), (5, 7), (), (0,), (17,), (128, 65), (1,), (3,), (33,), (16384,), (2,), (9,)]
    check(op, make(op, dtypes, shapes, device=DEVICE))


@each_op
def test_more_tensors_than_one_launch_holds(op: str) -> None:
    """For a step, each parameter at another count; empty ones are counted."""
    shapes = [(n % 97,) for n in range(3000)]
    dtypes = [torch.bfloat16 if n % 7 == 0 else torch.float32 for n in range(3000)]
    check(op, make(op, dtypes, shapes, device=DEVICE))


@each_op
def test_results_are_the_same_bits_from_run_to_run(op: str) -> None:
    shapes = [(3, 1000, 1000), (17,), (16385,)]
    assert_same_bits_from_run_to_run(
        op, lambda: make(op, [torch.float32] * 3, shapes, device=DEVICE)
    )


def test_abs_matmul_gives_the_same_bits_from_run_to_run() -> None:
    size = abs_matmul.Size(32, 49, 300, 500)
    assert_same_bits_from_run_to_run(
        "accumulate_abs_matmul_", lambda: abs_matmul.make(size, device=DEVICE)
    )


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
    if REHEARSAL:
        return
    torch.cuda.empty_cache()
    needed = 1.1 * BEYOND * bytes_per_element
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{checks.NOT_HERE}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free")


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


# ================================================================================================
# Streams, devices, scalars
# ================================================================================================
@contextmanager
def behind_a_long_kernel() -> Iterator[None]:
    """A stream of its own that is busy: what doesn't wait for it comes too early."""
    if REHEARSAL:
        yield
        return
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
@each_operator
def test_on_a_device_that_is_not_the_current(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{checks.NOT_HERE}: one GPU, and this needs two")
    outcome = check(op, small(op, device="cuda:1"))
    results = [t for t in (outcome.value, *outcome.tensors) if t is not None]
    assert all(t.device == torch.device("cuda:1") for t in results)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", [op for op in LISTS if OPERATORS[op].has_penalty])
def test_scalars_as_tensors(op: str, kind: torch.dtype, where: str) -> None:
    device = DEVICE if where == "device" else "cpu"
    scalars = Scalars(found_inf=0.0).as_tensors(kind, device)
    for dtype in DTYPES.values():
        state = make(op, [dtype] * 2, [(9000,), (5,)], device=DEVICE)
        state.steps = [counts.to(kind) for counts in state.steps]
        check(op, state, scalars)


@pytest.mark.parametrize("op", STEPS)
@each_dtype
@pytest.mark.parametrize("kept", [None, "uint8"])
def test_a_skipped_step_keeps_every_bit(op: str, dtype: torch.dtype, kept: str | None) -> None:
    for found in (1.0, torch.tensor(2.0, device=DEVICE)):
        state = make(op, [dtype] * 3, [(9000,), (0,), (5,)], device=DEVICE, kept=kept)
        for grad in state.grads:
            grad.fill_(math.nan)
        before = state.copy()
        outcome = call(mas_ext.functional, op, state, Scalars(found_inf=found))
        for name in OPERATORS[op].written:
            for now, old in zip(getattr(state, name), getattr(before, name), strict=True):
                assert torch.equal(now.cpu(), old)
        exact = exact_value(op, before, outcome, Scalars())
        assert_value_near(outcome.value.cpu(), exact, dtype=outcome.value.dtype)


@needs_gpu
@pytest.mark.parametrize(
    ("op", "name"),
    [("penalty", "params"), ("adam gradient", "grads"), ("accumulate_abs_matmul_", "right")],
)
def test_tensors_on_different_devices_are_refused(op: str, name: str) -> None:
    state = small(op, device="cuda")
    setattr(state, name, [t.cpu() for t in getattr(state, name)])
    with pytest.raises(RuntimeError, match=rf"{name}.*one device|one device"):
        call(mas_ext.functional, op, state)
