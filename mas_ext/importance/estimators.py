"""The estimators: how one batch adds to the raw sums of Ω.

A new estimator is one function here and its name in :data:`ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable

from mas_ext.importance import per_sample as exact
from mas_ext.importance.batches import Batch
from mas_ext.importance.estimation import Estimation

# An estimator adds one batch, at most `limit` samples of it, and returns how many it added.
Estimator = Callable[[Estimation, Batch, int], int]


def per_sample(estimation: Estimation, batch: Batch, limit: int) -> int:
    r"""Exact: :math:`\sum_k |\partial s_k / \partial\theta|`, from one backward pass."""
    return exact.add_batch(estimation, batch, limit)


def batch_mean(estimation: Estimation, batch: Batch, limit: int) -> int:
    r"""What others compute: :math:`B\,|\frac{1}{B}\sum_k \partial s_k / \partial\theta|`.

    Gradients of opposite sign cancel before the absolute value, so this depends on how the data
    is cut into batches, and is at most the exact sum. Weighted by batch size: a short last batch
    counts for what it holds.
    """
    scalars = estimation.scalars(batch)[:limit]
    # The absolute value of the batch's sum: B times that of its mean.
    estimation.add_gradient(scalars.sum(), path="batch")
    return len(scalars)


ESTIMATORS: dict[str, Estimator] = {"per_sample": per_sample, "batch": batch_mean}


def resolve(name: str) -> Estimator:
    """The estimator of that name."""
    if name not in ESTIMATORS:
        names = ", ".join(map(repr, ESTIMATORS))
        raise ValueError(f"estimator: {name!r} is unknown; use {names}")
    return ESTIMATORS[name]
