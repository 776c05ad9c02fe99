"""The generic path for operations without a rule: it calls the operation's own backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mas_ext.importance.contributions import Materialized, upcast
from mas_ext.importance.per_sample.graph import Grads
from mas_ext.importance.per_sample.rules import NoRule, VisitedOperation
from mas_ext.importance.reductions import Reduction


@dataclass
class Generic:
    """Forms M_k with the operation's backward of g, where other samples' rows are set to zero.

    This is exact for every operation, since backward is linear in g, but it takes one call of the
    backward per sample. One call is enough for an elementwise operation. Such an operation is
    recognized by the gradient it returns, which has the shape of its output: autograd's engine, not
    the operation, sums over what broadcasting repeated.

    Attributes:
        visit: the operation, whose saved tensors must not have been freed.
        input: the index of the parameter among the operation's inputs.
    """

    visit: VisitedOperation
    input: int

    def accumulate_(self, omega: Tensor, reduction: Reduction) -> None:
        """Ω += Σ_k f(M_k), one sample at a time."""
        for sample in self.samples():
            omega += reduction.of(sample)

    def samples(self) -> Iterator[Tensor]:
        """M_k of each sample, from one call of the backward per sample, or one for all."""
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
        """B, the number of samples."""
        pairs = zip(self.visit.grads, self.visit.layouts, strict=True)
        return next(len(layout.split(g)) for g, layout in pairs if g is not None and layout)

    def _device(self) -> torch.device:
        return next(grad.device for grad in self.visit.grads if grad is not None)
