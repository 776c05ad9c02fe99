"""The estimators: how one batch adds to the raw sums of Ω.

A new estimator is one class, a row in :data:`ESTIMATORS`, and its name in :mod:`.options`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mas_ext.importance import per_sample
from mas_ext.importance.batches import Batch
from mas_ext.importance.estimation import Estimation
from mas_ext.importance.local import Local
from mas_ext.importance.options import PER_SAMPLE_SHARDED

DEPENDS_ON_NOTHING = (
    "the objective depends on no parameter that is measured: the forward or the objective detaches "
    "its result or runs under no_grad, or params selects nothing that is used"
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
class _GradientEstimator:
    """Base of the estimators that differentiate the network's output."""

    estimation: Estimation

    def finish(self) -> None:
        """A parameter without a gradient needs no warning: the output does not depend on it."""
        if not self.estimation.coverage:
            raise ValueError(DEPENDS_ON_NOTHING)


class PerSample(_GradientEstimator):
    r"""Exact: :math:`\sum_k |\partial s_k / \partial\theta|`, from one backward pass."""

    def add_batch(self, batch: Batch, limit: int) -> Tensor:
        """See :mod:`mas_ext.importance.per_sample`."""
        return per_sample.add_batch(self.estimation, batch, limit)


class BatchMean(_GradientEstimator):
    r"""What other implementations compute: :math:`w\,|\frac1B\sum_k \partial s_k/\partial\theta|`.

    Gradients of opposite sign cancel before the absolute value is taken, so the result depends on
    how the data is split into batches, and is at most the exact sum. With
    ``weighting="samples"`` the weight w is the batch size B, so that a short last batch counts by
    its size; with ``weighting="batches"`` it is 1.
    """

    def add_batch(self, batch: Batch, limit: int) -> Tensor:
        """The absolute value of the batch's sum, B times that of its mean; or of its mean."""
        scalars = self.estimation.scalars(batch)[:limit]
        by_samples = self.estimation.measurement.weighting == "samples"
        total = scalars.sum() if by_samples else scalars.mean()
        self.estimation.add_gradient(total, path="batch")
        return scalars.detach()


ESTIMATORS: dict[str, Callable[[Estimation], Estimator]] = {
    "per_sample": PerSample,
    PER_SAMPLE_SHARDED: PerSample,  # of a model that is not sharded; else see sharded.py
    "batch": BatchMean,
    "local": Local,
}


def make(estimation: Estimation) -> Estimator:
    """The estimator that the options name, for one run."""
    return ESTIMATORS[estimation.measurement.estimator](estimation)
