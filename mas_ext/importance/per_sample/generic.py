"""Operations without a rule: their own backward, which is linear in the gradient they are given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mas_ext.importance.contributions import Materialized, magnitude, upcast
from mas_ext.importance.per_sample.graph import Grads
from mas_ext.importance.per_sample.rules import NoRule, VisitedOperation


@dataclass
class Generic:
    """M_k is the operation's backward of g with the rows of all other samples set to zero.

    Exact for any operation, and as slow as one call of its backward for every sample. An operation
    that works element by element shows itself: the gradient it returns still has the shape of its
    output, since what broadcasting repeated is left for the engine to sum. One call is enough then.

    Attributes:
        visit: the operation, whose saved tensors must still be there.
        input: which of its inputs is the parameter.
    """

    visit: VisitedOperation
    input: int

    def add_magnitudes_(self, omega: Tensor) -> None:
        """A call a sample."""
        for sample in self.samples():
            omega += magnitude(sample)

    def samples(self) -> Iterator[Tensor]:
        """A call each, or one for all."""
        by_element = self._by_element()
        if by_element is not None:
            yield from by_element.samples()
            return
        for k in range(self._count()):
            yield upcast(self._backward(self._masked(k))).sum_to_size(self.visit.shape)

    def _by_element(self) -> Materialized | None:
        output = self.visit.grads[0]
        if output is None or output.shape == self.visit.shape or self.visit.layouts[0] is None:
            return None
        grad = self._backward(self.visit.grads)
        try:
            return self.visit.summed(grad) if grad.shape == output.shape else None
        except NoRule:
            return None

    def _masked(self, sample: int) -> Grads:
        pairs = zip(self.visit.grads, self.visit.layouts, strict=True)
        return tuple(
            None if grad is None or layout is None else layout.masked(grad, sample)
            for grad, layout in pairs
        )

    def _backward(self, grads: Grads) -> Tensor:
        with torch.no_grad():
            grad = self.visit.node.backward(*grads)[self.input]
        if grad is None:
            return torch.zeros(self.visit.shape, dtype=self.visit.dtype, device=self._device())
        return grad.real if grad.is_complex() and not self.visit.dtype.is_complex else grad

    def _count(self) -> int:
        """B."""
        pairs = zip(self.visit.grads, self.visit.layouts, strict=True)
        return next(len(layout.split(g)) for g, layout in pairs if g is not None and layout)

    def _device(self) -> torch.device:
        return next(grad.device for grad in self.visit.grads if grad is not None)
