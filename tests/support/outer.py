"""Inputs of accumulate_outer_, whose tensors differ in shape and lie in many layouts.

To cover another size or layout, add it to ``SIZES`` or ``LAYOUTS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.tensors import DTYPES, State, accumulation_dtype, sliced


class Size(NamedTuple):
    """Of Ω [p, d] and its factors [b, t, p] and [b, t, d]."""

    b: int
    t: int
    p: int
    d: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SMALL, MEDIUM = Size(3, 4, 5, 6), Size(5, 17, 70, 90)
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


def window(tensor: Tensor) -> Tensor:
    """A part of each dimension of something larger, which is NaN around it."""
    base = tensor.new_full([n + 3 for n in tensor.shape], torch.nan)
    return base[tuple(slice(1, n + 1) for n in tensor.shape)].copy_(tensor)


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


def make(
    size: Size,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> State:
    generator = torch.Generator().manual_seed(seed)
    omega = torch.rand(size.p, size.d, generator=generator).to(accumulation_dtype(dtype))
    left = torch.randn(size.b, size.t, size.p, generator=generator).to(dtype)
    right = torch.randn(size.b, size.t, size.d, generator=generator).to(dtype)
    lay = LAYOUTS[layout]
    omega, left, right = (f(t.to(device)) for f, t in zip(lay, (omega, left, right), strict=True))
    return State(omega=[omega], left=[left], right=[right])


@dataclass(frozen=True)
class Sample:
    """As :class:`tests.support.tensors.Sample`."""

    dtype: str
    size: Size
    layout: str
    kept: None = None

    def __str__(self) -> str:
        return f"{self.dtype}-{self.size}-{self.layout}"

    def make(self, moments: Sequence[str] = (), device: str | torch.device = "cpu") -> State:
        return make(self.size, DTYPES[self.dtype], self.layout, device=device)


# Every size in every layout, with the dtypes in turn.
SAMPLES = [
    Sample([*DTYPES][(i + j) % len(DTYPES)], size, layout)
    for i, size in enumerate(SIZES)
    for j, layout in enumerate(LAYOUTS)
]
