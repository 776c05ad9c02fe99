"""What criteria differentiate, by autograd of one sample and one target at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext.importance import criteria
from mas_ext.importance.batches import Inputs, Target
from tests.support.oracle import call, first_tensor, one_by_one

IGNORED = -100


def likelihood(output: Tensor, labels: Tensor) -> Tensor:
    """log p(labels), [B]; classes are last, or dimension 1 of images."""
    logits = (output.movedim(1, -1) if output.dim() == 4 else output).log_softmax(-1)
    if labels.is_floating_point():
        return (labels * logits).reshape(len(output), -1).sum(1)
    chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (chosen * (labels != IGNORED)).reshape(len(output), -1).sum(1)


def product(output: Tensor, cotangent: Tensor) -> Tensor:
    return (output * cotangent).reshape(len(output), -1).sum(1)


def scalar_of(criterion: str, output: Tensor, values: Tensor) -> Tensor:
    return (product if criterion == "gauss_newton" else likelihood)(output, values)


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}


def targets(
    criterion: str,
    model: nn.Module,
    batch: Mapping[str, Any],
    draws: int = 1,
    seed: int = 0,
    before: int = 0,
    rank: int = 0,
) -> list[Target]:
    """What a batch's output is compared with, where ``before`` samples were before it."""
    with torch.no_grad():
        output = first_tensor(call(model, inputs_of(batch)))
    number = criteria.seed_of(seed, rank, before)
    found = criteria.CRITERIA[criterion].targets
    assert found is not None
    return list(found(criteria.Situation(model, Inputs.with_others(batch), output, draws, number)))


def judged(
    criterion: str,
    model: nn.Module,
    batches: Iterable[tuple[Mapping[str, Any], list[Target]]],
    reduction: str = "square",
) -> dict[str, Tensor]:
    """Ω of batches, each with its targets."""
    root = torch.sqrt if reduction == "square" else lambda weight: weight
    data = [
        {"inputs": inputs_of(batch), "targets": [(t.values, t.weight) for t in found]}
        for batch, found in batches
    ]

    def of_targets(output: Tensor, batch: dict) -> Tensor:
        pairs = batch["targets"]
        scalars = [scalar_of(criterion, output, values) * root(weight) for values, weight in pairs]
        return torch.cat(scalars)

    def forward(model: nn.Module, batch: dict) -> Any:
        return call(model, batch["inputs"])

    return one_by_one(model, data, forward=forward, criterion=of_targets, reduction=reduction)
