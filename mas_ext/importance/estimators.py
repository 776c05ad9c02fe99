"""The estimators: how one batch adds to the raw sums of Ω.

A new estimator is one class and its name in :data:`ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mas_ext.importance import per_sample
from mas_ext.importance.batches import Batch
from mas_ext.importance.estimation import Estimation
from mas_ext.importance.local import Local

DEPENDS_ON_NOTHING = (
    "the objective depends on no parameter that is measured: the forward or the objective detaches "
    "its result or runs under no_grad, or params selects nothing that is used"
)


class Estimator(Protocol):
    """Made anew for every run, from its :class:`Estimation`."""

    def add_batch(self, batch: Batch, limit: int) -> Tensor:
        """Adds a batch, at most ``limit`` samples of it, and returns s_k of those it added."""

    def finish(self) -> None:
        """After the last batch: says what could not be measured; ValueError if nothing was."""


@dataclass
class _OfGradients:
    """What differentiates the network's output."""

    estimation: Estimation

    def finish(self) -> None:
        """A parameter without a gradient is one that the output does not depend on."""
        if not self.estimation.coverage:
            raise ValueError(DEPENDS_ON_NOTHING)


class PerSample(_OfGradients):
    r"""Exact: :math:`\sum_k |\partial s_k / \partial\theta|`, from one backward pass."""

    def add_batch(self, batch: Batch, limit: int) -> Tensor:
        """See :mod:`mas_ext.importance.per_sample`."""
        return per_sample.add_batch(self.estimation, batch, limit)


class BatchMean(_OfGradients):
    r"""What others compute: :math:`w\,|\frac{1}{B}\sum_k \partial s_k / \partial\theta|`.

    Gradients of opposite sign cancel before the absolute value, so this depends on how the data
    is cut into batches, and is at most the exact sum. The weight w is the batch's size B, so that a
    short last batch counts for what it holds; or, weighted by batches, 1.
    """

    def add_batch(self, batch: Batch, limit: int) -> Tensor:
        """The absolute value of the batch's sum, B times that of its mean; or of its mean."""
        scalars = self.estimation.scalars(batch)[:limit]
        by_samples = self.estimation.weighting == "samples"
        total = scalars.sum() if by_samples else scalars.mean()
        self.estimation.add_gradient(total, path="batch")
        return scalars.detach()


IN_STEP = "per_sample_sharded"
ESTIMATORS: dict[str, Callable[[Estimation], Estimator]] = {
    "per_sample": PerSample,
    IN_STEP: PerSample,  # of a model that is not sharded; else see sharded.py
    "batch": BatchMean,
    "local": Local,
}
WEIGHTINGS = ("samples", "batches")


def check_weighting(weighting: Any) -> str:
    """``"samples"`` or ``"batches"``."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: {weighting!r} is unknown; use 'samples' or 'batches'")
    return weighting


def check(name: str, weighting: str, training: bool) -> None:
    """Refuses what is unknown, and settings that do not go together."""
    if name not in ESTIMATORS:
        names = ", ".join(map(repr, ESTIMATORS))
        raise ValueError(f"estimator: {name!r} is unknown; use {names}")
    check_weighting(weighting)
    if not isinstance(training, bool):
        raise TypeError(f"training is {training!r}; pass True or False")
    if name != "batch" and weighting != "samples":
        raise ValueError(
            f"weighting: with estimator={name!r} every sample counts the same; leave "
            f"weighting={weighting!r} out, or use estimator='batch'"
        )
    if name != "batch" and training:
        raise ValueError(
            f"training: estimator={name!r} takes one sample's gradient at a time, and in training "
            "mode dropout and batch statistics leave it none of its own; leave training=True out, "
            "or use estimator='batch'"
        )


def make(name: str, estimation: Estimation) -> Estimator:
    """The estimator of that name, which :func:`check` has passed, for one run."""
    return ESTIMATORS[name](estimation)
