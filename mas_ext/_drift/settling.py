r"""Settling: moving the parameters back towards θ* until the drift is within the budget.

.. math:: \theta_c = \frac{\theta + c\,\Omega\,\theta^*}{1 + c\,\Omega}

is the proximal step from where training ended; with Ω = 1 it is the straight line between the new
and the old parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext._distributed.shards import Placement, local
from mas_ext._drift.references import evaluating
from mas_ext._penalty.parameter_groups import ParameterGroup, ProtectedParameter, grouped

WEIGHTS = ("importance", "uniform")
CLOSE = 0.98  # of the limit: then the search ends
MOST = 14  # measurements of a search
FACTOR = 30.0  # between two c, until the limit lies between their drifts
LARGEST = 1e6  # c, in units of the one that moves the parameters about halfway


@dataclass(frozen=True)
class Settled:
    """What :meth:`mas_ext.MAS.settle` did.

    Attributes:
        before: the drift before.
        after: the drift after.
        c: how far the parameters were moved: 0 if the drift was within the budget, Inf if to θ*.
        loss_before, loss_after: the mean loss on ``data``, if it was given; otherwise None.
    """

    before: float
    after: float
    c: float
    loss_before: float | None = None
    loss_after: float | None = None


def mean_loss(
    model: nn.Module, data: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> float:
    """The mean of a loss over batches, in evaluation mode."""
    with evaluating(model):
        losses = [float(loss(model, batch)) for batch in data]
    if not losses:
        raise ValueError("data: it gave no batches to compute the loss on")
    return sum(losses) / len(losses)


def check_weights(weights: Any) -> str:
    """Returns ``weights``; raises ValueError if they are unknown."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights: {weights!r} is unknown; use 'importance' or 'uniform'")
    return str(weights)


class Path:
    """The models θ_c from where training ended, c = 0, to θ*, c = ∞.

    Args:
        protected: the parameters that are moved. Where λ is 0, they are free here too.
        model: its floating-point buffers are moved along: a buffer keeps the part of its change
            that the parameters keep of theirs, measured by ‖θ − θ*‖.
        buffers: the model's buffers when the task began, by name.
        weights: ``"importance"`` or ``"uniform"``.
    """

    def __init__(
        self,
        protected: list[ProtectedParameter],
        model: nn.Module,
        buffers: dict[str, Tensor],
        weights: str,
    ) -> None:
        self._moved = [one for one in protected if float(one.lambda_reg) > 0]
        self._groups = _relative(grouped(self._moved))
        self._is_uniform = weights == "uniform"
        self._end = [local(one.param).detach().clone() for one in self._moved]
        self._buffers = [
            (now, now.detach().clone(), buffers[name])
            for name, now in model.named_buffers()
            if name in buffers and buffers[name].shape == now.shape
        ]
        self._length = self._distance()

    @torch.no_grad()
    def unit(self) -> float:
        """The c that moves the parameters about halfway."""
        if self._is_uniform:
            return 1.0
        size = 2 * sum(float(group.penalty()) for group in self._groups)
        return self._length**2 / size if size > 0 else 1.0

    @torch.no_grad()
    def put(self, c: float) -> None:
        """Sets the model to θ_c."""
        straight = self._is_uniform or math.isinf(c)
        way = (c / (1 + c) if math.isfinite(c) else 1.0) if straight else 0.0
        for one, end in zip(self._moved, self._end, strict=True):
            local(one.param).copy_(torch.lerp(end, one.anchor, way) if way < 1 else one.anchor)
        if not straight and c > 0:
            for group in self._groups:
                group._replace(lambda_reg=group.lambda_reg * c).proximal_step_(1.0)
        kept = self._distance() / self._length if self._length > 0 and c > 0 else 1.0
        for now, end, begun in self._buffers:
            now.copy_(end if kept == 1 else torch.lerp(begun, end, min(kept, 1.0)))

    def _distance(self) -> float:
        """‖θ − θ*‖."""
        squares = (
            Placement.of(one.param).sum_over_shards(
                (local(one.param).detach().double() - one.anchor.double()).square().sum()
            )
            for one in self._moved
        )
        return math.sqrt(sum(float(square) for square in squares))


def _relative(groups: list[ParameterGroup]) -> list[ParameterGroup]:
    """With each λ divided by the largest, so that patterns keep their proportions."""
    largest = max((float(group.lambda_reg) for group in groups), default=1.0)
    return [group._replace(lambda_reg=group.lambda_reg / largest) for group in groups]


def search(
    path: Path, drift: Callable[[], float], limit: float, before: float
) -> tuple[float, float] | None:
    """The smallest c found whose drift is within the limit, and that drift.

    The model is left at θ_c. The drift need not fall as c grows: what is returned was measured.

    Args:
        path: sets the model to a c.
        drift: measures it.
        limit: of the drift.
        before: the drift at c = 0, which is above the limit.

    Returns:
        None if no c keeps within the limit.
    """

    def at(c: float) -> float:
        path.put(c)
        return drift()

    unit = path.unit()
    low, above = 0.0, before
    high, below = unit, at(unit)
    while below > limit:
        if high >= LARGEST * unit:
            return None
        low, above, high = high, below, high * FACTOR
        below = at(high)
    for _ in range(MOST):
        if below >= CLOSE * limit:
            break
        if low == 0.0 and high > unit / LARGEST:
            c = high / FACTOR
        else:
            c = _between(low, above, high, below, limit)
        found = at(c)
        if found > limit:
            low, above = c, found
        else:
            high, below = c, found
    path.put(high)
    return high, below


def _between(low: float, above: float, high: float, below: float, limit: float) -> float:
    """Where a straight line from the one to the other meets the limit, in logarithms."""
    ways = [math.log(max(value, 1e-300)) for value in (above, limit * (1 + CLOSE) / 2, below)]
    share = 0.5 if math.isinf(above) else (ways[0] - ways[1]) / (ways[0] - ways[2])
    share = min(max(share, 0.1), 0.9)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
