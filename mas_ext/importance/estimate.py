"""Running an estimator over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext.flat import FlatTensors
from mas_ext.importance import estimators
from mas_ext.importance.batches import Batch, CustomBatch, Forward, Inputs
from mas_ext.importance.estimation import PATHS, Estimation
from mas_ext.importance.isolation import differentiable, no_hidden_parameters, undisturbed
from mas_ext.importance.objectives import Objective
from mas_ext.parameters import ParameterIndex, Selection, select_some
from mas_ext.reference import accumulation_dtype

Progress = bool | Callable[[int], None] | None


class Importance(Mapping[str, Tensor]):
    """Ω by parameter name, in float32 (float64 for float64 parameters).

    Attributes:
        num_samples: N, how many samples it is the mean of.
        coverage: parameter name → which path computed it; ``"none"`` where none could, and Ω is 0.
    """

    def __init__(self, tensors: FlatTensors, num_samples: int, coverage: dict[str, str]) -> None:
        self._tensors = tensors
        self.num_samples = num_samples
        self.coverage = coverage

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Importance({len(self)} parameters, num_samples={self.num_samples})"


def estimate_importance(
    model: nn.Module,
    data: Iterable[Any],
    *,
    estimator: str = "per_sample",
    objective: Objective = "squared_l2",
    forward: Forward | None = None,
    params: Selection = None,
    max_samples: int | None = None,
    progress: Progress = None,
    weighting: str = "samples",
    training: bool = False,
) -> Importance:
    r"""Measures how sensitive the model's output is to each parameter, without labels.

    .. math:: \Omega_i = \frac{1}{N} \sum_{k=1}^{N}
        \left| \frac{\partial\, \|F(x_k; \theta)\|_2^2}{\partial \theta_i} \right|

    Runs in evaluation mode (in training mode if told to), and leaves modes, gradients,
    ``requires_grad``, buffers and random number generators as they were, also when it fails
    half-way.

    Args:
        model: F. Not changed.
        data: an iterable of batches. A tensor is passed to the model; of a tuple or list the first
            item (labels are never needed); a mapping as keyword arguments, without ``labels`` or
            ``label``. Tensors are moved to the model's device (not with ``forward``). Since random
            numbers are put back, a shuffling DataLoader draws the same order each time, unless it
            has a ``generator`` of its own.
        estimator: ``"per_sample"``, exact, or ``"batch"``, the absolute value of each batch's mean
            gradient weighted by batch size, which loses what cancels within a batch; or
            ``"local"``, the paper's Hebbian variant, one forward pass a batch: of a Linear or Conv
            layer followed by ReLU it takes ‖·‖² of that layer's own output instead of the network's
            (without ReLU, of its linear output). Other parameters get 0, coverage ``"none"``, and
            a warning.
        objective: ``"squared_l2"`` ‖F‖², ``"l2"`` ‖F‖, ``"l1"`` Σ|F|, each over all but
            dimension 0, or a callable from the output [B, …] to scalars [B].
        forward: ``callable(model, batch) -> Tensor`` for batches of another form; its output has
            one row a sample.
        params: which parameters, of those that require gradients: None for all, names or globs,
            or ``callable(name, parameter) -> bool``.
        max_samples: stop after so many samples, the first ones: shuffle data that is sorted.
        progress: True for a bar, or a callable given the number of samples done.
        weighting: of ``"batch"``, what counts the same: ``"samples"``, each batch by its size, or
            ``"batches"``, also a short last one,
            :math:`\Omega_i = \frac1K\sum_{b=1}^K |\frac{1}{B_b}\sum_{k\in b} g_{ki}|`.
        training: measure ``"batch"`` with every module in training mode, as several
            implementations do: of dropout's random networks, and with the batch's own statistics.
            Running statistics are put back. For comparisons (:func:`mas_ext.preset`).

    Returns:
        Ω, with the number of samples and the path that served each parameter.

    Raises:
        ValueError: no data, no parameters, an output without a sample dimension, or a NaN or Inf,
            naming the parameter.
        TypeError: a batch, output or argument of a kind that cannot be used.

    Source: Aljundi et al., ECCV 2018, equations 1 and 2.
    """
    named = select_some(ParameterIndex(model).named(), params)
    sums = FlatTensors(named, accumulation_dtype)
    weights: list[int] = []
    num_samples, coverage = add_importance_(
        sums,
        model,
        data,
        named,
        estimator=estimator,
        objective=objective,
        forward=forward,
        max_samples=max_samples,
        progress=progress,
        weighting=weighting,
        training=training,
        counted=weights.append,
    )
    for total in sums.values():
        total.div_(sum(weights))
    return Importance(sums, num_samples, coverage)


@torch.no_grad()
def add_importance_(
    sums: Mapping[str, Tensor],
    model: nn.Module,
    data: Iterable[Any],
    named: Mapping[str, Tensor],
    *,
    estimator: str = "per_sample",
    objective: Objective = "squared_l2",
    forward: Forward | None = None,
    max_samples: int | None = None,
    progress: Progress = None,
    weighting: str = "samples",
    training: bool = False,
    counted: Callable[[int], None],
) -> tuple[int, dict[str, str]]:
    """Adds Σ over samples, what importance is before the division by N, batch by batch.

    Weighted by batches it is Σ over batches, and N the number of batches.

    Args:
        sums: by name, what is added to; after an error it holds what was added before it.
        named: θ by name, the parameters that are measured.
        counted: called with what every batch adds to N once all of it is in ``sums``.

    Returns:
        The number of samples, and which path served each parameter.
    """
    limit = _check_max_samples(max_samples)
    estimators.check(estimator, weighting, training)
    estimation = Estimation(model, dict(named), dict(sums), objective, weighting)
    chosen = estimators.make(estimator, estimation)
    _check_data(data)
    if not training:
        _check_samples_are_independent(model)
    done = 0
    with (
        no_hidden_parameters(),
        undisturbed(model, training),
        closing(_Reporter(progress)) as reporter,
    ):
        for raw in data:
            with differentiable():
                batch = _read(model, raw, forward, limit - done)
                samples = chosen.add_batch(batch, limit - done)
            done = estimation.seen = done + samples
            counted(samples if weighting == "samples" else min(samples, 1))
            reporter.show(done)
            if done >= limit:
                break
    if done == 0:
        raise ValueError("data: it gave no samples; an exhausted iterator or an empty set?")
    _check_finite(sums)
    chosen.finish()
    return done, {name: estimation.coverage.get(name, PATHS[0]) for name in named}


def _read(model: nn.Module, raw: Any, forward: Forward | None, limit: int) -> Batch:
    """A batch of whatever form, on the model's device; at most ``limit`` samples if it is ours."""
    if forward is not None:
        return CustomBatch(raw, forward)
    inputs = Inputs.of(raw).placed(next(model.parameters()).device)
    size = inputs.size()
    return inputs.take(range(limit), size) if size > limit else inputs


