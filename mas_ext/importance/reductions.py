"""How a sample's gradient counts towards Ω: |g| or g²."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mas_ext import functional


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
        if self.name == "abs":
            functional.accumulate_importance_(omegas, gradients)
        else:
            for o, g in zip(omegas, gradients, strict=True):
                o.add_(g.to(o.dtype).square())

    def add_outer_(self, omega: Tensor, left: Tensor, right: Tensor) -> None:
        """Ω += Σ_k f(Σ_t left_kt right_ktᵀ)."""
        if self.name == "abs":
            functional.accumulate_abs_matmul_(omega, left, right)
        else:
            for mine, theirs in zip(left, right, strict=True):
                omega.add_((mine.to(omega.dtype).mT @ theirs.to(omega.dtype)).square())


ABS = Reduction("abs", torch.abs, lambda weight: weight)
SQUARE = Reduction("square", torch.square, torch.sqrt)
REDUCTIONS = {reduction.name: reduction for reduction in (ABS, SQUARE)}
