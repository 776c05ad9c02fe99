"""One process's measurement: batch after batch through an estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext.importance import estimators
from mas_ext.importance.batches import Batch, CustomBatch, Forward, Inputs
from mas_ext.importance.estimation import Estimation
from mas_ext.importance.finite import check_finite
from mas_ext.importance.isolation import differentiable, no_hidden_parameters, undisturbed
from mas_ext.importance.measurement_checkpoint import Journal
from mas_ext.importance.objectives import Objective
from mas_ext.importance.sample_statistics import Seen

NO_SAMPLES = "data: it gave no samples; an exhausted iterator or an empty set?"
Progress = bool | Callable[[int], None] | None


@dataclass(frozen=True)
class Measured:
    """What a process has added to its sums.

    Attributes:
        seen: of which samples.
        coverage: parameter name → the path that served it, for those that one did.
    """

    seen: Seen
    coverage: dict[str, str]


@torch.no_grad()
def add_samples_(
    sums: Mapping[str, Tensor],
    model: nn.Module,
    data: Iterable[Any],
    params: Mapping[str, Tensor],
    *,
    estimator: str = "per_sample",
    objective: Objective = "squared_l2",
    forward: Forward | None = None,
    max_samples: int | None = None,
    progress: Progress = None,
    weighting: str = "samples",
    training: bool = False,
    counted: Callable[[Seen], None],
    journal: Journal,
) -> Measured:
    """Adds Σ over samples, what importance is before the division by N, batch by batch.

    Weighted by batches it is Σ over batches, and N the number of batches. No data adds nothing.

    Args:
        sums: by name, what is added to; after an error it holds what was added before it. Of a
            parameter that is a DTensor, the local part.
        params: θ by name, the parameters that are measured, as they stand in the model.
        counted: called with what was seen of every batch once all of it is in ``sums``.
        journal: where that is kept, and what was kept before.
    """
    limit = check_max_samples(max_samples)
    estimators.check(estimator, weighting, training)
    estimation = Estimation(model, dict(params), dict(sums), objective, weighting)
    chosen = estimators.make(estimator, estimation)
    check_data(data)
    if not training:
        check_samples_are_independent(model)
    journal.take_up(sums)
    done = estimation.seen = journal.seen.samples
    if done:
        counted(journal.seen)
    with (
        no_hidden_parameters(),
        undisturbed(model, training),
        closing(Reporter(progress)) as reporter,
    ):
        for raw in journal.batches(data):
            with differentiable():
                batch = _read(model, raw, forward, limit - done)
                more = Seen.batch(chosen.add_batch(batch, limit - done), weighting)
            done = estimation.seen = done + more.samples
            counted(more)
            journal.count(more)
            reporter.show(done)
            if done >= limit:
                break
    if done > 0:
        check_finite(sums)
        chosen.finish()
    return Measured(journal.seen, estimation.coverage)


def _read(model: nn.Module, raw: Any, forward: Forward | None, limit: int) -> Batch:
    """A batch of whatever form, on the model's device; at most ``limit`` samples if it is ours."""
    if forward is not None:
        return CustomBatch(raw, forward)
    inputs = Inputs.of(raw).placed(next(model.parameters()).device)
    size = inputs.size()
    return inputs.take(range(limit), size) if size > limit else inputs


def check_max_samples(max_samples: int | None) -> int:
    """The limit, a large number for None."""
    if max_samples is None:
        return 2**63 - 1
    if not isinstance(max_samples, int) or max_samples < 1:
        raise ValueError(f"max_samples is {max_samples!r}; pass a positive whole number or None")
    return max_samples


def check_data(data: Iterable[Any]) -> None:
    """An iterable of batches, not a batch."""
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data is a {type(data).__name__}; pass an iterable of batches, such as a DataLoader "
            "or [batch]"
        )


def check_samples_are_independent(model: nn.Module) -> None:
    """No module that normalises by the batch in evaluation mode."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"module {name!r} normalises by the batch's own statistics also in evaluation "
                "mode, so no output belongs to one sample; give it track_running_stats=True"
            )


def _bar() -> Any:
    from tqdm import tqdm  # here, so that the package needs only torch until a bar is asked for

    return tqdm(desc="importance", unit=" samples")


class Reporter:
    """Tells the user how many samples are done: a bar, a callable, or nothing."""

    def __init__(self, progress: Progress) -> None:
        if not (progress is None or isinstance(progress, bool) or callable(progress)):
            raise TypeError(f"progress is {progress!r}; pass True, None or a callable(samples)")
        self._call = progress if callable(progress) else None
        self._bar = _bar() if progress is True else None

    def show(self, done: int) -> None:
        """So many samples are done."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        if self._call is not None:
            self._call(done)

    def close(self) -> None:
        """The bar stays as it is."""
        if self._bar is not None:
            self._bar.close()