def _check_max_samples(max_samples: int | None) -> int:
    if max_samples is None:
        return 2**63 - 1
    if not isinstance(max_samples, int) or max_samples < 1:
        raise ValueError(f"max_samples is {max_samples!r}; pass a positive whole number or None")
    return max_samples


def _check_data(data: Iterable[Any]) -> None:
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        raise TypeError(
            f"data is a {type(data).__name__}; pass an iterable of batches, such as a DataLoader "
            "or [batch]"
        )


def _check_samples_are_independent(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"module {name!r} normalises by the batch's own statistics also in evaluation "
                "mode, so no output belongs to one sample; give it track_running_stats=True"
            )


def _check_finite(sums: Mapping[str, Tensor]) -> None:
    for name, total in sums.items():
        # Of numbers that are not negative, the sum tells, and takes one pass over memory.
        if not torch.isfinite(total.sum()) and not torch.isfinite(total).all():
            raise ValueError(
                f"the gradient of parameter {name!r} is NaN or Inf for some sample; nothing was "
                "changed. Check the objective, or compute in a wider dtype"
            )


def _bar() -> Any:
    from tqdm import tqdm  # here, so that the package needs only torch until a bar is asked for

    return tqdm(desc="importance", unit=" samples")


class _Reporter:
    """Tells the user how many samples are done: a bar, a callable, or nothing."""

    def __init__(self, progress: Progress) -> None:
        if not (progress is None or isinstance(progress, bool) or callable(progress)):
            raise TypeError(f"progress is {progress!r}; pass True, None or a callable(samples)")
        self._call = progress if callable(progress) else None
        self._bar = _bar() if progress is True else None

    def show(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        if self._call is not None:
            self._call(done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
