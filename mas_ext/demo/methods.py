"""The methods that the demo compares: a row for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mas_ext
from mas_ext.quadratic import QuadraticRegularizer


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        label: its name in the report.
        words: what it does, in the report.
        regularizer: its class; None: nothing is held in place.
        mode: how the penalty joins the optimizer's step.
        strength: the setting that gives its λ; None: λ always follows the budget.
        settings: the settings that its class takes, under the same names.
        measures: whether Ω is measured, in the way that is the class's default.
    """

    label: str
    words: str
    regularizer: type[QuadraticRegularizer] | None = None
    mode: str = "proximal"
    strength: str | None = None
    settings: tuple[str, ...] = ()
    measures: bool = False


_MAS: dict[str, Any] = {
    "regularizer": mas_ext.MAS,
    "settings": ("drift", "state_dtype"),
    "measures": True,
}

METHODS: dict[str, Method] = {
    "finetune": Method("Fine-tuning", "goes on training; nothing is held in place"),
    "l2sp": Method(
        "L2-SP",
        "a proximal step holds all parameters alike; settling is interpolation with the old ones "
        "(WiSE-FT)",
        mas_ext.L2SP,
    ),
    "ewc": Method(
        "EWC",
        "a proximal step holds each parameter as firmly as the probabilities depend on it",
        mas_ext.EWC,
        settings=("state_dtype",),
        measures=True,
    ),
    "mas_proximal": Method(
        "MAS, proximal",
        "a proximal step holds each parameter as firmly as the output depends on it",
        strength="lambda_proximal",
        **_MAS,
    ),
    "mas": Method(
        "MAS, gradient",
        "the penalty of MAS as a gradient, which joins the loss’s before the optimizer’s step",
        mode="gradient",
        strength="lambda_reg",
        **_MAS,
    ),
}
