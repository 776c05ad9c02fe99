"""Operations without a rule: their own backward, which is linear in the gradient they are given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mas_ext.importance.per_sample.contributions import wide
from mas_ext.importance.per_sample.rules import Visit


@dataclass
class Generic:
    """M_k is the operation's backward of g with the rows of all other samples set to zero.

    Exact for any operation, and as slow as one call of its backward for every sample.

    Attributes:
        visit: the operation, whose saved tensors must still be there.
        input: which of its inputs is the parameter.
    """

    visit: Visit
    input: int

    def add_magnitudes_(self, omega: Tensor) -> None:
        """A call a sample."""
        for sample in self.samples():
            omega += sample.abs()

    def samples(self) -> Iterator[Tensor]:
        """A call each."""
        for k in range(self._count()):
            masked = [
                None if grad is None or layout is None else layout.masked(grad, k)
                for grad, layout in zip(self.visit.grads, self.visit.layouts, strict=True)
            ]
            with torch.no_grad():
                grad = self.visit.node.backward(*masked)[self.input]
            if grad is None:
                grad = self._any_grad().new_zeros(self.visit.shape)
            # A node leaves what broadcasting repeated to be summed by the engine.
            yield wide(grad).sum_to_size(self.visit.shape)

    def _count(self) -> int:
        """B."""
        pairs = zip(self.visit.grads, self.visit.layouts, strict=True)
        return next(len(layout.split(g)) for g, layout in pairs if g is not None and layout)

    def _any_grad(self) -> Tensor:
        return next(grad for grad in self.visit.grads if grad is not None)
