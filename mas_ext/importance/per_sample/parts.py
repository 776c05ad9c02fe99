"""Runs the model on some of a batch's samples, and finds out which inputs all samples share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mas_ext.importance.batches import Batch, CannotSplit, Inputs
from mas_ext.importance.estimation import Estimation
from mas_ext.importance.per_sample import self_check


def scalars_of_part(
    estimation: Estimation,
    batch: Batch,
    chosen: Sequence[int],
    whole: Tensor,
    dtype: torch.dtype | None,
) -> Tensor:
    """s_k of the chosen samples, from a pass without the others.

    A tensor with as many rows as the batch has samples may still belong to all samples: positions
    of shape [T] where T is the batch size. So if the model fails on the part, or gives other values
    than for the whole batch, other ways to divide the inputs are tried, and the one that gives the
    same values is kept for the rest of the measurement.

    Args:
        estimation: the measurement.
        batch: the batch.
        chosen: the numbers of the samples.
        whole: s_k of all samples, from a pass with the whole batch.
        dtype: what the model computes in. None: values are not compared.

    Raises:
        CannotSplit: the model cannot be run on a part of the batch, however it is divided.
    """
    expected = whole.detach()[list(chosen)]

    def is_right(scalars: Tensor | None) -> bool:
        return scalars is not None and (
            dtype is None or self_check.agree(expected, scalars.detach(), dtype)
        )

    scalars, failure = _attempt(estimation, batch, chosen, len(whole))
    if isinstance(batch, Inputs) and not is_right(scalars):
        before = estimation.division
        for division in batch.divisions(len(whole)):
            estimation.division = division
            other, _ = _attempt(estimation, batch, chosen, len(whole))
            if other is not None and is_right(other):
                return other
        estimation.division = before
    if scalars is None:
        assert failure is not None
        raise failure
    return scalars  # where they differ, samples depend on each other: the caller checks that


def _attempt(
    estimation: Estimation, batch: Batch, chosen: Sequence[int], size: int
) -> tuple[Tensor | None, CannotSplit | None]:
    try:
        return estimation.scalars(batch.take(chosen, size, estimation.division)), None
    except CannotSplit as problem:
        return None, problem
