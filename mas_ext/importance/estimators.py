"""The estimators: how one batch adds to the raw sums of Ω.

A new estimator is one class, a row in :data:`ESTIMATORS`, and its name in :mod:`.options`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from mas_ext.importance import per_sample
from mas_ext.importance.batches import Batch
from mas_ext.importance.estimation import Estimation
from mas_ext.importance.local import Local
from mas_ext.importance.options import PER_SAMPLE_SHARDED

T = TypeVar("T")

DEPENDS_ON_NOTHING = (
    "what is differentiated depends on no parameter that is measured: the forward, the objective "
    "or the criterion detaches its result or runs under no_grad, or params selects nothing that is "
    "used"
)


class Estimator(Protocol):
    """How a batch adds to the sums. Every run makes its own, from its :class:`Estimation`."""

    def add_batch(self, batch: Batch, limit: int) -> Tensor:
        """Adds a batch, at most ``limit`` samples of it, and returns s_k of those it added."""

    def finish(self) -> None:
        """Called after the last batch. Warns of parameters that could not be measured.

        Raises:
            ValueError: no parameter could be measured.
        """


@dataclass
class _GradientEstimator(ABC):
    """Base of the estimators that differentiate the network's output."""

    estimation: Estimation

    def add_batch(self, batch: Batch, limit: int) -> Tensor:
        """Adds target after target, from one forward pass."""
        output = self._output(batch)
        if len(output) == 0:
            return output.new_zeros(0)
        energy: Tensor | float = 0.0
        for targeted, is_last in _with_the_last_marked(self.estimation.targeted(batch, output)):
            if targeted.target is not None and not targeted.target.weight.any():
                continue  # a class that is masked out: a plan would see no gradient anywhere
            scalars = self._add_target(targeted, output, limit, keep_graph=not is_last)
            energy = energy + self.estimation.energy(scalars, targeted)
        assert isinstance(energy, Tensor)
        return energy

    def _output(self, batch: Batch) -> Tensor:
        return self.estimation.output(batch)

    @abstractmethod
    def _add_target(self, batch: Batch, output: Tensor, limit: int, keep_graph: bool) -> Tensor:
        """Adds a batch that has a target, and returns s_k of the samples that it added."""

    def finish(self) -> None:
        """A parameter without a gradient needs no warning: the output does not depend on it."""
        if not self.estimation.coverage:
            raise ValueError(DEPENDS_ON_NOTHING)


class PerSample(_GradientEstimator):
    r"""Exact: :math:`\sum_k f(\partial s_k/\partial\theta)`, one backward pass per target."""

    def _output(self, batch: Batch) -> Tensor:
        return per_sample.output(self.estimation, batch)

    def _add_target(self, batch: Batch, output: Tensor, limit: int, keep_graph: bool) -> Tensor:
        return per_sample.add_target(self.estimation, batch, output, limit, keep_graph)


class BatchMean(_GradientEstimator):
    r"""What other implementations compute: :math:`w\,f(\frac1B\sum_k \partial s_k/\partial\theta)`.

    Gradients of opposite sign cancel before f, the absolute value or the square, is taken. The
    result therefore depends on how the data is split into batches, and is at most the exact sum.
    With ``weighting="samples"`` the weight w is the batch size B, so that a short last batch counts
    by its size; with ``weighting="batches"`` it is 1.
    """

    def _add_target(self, batch: Batch, output: Tensor, limit: int, keep_graph: bool) -> Tensor:
        """Differentiates the mean, times the number whose f is w."""
        scalars = self.estimation.scalars_of(output, batch)[:limit]
        by_samples = self.estimation.measurement.weighting == "samples"
        weight = scalars.new_tensor(len(scalars) if by_samples else 1)
        mean = scalars.mean() * self.estimation.reduction.root(weight)
        self.estimation.add_gradient(mean, keep_graph=keep_graph, path="batch")
        return scalars


ESTIMATORS: dict[str, Callable[[Estimation], Estimator]] = {
    "per_sample": PerSample,
    PER_SAMPLE_SHARDED: PerSample,  # of a model that is not sharded; else see sharded.py
    "batch": BatchMean,
    "local": Local,
}


def _with_the_last_marked(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Every item, and whether it is the last."""
    iterator = iter(items)
    current = next(iterator)
    for following in iterator:
        yield current, False
        current = following
    yield current, True


def make(estimation: Estimation) -> Estimator:
    """The estimator that the options name, for one run."""
    return ESTIMATORS[estimation.measurement.estimator](estimation)
