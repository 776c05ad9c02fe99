"""The estimators: how one batch adds to the raw sums of Ω.

A new estimator is one class and its name in :data:`ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mas_ext.importance import per_sample
from mas_ext.importance.batches import Batch
from mas_ext.importance.estimation import Estimation
from mas_ext.importance.local import Local


class Estimator(Protocol):
    """Made anew for every run, from its :class:`Estimation`."""

    def add_batch(self, batch: Batch, limit: int) -> int:
        """Adds a batch, at most ``limit`` samples of it, and returns how many it added."""

    def finish(self) -> None:
        """After the last batch: says what could not be measured; ValueError if nothing was."""


@dataclass
class _OfGradients:
    """What differentiates the network's output."""

    estimation: Estimation

    def finish(self) -> None:
        """A parameter without a gradient is one that the output does not depend on."""
        if not self.estimation.coverage:
            raise ValueError(
                "the objective depends on no parameter that is measured: the forward or the "
                "objective detaches its result or runs under no_grad, or params selects nothing "
                "that is used"
            )


class PerSample(_OfGradients):
    r"""Exact: :math:`\sum_k |\partial s_k / \partial\theta|`, from one backward pass."""

    def add_batch(self, batch: Batch, limit: int) -> int:
        """See :mod:`mas_ext.importance.per_sample`."""
        return per_sample.add_batch(self.estimation, batch, limit)


class BatchMean(_OfGradients):
    r"""What others compute: :math:`B\,|\frac{1}{B}\sum_k \partial s_k / \partial\theta|`.

    Gradients of opposite sign cancel before the absolute value, so this depends on how the data
    is cut into batches, and is at most the exact sum. Weighted by batch size: a short last batch
    counts for what it holds.
    """

    def add_batch(self, batch: Batch, limit: int) -> int:
        """The absolute value of the batch's sum: B times that of its mean."""
        scalars = self.estimation.scalars(batch)[:limit]
        self.estimation.add_gradient(scalars.sum(), path="batch")
        return len(scalars)


ESTIMATORS: dict[str, Callable[[Estimation], Estimator]] = {
    "per_sample": PerSample,
    "batch": BatchMean,
    "local": Local,
}


def make(name: str, estimation: Estimation) -> Estimator:
    """The estimator of that name, for one run."""
    if name not in ESTIMATORS:
        names = ", ".join(map(repr, ESTIMATORS))
        raise ValueError(f"estimator: {name!r} is unknown; use {names}")
    return ESTIMATORS[name](estimation)
