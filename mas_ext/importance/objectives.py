"""The functions of a network's output that Memory Aware Synapses differentiate, s [B]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mas_ext.importance.outputs import at_least_float32, classes_last

Objective = str | Callable[[Tensor], Tensor]


def squared_l2(output: Tensor) -> Tensor:
    """‖F(x)‖²₂, the paper's."""
    return _rows(output).square().sum(1)


def l2(output: Tensor) -> Tensor:
    """‖F(x)‖₂."""
    return torch.linalg.vector_norm(_rows(output), dim=1)


def l1(output: Tensor) -> Tensor:
    """‖F(x)‖₁."""
    return _rows(output).abs().sum(1)


def probabilities(output: Tensor) -> Tensor:
    """‖softmax F(x)‖²₂, which a number added to all outputs does not change.

    Raises:
        ValueError: there are fewer than two classes, so that it is 1 whatever the parameters.
    """
    logits = classes_last(output)
    if logits.shape[-1] < 2:
        raise ValueError(
            f"objective='probabilities' is of the probabilities of classes, and an output of shape "
            f"{list(output.shape)} has only one per prediction; use another objective"
        )
    return squared_l2(logits.softmax(-1))


OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "squared_l2": squared_l2,
    "l2": l2,
    "l1": l1,
    "probabilities": probabilities,
}


def resolve(objective: Objective) -> Callable[[Tensor], Tensor]:
    """The function from output [B, …] to scalars [B] that ``objective`` stands for.

    Raises:
        ValueError: an unknown name.
    """
    if callable(objective):
        return objective
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        names = ", ".join(map(repr, OBJECTIVES))
        raise ValueError(f"objective: {objective!r} is unknown; use {names} or a callable")
    named = OBJECTIVES[objective]
    return lambda output: named(at_least_float32(output))


def _rows(output: Tensor) -> Tensor:
    return output.unsqueeze(1) if output.dim() == 1 else output.flatten(1)
