"""The cases that accumulate_abs_matmul_ runs through, and the float64 oracle it is judged by.

THE place to add a size or a memory layout: it then runs on the CPU (``test_abs_matmul.py``) and on
a GPU (``test_cuda.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mas_ext import functional
from tests.cases import accumulation_dtype

SCALE = 0.6


# ================================================================================================
# The cases
# ================================================================================================
class Size(NamedTuple):
    """Of Ω[p, d] and its factors [b, t, p] and [b, t, d]."""

    b: int
    t: int
    p: int
    d: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


# Kernels pack rows of Ω by 4 and columns by 32, 24, 16 or 12, take 8 rows a tile beyond 8
# positions, hold 256 (sample, position) pairs at a time, and cut Ω into blocks of 256 × 512.
SIZES = [
    Size(0, 3, 4, 5),
    Size(3, 0, 4, 5),
    Size(3, 4, 0, 5),
    Size(3, 4, 5, 0),
    Size(1, 1, 1, 1),
    Size(2, 3, 1, 7),
    Size(2, 3, 7, 1),
    Size(5, 1, 9, 33),
    Size(300, 1, 5, 35),
    Size(4, 8, 3, 11),
    Size(4, 9, 4, 12),
    Size(3, 4, 5, 13),
    Size(3, 15, 8, 16),
    Size(3, 16, 9, 17),
    Size(3, 17, 7, 23),
    Size(70, 4, 12, 24),
    Size(20, 17, 13, 25),
    Size(2, 5, 31, 31),
    Size(2, 12, 32, 32),
    Size(2, 13, 33, 33),
    Size(2, 256, 9, 63),
    Size(2, 257, 14, 65),
    Size(1, 700, 10, 38),
    Size(3, 5, 257, 19),
    Size(3, 5, 19, 513),
    Size(2, 9, 100, 130),
]


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def positions_last(tensor: Tensor) -> Tensor:
    """As a convolution has them: channels outside positions."""
    return tensor.mT.contiguous().mT


def positions_first(tensor: Tensor) -> Tensor:
    """As recurrent layers have them."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def samples_last(tensor: Tensor) -> Tensor:
    return tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def sliced(tensor: Tensor) -> Tensor:
    """Every second place of its memory, with NaN between."""
    base = torch.full((*tensor.shape, 2), math.nan, dtype=tensor.dtype, device=tensor.device)
    base[..., 0] = tensor
    return base[..., 0]


def window(tensor: Tensor) -> Tensor:
    """A part of each dimension of something larger, which is NaN around it."""
    base = tensor.new_full([n + 3 for n in tensor.shape], math.nan)
    view = base[tuple(slice(1, n + 1) for n in tensor.shape)]
    return view.copy_(tensor)


def transposed_window(tensor: Tensor) -> Tensor:
    return window(tensor.mT.contiguous()).mT


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {  # of omega, left and right
    "contiguous": (contiguous, contiguous, contiguous),
    "positions_last": (contiguous, positions_last, positions_last),
    "transposed_omega": (positions_last, contiguous, positions_last),
    "positions_first": (window, positions_first, window),
    "samples_last": (transposed_window, samples_last, sliced),
    "sliced": (sliced, sliced, samples_last),
}


class Problem(NamedTuple):
    omega: Tensor
    left: Tensor
    right: Tensor


def make(
    size: Size,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    omega = torch.rand(size.p, size.d, generator=generator).to(accumulation_dtype(dtype))
    left = torch.randn(size.b, size.t, size.p, generator=generator).to(dtype)
    right = torch.randn(size.b, size.t, size.d, generator=generator).to(dtype)
    lay = LAYOUTS[layout]
    tensors = (t.to(device) for t in (omega, left, right))
    return Problem(*(f(t) for f, t in zip(lay, tensors, strict=True)))


# ================================================================================================
# The oracle: float64, one sample at a time
# ================================================================================================
class Exact(NamedTuple):
    omega: Tensor
    magnitude: Tensor  # of all terms: rounding errors are relative to it


def exact(problem: Problem, scale: float = SCALE) -> Exact:
    omega, left, right = (t.detach().double() for t in problem)
    products = torch.einsum("btp,btd->bpd", left, right)
    bound = torch.einsum("btp,btd->pd", left.abs(), right.abs())
    return Exact(omega + scale * products.abs().sum(0), omega.abs() + scale * bound)


# Sums of up to a few thousand terms, in the accumulation dtype.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14}


def assert_near(actual: Tensor, wanted: Exact, what: str = "") -> None:
    error = (actual.double() - wanted.omega).abs()
    assert bool((error <= TOLERANCE[actual.dtype] * wanted.magnitude).all()), (
        f"{what} off by up to {(error / wanted.magnitude).max():.3g} of the terms"
    )


def assert_gaps_untouched(tensor: Tensor) -> None:
    """Some layouts leave NaN around a tensor; all others fill their memory."""
    if tensor._base is not None:
        gaps = tensor._base.numel() - tensor.numel()
        assert int(tensor._base.isnan().sum()) == gaps


def call(problem: Problem, scale: float = SCALE, module=functional) -> Tensor:
    module.accumulate_abs_matmul_(*problem, scale)
    return problem.omega
