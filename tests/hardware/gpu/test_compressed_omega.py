"""An Ω stored in bfloat16 or in codes, on a GPU: a neighbour of test_operators.py."""

from __future__ import annotations

import pytest
import torch

import mas_ext
from mas_ext.precision import num_scales
from tests.hardware.gpu.test_operators import (
    BEYOND,
    DEVICE,
    REHEARSAL,
    VECTOR,
    assert_same_bits_from_run_to_run,
    check,
    skip_without_memory,
)
from tests.support.exact import assert_value_near
from tests.support.operators import ALL, OPERATORS, PENALTY_OPS, make
from tests.support.tensors import DTYPES, KEPT, State, behind

NOT_DOUBLE = {name: dtype for name, dtype in DTYPES.items() if dtype != torch.float64}
HAVE_PENALTY = [op for op in ALL if OPERATORS[op].has_penalty]
each_penalty = pytest.mark.parametrize("op", HAVE_PENALTY)
each_op = pytest.mark.parametrize("op", PENALTY_OPS)
each_dtype = pytest.mark.parametrize("dtype", NOT_DOUBLE.values(), ids=NOT_DOUBLE)
each_kept = pytest.mark.parametrize("kept", KEPT)
# Around a block of codes and a chunk; a chunk that begins within the codes, and several.
SHAPES = [(1,), (255,), (256,), (257,), (33, 31), (8191,), (8193,), (0,), (16640,), (4, 8, 5, 5)]
TENSORS = 120 if REHEARSAL else 700 * 12  # of each kind more than one launch holds
SIDE = 100 if REHEARSAL else 1000


@each_dtype
@each_kept
@each_penalty
def test_around_blocks(op: str, kept: str, dtype: torch.dtype) -> None:
    check(op, make(op, [dtype] * len(SHAPES), SHAPES, device=DEVICE, kept=kept))


@each_dtype
@each_kept
@each_op
def test_at_every_distance_from_a_vector_boundary(op: str, kept: str, dtype: torch.dtype) -> None:
    """Vectors that end in the next block of codes; then lists that have no boundary in common."""
    vector = VECTOR // dtype.itemsize
    omega = {"omega", "omega_scales"}
    for elements in (1, vector) if REHEARSAL else range(1, vector + 1):
        for shifted in ({"params", "anchors", "grads", *omega}, {"params", "grads"}, omega):
            state = make(op, [dtype] * 2, [(8193,), (700,)], device=DEVICE, kept=kept)
            for name in shifted:
                setattr(state, name, [behind(t, elements) for t in getattr(state, name)])
            check(op, state)


@each_op
def test_every_kind_in_one_list(op: str) -> None:
    """Beside values of every dtype, in more tensors than a launch of any kind holds."""
    every = [*DTYPES.values()]
    dtypes = [every[n % 4] for n in range(TENSORS)]
    shapes = [(n % 97 if n % 50 else 8195,) for n in range(TENSORS)]
    kinds = [make(op, dtypes, shapes, device=DEVICE, kept=kept) for kept in (None, *KEPT)]
    state: State = kinds[0]
    state.omega = [kinds[n // 4 % 3].omega[n] for n in range(TENSORS)]
    none = torch.empty(0, device=DEVICE)
    scales = kinds[2].omega_scales
    state.omega_scales = [scales[n] if n // 4 % 3 == 2 else none for n in range(TENSORS)]
    check(op, state)


@each_kept
@each_op
def test_results_are_the_same_bits_from_run_to_run(op: str, kept: str) -> None:
    shapes = [(SIDE, SIDE), (16385,)]
    assert_same_bits_from_run_to_run(
        op, lambda: make(op, [torch.float32] * 2, shapes, device=DEVICE, kept=kept)
    )


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
