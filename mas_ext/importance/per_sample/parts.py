"""Runs the model on some of a batch's samples, and finds out which inputs all samples share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

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

    A tensor with as many rows as the batch has samples may still be shared by all samples, such as
    positions of shape [T] if T happens to be the batch size. So if the model fails on the part,
    other ways to divide the inputs are tried, and the first that gives the same values as the whole
    batch is kept for the rest of the measurement. (If the model does not fail but gives other
    values, the samples depend on each other; another division might hide that.)

    Args:
        estimation: the measurement.
        batch: the batch.
        chosen: the numbers of the samples.
        whole: s_k of all samples, from a pass with the whole batch.
        dtype: what the model computes in. None: values are not compared.

    Raises:
        CannotSplit: the model cannot be run on a part of the batch, however it is divided.
    """
    size = len(whole)
    try:
        return estimation.scalars(batch.take(chosen, size, estimation.division))
    except CannotSplit:
        if not isinstance(batch, Inputs):
            raise
        expected = whole.detach()[list(chosen)]
        for found in batch.divisions(size):
            division = {**estimation.division, **found}
            with suppress(CannotSplit):
                scalars = estimation.scalars(batch.take(chosen, size, division))
                if dtype is None or self_check.agree(expected, scalars.detach(), dtype):
                    estimation.division = division
                    return scalars
        raise
