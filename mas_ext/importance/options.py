"""The options of a measurement: declared once, checked once, and passed on as one object."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from mas_ext.importance import criteria
from mas_ext.importance.batches import Forward
from mas_ext.importance.criteria import MAS, CriterionOption
from mas_ext.importance.objectives import Objective

Progress = bool | Callable[[int], None] | None

PER_SAMPLE_SHARDED = "per_sample_sharded"
ESTIMATORS = ("per_sample", PER_SAMPLE_SHARDED, "batch", "local")
WEIGHTINGS = ("samples", "batches")
NO_LIMIT = 2**63 - 1


class MeasurementOptions(TypedDict, total=False):
    """Keyword arguments of everything that measures importance.

    :func:`mas_ext.estimate_importance` documents each of them in full.

    Attributes:
        estimator: ``"per_sample"`` (default), ``"batch"``, ``"local"`` or ``"per_sample_sharded"``.
        criterion: the scalar per sample that is differentiated: ``"mas"`` (default),
            ``"fisher"``, ``"empirical_fisher"``, ``"exact_fisher"``, ``"gauss_newton"`` or a
            callable.
        reduction: ``"abs"`` or ``"square"``. None (default): the criterion's own.
        objective: for ``criterion="mas"``: ``"squared_l2"`` (default), ``"l2"``, ``"l1"``,
            ``"probabilities"`` or a callable.
        draws: how many targets to draw per sample, for ``"fisher"`` and ``"gauss_newton"``.
            Default: 1.
        seed: of these draws. Default: 0.
        forward: ``callable(model, batch) -> Tensor`` for batches that the model cannot take as
            they are.
        max_samples: stop after this many samples. None (default): use all of them.
        progress: True for a progress bar, or a callable that is given the number of samples done.
        weighting: ``"samples"`` (default) or, for ``estimator="batch"``, ``"batches"``.
        training: whether to measure in training mode, for ``estimator="batch"``. Default: False.
    """

    estimator: str
    criterion: CriterionOption
    reduction: str | None
    objective: Objective
    draws: int
    seed: int
    forward: Forward | None
    max_samples: int | None
    progress: Progress
    weighting: str
    training: bool


class CheckpointedMeasurementOptions(MeasurementOptions, total=False):
    """The options of :class:`mas_ext.MAS`'s methods, whose measurements can be resumed.

    Attributes:
        checkpoint: the file in which to save the measurement while it runs. None (default): none.
        save_every: the number of samples after which to save it again. Default: 10,000.
    """

    checkpoint: str | os.PathLike[str] | None
    save_every: int


@dataclass(frozen=True)
class Measurement:
    """The options of one measurement. For their meaning see :class:`MeasurementOptions`."""

    estimator: str = "per_sample"
    criterion: CriterionOption = MAS
    reduction: str | None = None
    objective: Objective = "squared_l2"
    draws: int = 1
    seed: int = 0
    forward: Forward | None = None
    max_samples: int | None = None
    progress: Progress = None
    weighting: str = "samples"
    training: bool = False
    checkpoint: str | os.PathLike[str] | None = None
    save_every: int = 10_000
    samples_before: int = 0  # in this task: no option, but what other draws are told apart by

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], declared: type = MeasurementOptions
    ) -> Measurement:
        """Makes a measurement from keyword arguments.

        Values are not checked here but in :meth:`check`, which all ranks call at the same point,
        so that an error on one of them is raised on all.

        Args:
            options: the keyword arguments.
            declared: the ``TypedDict`` that says which ones there are.

        Raises:
            TypeError: a keyword is unknown.
        """
        for name in options:
            if name not in declared.__annotations__:
                known = ", ".join(sorted(declared.__annotations__))
                raise TypeError(f"got an unexpected keyword argument {name!r}; use {known}")
        return cls(**options)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank takes one sample per pass through a sharded model."""
        return self.estimator == PER_SAMPLE_SHARDED

    @property
    def sample_limit(self) -> int:
        """``max_samples`` as a number."""
        return NO_LIMIT if self.max_samples is None else self.max_samples

    @property
    def reduction_name(self) -> str:
        """How a sample's gradient counts: ``"abs"`` or ``"square"``."""
        criterion = criteria.resolve(self.criterion, self.objective)
        return criteria.reduction_of(criterion, self.reduction).name

    def described(self) -> dict[str, Any]:
        """What distinguishes this measurement from another, as JSON can store it.

        ``forward`` and ``progress`` are left out: there is no way to compare functions.
        """
        left_out = ("forward", "progress", "checkpoint", "save_every", "samples_before")
        names = [field.name for field in fields(self) if field.name not in left_out]
        return {name: _described(getattr(self, name)) for name in names}

    def check(self) -> None:
        """Checks every value, and that they go together.

        Raises:
            TypeError, ValueError: one cannot be used; the message names it.
        """
        limit = self.max_samples
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"max_samples is {limit!r}; pass a positive whole number or None")
        if self.estimator not in ESTIMATORS:
            names = ", ".join(map(repr, ESTIMATORS))
            raise ValueError(f"estimator: {self.estimator!r} is unknown; use {names}")
        self._check_criterion()
        check_weighting(self.weighting)
        if not isinstance(self.training, bool):
            raise TypeError(f"training is {self.training!r}; pass True or False")
        if self.estimator != "batch":
            self._check_exact()
        if not (self.forward is None or callable(self.forward)):
            raise TypeError(f"forward is {self.forward!r}; pass a callable(model, batch) or None")
        progress = self.progress
        if not (progress is None or isinstance(progress, bool) or callable(progress)):
            raise TypeError(f"progress is {progress!r}; pass True, None or a callable(samples)")

    def _check_criterion(self) -> None:
        criterion = criteria.resolve(self.criterion, self.objective)
        criteria.reduction_of(criterion, self.reduction)
        if self.criterion != MAS and self.objective != "squared_l2":
            raise ValueError(
                f"objective is for criterion='mas', and the criterion is {self.criterion!r}; leave "
                "one of them out"
            )
        for name, value, least in (("draws", self.draws, 1), ("seed", self.seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; pass a whole number of at least {least}")
        if self.draws != 1 and not criterion.is_drawn:
            raise ValueError(
                f"draws: criterion={self.criterion!r} draws nothing; leave draws out, or use "
                "criterion='fisher' or 'gauss_newton'"
            )

    def _check_exact(self) -> None:
        """Estimators of single samples: all of them count equally, in evaluation mode."""
        if self.weighting != "samples":
            raise ValueError(
                f"weighting: with estimator={self.estimator!r} every sample counts the same; leave "
                f"weighting={self.weighting!r} out, or use estimator='batch'"
            )
        if self.training:
            raise ValueError(
                f"training: estimator={self.estimator!r} needs each sample's own gradient, which "
                "does not exist in training mode because of dropout and batch statistics; leave "
                "training=True out, or use estimator='batch'"
            )


def _described(value: Any) -> Any:
    """A value as JSON can store it: a function by its name."""
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value


def check_weighting(weighting: Any) -> str:
    """Returns the weighting.

    Raises:
        ValueError: it is neither ``"samples"`` nor ``"batches"``.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: {weighting!r} is unknown; use 'samples' or 'batches'")
    return weighting
