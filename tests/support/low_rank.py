"""Inputs of low_rank_penalty, whose tensors differ in shape and lie in many layouts.

To cover another size or layout, add it to ``SIZES`` or ``LAYOUTS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tests.support.outer import transposed_window, window
from tests.support.tensors import (
    DTYPES,
    KEPT,
    State,
    accumulation_dtype,
    compressed,
    contiguous,
    sliced,
    transposed,
)


class Size(NamedTuple):
    """Of Ω [out, in] and its factors [out, rank] and [rank, in]."""

    out: int
    into: int
    rank: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SMALL, MEDIUM = Size(5, 6, 3), Size(70, 90, 20)
# CPU kernels have tiles of 4 or 8 rows and of 4 to 32 columns, hold 32 rows and 64 to 256 columns
# of Ω at a time, and cut Ω into up to 8 x 8 parts of 64 or more. CUDA kernels have tiles of
# 64 x 64 and hold 64 ranks at a time.
SIZES = [
    Size(0, 4, 3),
    Size(4, 0, 3),
    Size(4, 5, 0),
    Size(1, 1, 1),
    Size(1, 7, 2),
    Size(7, 1, 2),
    Size(3, 2, 9),
    Size(9, 33, 8),
    Size(30, 15, 5),
    Size(32, 64, 16),
    Size(33, 63, 17),
    Size(34, 130, 31),
    Size(64, 65, 33),
    Size(65, 64, 65),
    Size(21, 300, 4),
    Size(129, 70, 12),
    Size(200, 270, 70),
]

LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {  # of Ω, A and B
    "contiguous": (contiguous, contiguous, contiguous),
    "transposed_omega": (transposed, contiguous, contiguous),
    "transposed_factors": (contiguous, transposed, transposed),
    "windows": (window, transposed_window, window),
    "sliced": (sliced, sliced, transposed_window),
}


def make(
    size: Size,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    device: str | torch.device = "cpu",
    kept: str | None = None,
) -> State:
    """Gradients lie as their factors do. Ω is kept as ``tests.support.tensors.make_state`` says."""
    generator = torch.Generator().manual_seed(seed)
    omega = torch.rand(size.out, size.into, generator=generator)
    omega = omega * (torch.rand(omega.shape, generator=generator) > 0.25)
    shapes = {"a": (size.rank, size.into), "b": (size.out, size.rank)}
    lay_omega, *lay_factors = LAYOUTS[layout]
    state = State()
    for name, lay in zip(("a", "b"), lay_factors, strict=True):
        for of in (name, f"grad_{name}"):
            values = torch.randn(shapes[name], generator=generator)
            getattr(state, of).append(lay(values.to(dtype).to(device)))
    kept = None if dtype == torch.float64 else kept
    if kept == "uint8":  # dense in any layout
        dense = transposed if lay_omega is transposed else contiguous
        codes, scales = compressed(omega.to(device), dense)
        state.omega, state.omega_scales = [codes], [scales]
    else:
        state.omega = [
            lay_omega(omega.to(KEPT[kept] if kept else accumulation_dtype(dtype)).to(device))
        ]
    return state


@dataclass(frozen=True)
class Sample:
    """As :class:`tests.support.tensors.Sample`."""

    dtype: str
    size: Size
    layout: str
    kept: str | None = None

    def __str__(self) -> str:
        name = f"{self.dtype}-{self.size}-{self.layout}"
        return f"{name}-{self.kept}_omega" if self.kept else name

    def make(self, moments: Sequence[str] = (), device: str | torch.device = "cpu") -> State:
        dtype = DTYPES[self.dtype]
        return make(self.size, dtype, self.layout, device=device, kept=self.kept)


# Every size in every layout, with the dtypes in turn, and so with the ways to store Ω.
KINDS = [
    (dtype, kept) for kept in (None, *KEPT) for dtype in DTYPES if not (kept and dtype == "float64")
]
SAMPLES = [
    Sample(KINDS[(3 * i + j) % len(KINDS)][0], size, layout, KINDS[(3 * i + j) % len(KINDS)][1])
    for i, size in enumerate(SIZES)
    for j, layout in enumerate(LAYOUTS)
]
