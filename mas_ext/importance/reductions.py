"""How a sample's gradient counts towards Ω: |g| or g²."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mas_ext import functional
from mas_ext.reference import magnitude_of


@dataclass(frozen=True)
class Reduction:
    """A function f of gradients. It is elementwise and multiplicative: f(a·b) = f(a)·f(b).

    Attributes:
        name: its name for users and for the operators.
        of: f.
        root: the number r ≥ 0 with f(r) = w, for a weight w ≥ 0.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    root: Callable[[Tensor], Tensor]

    def add_(self, omegas: list[Tensor], gradients: list[Tensor]) -> None:
        """Ω += f(g) for every pair of tensors."""
        functional.accumulate_importance_(omegas, gradients, reduction=self.name)

    def add_outer_(self, omega: Tensor, left: Tensor, right: Tensor) -> None:
        """Ω += Σ_k f(Σ_t left_kt right_ktᵀ)."""
        functional.accumulate_outer_(omega, left, right, reduction=self.name)


ABS = Reduction("abs", magnitude_of("abs"), lambda weight: weight)
SQUARE = Reduction("square", magnitude_of("square"), torch.sqrt)
REDUCTIONS = {reduction.name: reduction for reduction in (ABS, SQUARE)}
