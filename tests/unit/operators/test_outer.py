"""accumulate_outer_: what its formula implies, and the sizes of its kernels' tiles.

Its results for all samples are in test_results.py, what it refuses in test_refusals.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mas_ext import functional, reference
from tests.support.operators import OUTER_OPS, assert_right, call
from tests.support.outer import LAYOUTS, SIZES, Size, make
from tests.support.tensors import DTYPES, State, accumulation_dtype

each_op = pytest.mark.parametrize("op", OUTER_OPS)
each_module = pytest.mark.parametrize("module", [functional, reference], ids=["op", "reference"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(op: str, state: State, module: Any) -> None:
    before = state.copy()
    assert_right(op, before, call(module, op, state))


def result(op: str, state: State) -> Tensor:
    (omega,) = call(functional, op, state).tensors
    return omega


@each_op
@each_module
def test_blocks_of_a_large_omega(op: str, module: Any) -> None:
    check(op, make(Size(3, 20, 700, 1100), layout="positions_last"), module)


@each_op
@each_module
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["left", "right", "number"])
def test_expanded_factors(op: str, module: Any, name: str, dim: int) -> None:
    state = make(Size(5, 6, 21, 34))
    (factor,) = state.right if name == "number" else getattr(state, name)
    one = torch.tensor(0.7) if name == "number" else factor.narrow(dim, 0, 1)
    setattr(state, "right" if name == "number" else name, [one.expand_as(factor)])
    check(op, state, module)


@each_op
@each_module
def test_factors_may_share_memory(op: str, module: Any) -> None:
    base = torch.randn(4, 7, 20)
    check(
        op, State(omega=[torch.zeros(15, 15)], left=[base[..., :15]], right=[base[..., 5:]]), module
    )


@each_op
@each_module
def test_omega_and_a_factor_may_interleave(op: str, module: Any) -> None:
    """They lie in one base, place by place, and never meet."""
    base = torch.randn(4, 5, 2, 6)
    omega, left = base[0, :, 0], base[:3, :, 1]
    check(op, State(omega=[omega], left=[left[..., :5]], right=[torch.randn(3, 5, 6)]), module)


@each_op
@each_dtype
@pytest.mark.parametrize("size", [Size(32, 16, 130, 300), Size(300, 1, 90, 300)], ids=str)
def test_same_bits_for_any_number_of_threads(op: str, size: Size, dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(result(op, make(size, dtype, "positions_last")))
    assert all(torch.equal(results[0], other) for other in results[1:])


@each_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_layout(op: str, layout: str) -> None:
    size = Size(5, 20, 37, 61)
    assert torch.equal(result(op, make(size, layout=layout)), result(op, make(size)))


PATCHES = {  # of Ω [p, channels, 2, 3], left [b, h, w, p], right [b, h, w, channels, 2, 3]
    "as_they_are": lambda omega, left, right: (omega, left, right),
    "channels_last": lambda omega, left, right: (
        omega.movedim(1, -1),
        left.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        right.movedim(3, -1),
    ),
    "positions_turned": lambda omega, left, right: (
        omega.contiguous(memory_format=torch.channels_last),
        left.transpose(1, 2),
        right.transpose(1, 2),
    ),
}


@each_op
@each_module
@each_dtype
@pytest.mark.parametrize("order", PATCHES)
@pytest.mark.parametrize(
    ("channels", "height", "width"), [(1, 4, 5), (5, 4, 5), (32, 3, 8), (100, 2, 3), (4, 17, 18)]
)
def test_patches_of_an_image(
    op: str, module: Any, dtype: torch.dtype, order: str, channels: int, height: int, width: int
) -> None:
    """A view, in which memory overlaps; laid out, they are one matrix of columns per sample."""
    image = torch.randn(3, channels, height + 1, width + 2).to(dtype)
    steps = image.stride()
    patches = image.as_strided(
        (3, height, width, channels, 2, 3), (steps[0], *steps[2:], *steps[1:])
    )
    flat = State(
        omega=[torch.rand(9, channels * 6).to(accumulation_dtype(dtype))],
        left=[torch.randn(3, height * width, 9).to(dtype)],
        right=[patches.reshape(3, height * width, -1)],
    )
    omega = flat.omega[0].unflatten(1, (channels, 2, 3))
    left = flat.left[0].unflatten(1, (height, width))
    seen = PATCHES[order](omega.clone(), left, patches)
    results = call(module, op, State(omega=[seen[0]], left=[seen[1]], right=[seen[2]]))
    (turned,) = results.tensors
    back = turned.movedim(-1, 1) if order == "channels_last" else turned
    assert_right(op, flat, results._replace(tensors=[back.reshape(9, -1)]))


@each_op
@each_module
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(op: str, module: Any, bad: float) -> None:
    state = make(Size(3, 5, 6, 40))
    state.left[0][1, 2, 3] = bad
    (value,) = call(module, op, state).tensors
    assert not bool(value[3].isfinite().any())
    assert bool(value[[0, 1, 2, 4, 5]].isfinite().all())


def test_sizes_cover_every_remainder() -> None:
    """Of the tiles' widths: otherwise the table has lost its point."""
    assert {size.p % 8 for size in SIZES} == set(range(8))
    for width in (4, 8):
        assert len({size.d % width for size in SIZES}) == width
