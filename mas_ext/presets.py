"""Presets: the settings with which this package computes the same as another implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mas_ext._state.merging import Merge, check_merge
from mas_ext._strength.strength import AUTO, check_lambda
from mas_ext.importance.objectives import Objective
from mas_ext.quadratic import QuadraticRegularizer
from mas_ext.regularizer import METHODS


@dataclass(frozen=True)
class Deviation:
    """One way in which an implementation differs from its paper's equations.

    Attributes:
        what: what the implementation does.
        cost: the consequence.
    """

    what: str
    cost: str


@dataclass(frozen=True)
class Preset:
    r"""What :func:`preset` returns: how one implementation computes MAS or EWC.

    Attributes:
        name: the name to pass to :func:`preset`.
        source: where the implementation is published.
        lambda_scale: the ratio of the λ of :class:`mas_ext.MAS`, whose penalty has a factor ½, to
            the implementation's λ: 2 if its penalty is :math:`\lambda\sum_i\Omega_i\delta_i^2`, 1
            if it has the ½ too.
        merge: see :class:`mas_ext.MAS`.
        method: ``"mas"`` or ``"ewc"``.
        estimator, criterion, objective, weighting, training: see
            :func:`mas_ext.estimate_importance`.
        deviations: the differences from the paper.
        notes: what you have to pass yourself, and what remains different.
    """

    name: str
    source: str
    lambda_scale: float
    merge: Merge
    method: str = "mas"
    estimator: str = "batch"
    criterion: str = "mas"
    objective: Objective = "squared_l2"
    weighting: str = "samples"
    training: bool = False
    deviations: tuple[Deviation, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def importance(self) -> dict[str, Any]:
        """The measurement options, as in ``mas.consolidate(data, **preset.importance)``."""
        return {
            "estimator": self.estimator,
            "criterion": self.criterion,
            "objective": self.objective,
            "weighting": self.weighting,
            "training": self.training,
        }

    def regularizer(self, lambda_reg: float | str = 1.0) -> dict[str, Any]:
        """The arguments of the class, as in ``mas_ext.MAS(model, **preset.regularizer(λ))``.

        Args:
            lambda_reg: λ as the implementation defines it, or for MAS ``"auto"``.

        Raises:
            ValueError: λ is negative or not finite.
        """
        if lambda_reg != AUTO:
            lambda_reg = self.lambda_scale * check_lambda(lambda_reg)
        return {"lambda_reg": lambda_reg, "merge": self.merge}

    def mas(
        self, model: nn.Module, lambda_reg: float | str = 1.0, **options: Any
    ) -> QuadraticRegularizer:
        """A :class:`mas_ext.MAS` or :class:`mas_ext.EWC` with the implementation's settings.

        Args:
            model: as for :class:`mas_ext.MAS`.
            lambda_reg: λ as the implementation defines it, or for MAS ``"auto"``.
            options: further arguments of the class; they override the preset's.

        Raises:
            ValueError, TypeError: see :class:`mas_ext.MAS`.
        """
        return METHODS[self.method](model, **{**self.regularizer(lambda_reg), **options})

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.source})"]
        lines += [f"  lambda_reg = {self.lambda_scale:g} × theirs, merge = {self.merge!r}"]
        lines += [f"  {key} = {value!r}" for key, value in self.importance.items()]
        lines += [f"  - {deviation.what}: {deviation.cost}" for deviation in self.deviations]
        lines += [f"  - note: {note}" for note in self.notes]
        return "\n".join(lines)


_BATCH = Deviation(
    "the absolute value is taken of a batch's mean gradient",
    "samples of opposite sign cancel, so Ω is too small and depends on the batch size",
)
_SQUARED_BATCH = Deviation(
    "a batch's mean gradient is squared",
    "samples of opposite sign cancel; of independent gradients with mean 0, 1/B is left, for "
    "batches of B samples",
)
_GIVEN = Deviation(
    "labels are those of the data",
    "this empirical Fisher is not the Fisher information: it vanishes where the data is fitted",
)
_ONE_ANCHOR = "all tasks share the last θ*, whereas theirs keeps one per task"
_EQUAL = Deviation(
    "every batch counts the same",
    "samples in a short last batch count for more than the others",
)
_TRAINING = Deviation(
    "importance is measured in training mode",
    "with dropout Ω is random; batch normalisation uses statistics that the network is not used "
    "with, and mixes the samples; theirs lets the running statistics drift, which is not repeated",
)
_FADING = Deviation(
    "Ω ← αΩ + (1−α)Ω_task",
    "every new task multiplies what holds the old ones by α, by default ½",
)
_FROM_ZERO = Deviation(
    "the average starts from Ω = 0",
    "the first task is held by 1−α of its Ω, by default half, from the start",
)
_OUTPUT = Deviation(
    "‖F‖ is differentiated instead of ‖F‖²",
    "a sample's gradient is divided by 2‖F(x)‖, so those with large outputs count for less",
)
_HEADS = Deviation("heads are left out", "they move freely, also where they are shared by tasks")
_LAST = Deviation("a short last batch is left out", "its samples are not measured")
_SUMS = Deviation(
    "each task's Ω is added to all earlier merged Ω",
    "what holds an old task doubles with every new one: after five tasks they weigh 8, 4, 2, 1, 1",
)

_PRESETS = (
    Preset(
        "paper",
        "https://arxiv.org/abs/1711.09601",
        lambda_scale=2.0,
        merge="sum",
        estimator="per_sample",
    ),
    Preset(
        "official",
        "https://github.com/rahafaljundi/MAS-Memory-Aware-Synapses",
        lambda_scale=2.0,
        merge="sum",
        weighting="batches",
        deviations=(_BATCH, _EQUAL),
        notes=("the gradient 2λΩ(θ−θ*) is added in the optimizer, as mas.attach(optimizer) does",),
    ),
    Preset(
        "avalanche",
        "https://github.com/ContinualAI/avalanche",
        lambda_scale=2.0,
        merge=("ema", 0.5),
        weighting="batches",
        training=True,
        deviations=(_BATCH, _EQUAL, _TRAINING, _FADING),
        notes=("see mas_ext.integrations.avalanche.MASPlugin",),
    ),
    Preset(
        "facil",
        "https://github.com/mmasana/FACIL",
        lambda_scale=1.0,
        merge=("ema_from_zero", 0.5),
        objective="l2",
        training=True,
        deviations=(_BATCH, _OUTPUT, _TRAINING, _FADING, _FROM_ZERO, _HEADS, _LAST),
        notes=(
            "leave the heads out with params=, and the short last batch with drop_last=True",
            "of several heads, join the outputs: forward=lambda model, batch: torch.cat(…, 1)",
        ),
    ),
    Preset(
        "capymoa",
        "https://github.com/adaptive-machine-learning/CapyMOA",
        lambda_scale=1.0,
        merge=("ema_from_zero", 0.5),
        weighting="batches",
        training=True,
        deviations=(_BATCH, _EQUAL, _TRAINING, _FADING, _FROM_ZERO),
        notes=("its data are the last samples of the stream, by default 256 in batches of 32",),
    ),
    Preset(
        "seed",
        "the notebook that this project started from",
        lambda_scale=1.0,
        merge="sum_of_sums",
        weighting="batches",
        deviations=(_BATCH, _EQUAL, _SUMS),
    ),
    Preset(
        "ewc",
        "https://arxiv.org/abs/1612.00796",
        lambda_scale=1.0,
        merge="sum",
        method="ewc",
        estimator="per_sample",
        criterion="fisher",
        notes=(_ONE_ANCHOR,),
    ),
    Preset(
        "online_ewc",
        "https://arxiv.org/abs/1805.06370",
        lambda_scale=1.0,
        merge=("decay", 0.5),
        method="ewc",
        estimator="per_sample",
        criterion="fisher",
        notes=(
            "γ is alpha=, as in preset('online_ewc', alpha=0.95)",
            "its penalty has γF for the tasks before: pass γ times its λ",
        ),
    ),
    Preset(
        "avalanche_ewc",
        "https://github.com/ContinualAI/avalanche",
        lambda_scale=2.0,
        merge=("decay", 0.5),
        method="ewc",
        criterion="empirical_fisher",
        weighting="batches",
        deviations=(_SQUARED_BATCH, _EQUAL, _GIVEN),
        notes=(
            "see mas_ext.integrations.avalanche.EWCPlugin",
            "this is EWCPlugin(mode='online'), with alpha for decay_factor; for mode='separate', "
            "pass merge='sum': " + _ONE_ANCHOR,
        ),
    ),
)
PRESETS = {known.name: known for known in _PRESETS}


def preset(name: str, *, alpha: float | None = None) -> Preset:
    """Returns the settings that reproduce Ω, its merging and the penalty of another implementation.

    The implementation's deviations from the paper are reproduced too. ``print(preset(name))`` lists
    them with their consequences. Example::

        theirs = mas_ext.preset("avalanche")
        mas = theirs.mas(model, lambda_reg=1.0)         # λ as Avalanche defines it
        ...
        mas.consolidate(data, **theirs.importance)      # batches as Avalanche would make them

    Args:
        name: of MAS, ``"paper"``, ``"official"`` (the authors' code), ``"avalanche"``,
            ``"facil"``, ``"capymoa"`` or ``"seed"`` (the notebook that this project started from);
            of EWC, ``"ewc"`` (Kirkpatrick et al.), ``"online_ewc"`` (Schwarz et al.) or
            ``"avalanche_ewc"``.
        alpha: α in [0, 1), for implementations that average over tasks or let Ω decay. None: ½.

    Returns:
        The preset.

    Raises:
        ValueError: the name is unknown, alpha is not in [0, 1), or alpha was given for an
            implementation that neither averages over tasks nor lets Ω decay.
    """
    if name not in PRESETS:
        names = ", ".join(map(repr, PRESETS))
        raise ValueError(f"preset: {name!r} is unknown; use {names}")
    chosen = PRESETS[name]
    if alpha is None:
        return chosen
    if isinstance(chosen.merge, str):
        raise ValueError(f"alpha: preset {name!r} merges by {chosen.merge!r}; leave alpha out")
    return replace(chosen, merge=check_merge((chosen.merge[0], alpha)))
