"""One process's measurement: batch after batch through an estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext._warnings import warn
from mas_ext.importance import estimators
from mas_ext.importance.batches import Batch, CustomBatch, Inputs
from mas_ext.importance.estimation import Estimation, SampleStatistics, check_finite
from mas_ext.importance.isolation import differentiable, no_hidden_parameters, undisturbed
from mas_ext.importance.measurement_checkpoint import MeasurementCheckpoint
from mas_ext.importance.options import Measurement, Progress

NO_SAMPLES = "data: it gave no samples; an exhausted iterator or an empty set?"


@dataclass(frozen=True)
class Measured:
    """What was added to the sums, by one process or by all.

    Attributes:
        statistics: of the samples.
        coverage: parameter name → the path that served it; parameters that none served are missing.
        outputs: which of the model's outputs were measured; empty if there was no data.
    """

    statistics: SampleStatistics
    coverage: dict[str, str]
    outputs: tuple[str, ...]


@torch.no_grad()
def add_samples_(
    sums: Mapping[str, Tensor],
    model: nn.Module,
    data: Iterable[Any],
    params: Mapping[str, Tensor],
    measurement: Measurement,
    *,
    counted: Callable[[SampleStatistics], None],
    checkpoint: MeasurementCheckpoint,
    rank: int = 0,
) -> Measured:
    """Adds the sum over this process's samples, which is importance before division by N.

    With ``weighting="batches"`` it is the sum over batches, and N is the number of batches. If the
    data is empty, nothing is added.

    Args:
        sums: name → the tensor that is added to; for a DTensor parameter, its local part. After an
            error it holds whatever was added before it.
        params: name → θ, the parameters that are measured, as they stand in the model.
        measurement: the options.
        counted: called with the statistics of every batch once all of the batch is in ``sums``.
        checkpoint: where progress is saved, and what an earlier run has saved.
        rank: the number of this process among those that share the data.

    Raises:
        TypeError, ValueError: an option or the data cannot be used.
    """
    measurement.check()
    estimation = Estimation(model, dict(params), dict(sums), measurement, rank=rank)
    estimator = estimators.make(estimation)
    check_data(data)
    if not measurement.training:
        check_samples_are_independent(model)
    checkpoint.restore(sums)
    done = estimation.samples = checkpoint.statistics.samples
    if done:
        counted(checkpoint.statistics)
    with (
        no_hidden_parameters(),
        undisturbed(model, measurement.training),
        closing(ProgressReporter(measurement.progress)) as reporter,
    ):
        for raw in checkpoint.batches(data):
            if measurement.forward is None and not estimation.samples:
                _warn_of_ignored_items(raw, model)
            with differentiable():
                left = measurement.sample_limit - done
                batch = _read(model, raw, measurement, left)
                scalars = estimator.add_batch(batch, left)
                more = SampleStatistics.of_batch(scalars, measurement.weighting)
                estimation.learn_shared_inputs(batch, len(scalars))
            done = estimation.samples = done + more.samples
            estimation.batches += 1
            counted(more)
            checkpoint.count(more)
            reporter.show(done)
            if done >= measurement.sample_limit:
                break
        check_no_gradient_was_written(estimation)
    if done > 0:
        check_finite(sums)
        estimator.finish()
    return Measured(checkpoint.statistics, estimation.coverage, estimation.output_names)


def _read(model: nn.Module, raw: Any, measurement: Measurement, limit: int) -> Batch:
    """A batch of any form; without ``forward``, on the model's device and cut to ``limit``.

    A list of tensors is not cut: the samples may be its items or their rows. Estimators take the
    first ``limit`` samples of a larger batch themselves.
    """
    if measurement.forward is not None:
        return CustomBatch(raw, measurement.forward)
    inputs = Inputs.with_others(raw).placed(next(model.parameters()).device)
    size = inputs.size()
    if size <= limit or (inputs.has_lists and measurement.estimator != "local"):
        return inputs
    return inputs.take(range(limit), size)


def _warn_of_ignored_items(raw: Any, model: nn.Module) -> None:
    """Warns if the model's forward takes more of a batch than it is given, such as a mask."""
    if name := Inputs.ignored(raw, model):
        warn(
            f"data: a batch is a {type(raw).__name__} of {len(raw)} items, of which the model gets "
            f"only the first, although its forward also takes {name!r}; yield mappings of keyword "
            "arguments, or pass forward=lambda model, batch: model(*batch[:-1]) or the like"
        )


def check_no_gradient_was_written(estimation: Estimation) -> None:
    """Refuses a model whose backward pass runs another one that writes to ``.grad``."""
    for name, p in estimation.params.items():
        if p.grad is not None and name not in estimation.coverage:
            raise ValueError(
                f"the gradient of {name!r} is written to .grad by a backward() inside the model's "
                "own backward pass, as reversible blocks do; use torch.autograd.grad there, or "
                "activation checkpointing"
            )


def check_data(data: Any, argument: str = "data") -> None:
    """Refuses data that is not an iterable of batches, such as a single batch."""
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise TypeError(
            f"{argument} is a {type(data).__name__}; pass an iterable of batches, such as a "
            "DataLoader or [batch]"
        )


def check_samples_are_independent(model: nn.Module) -> None:
    """Refuses a model that normalizes by batch statistics even in evaluation mode."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"module {name!r} normalizes by the batch's own statistics even in evaluation "
                "mode, so no output belongs to one sample; give it track_running_stats=True"
            )


def _bar() -> Any:
    from tqdm import tqdm  # here, so that the package needs only torch until a bar is asked for

    return tqdm(desc="importance", unit=" samples")


class ProgressReporter:
    """Tells the user how many samples are done, by a bar or a callable, if asked to."""

    def __init__(self, progress: Progress) -> None:
        self._call = progress if callable(progress) else None
        self._bar = _bar() if progress is True else None

    def show(self, done: int) -> None:
        """Reports the number of samples done so far."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        if self._call is not None:
            self._call(done)

    def close(self) -> None:
        """Leaves the bar on the screen as it is."""
        if self._bar is not None:
            self._bar.close()
