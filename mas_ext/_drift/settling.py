r"""Settling: moving the parameters back towards θ* until the drift is within the budget.

.. math:: \theta_c = \frac{\theta + c\,\Omega\,\theta^*}{1 + c\,\Omega}

is the proximal step from where training ended; with Ω = 1 it is the straight line between the new
and the old parameters.

LoRA adapters cannot move each element of a weight by itself. Of their update Δ, one part per weight
is kept, the same problem's solution among the multiples of Δ:

.. math:: \Delta_c = \frac{\sum\Delta_i^2}{\sum(1 + c\,\Omega_i)\Delta_i^2}\,\Delta
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mas_ext._distributed.shards import Placement, local
from mas_ext._drift.references import evaluating
from mas_ext._penalty.parameter_groups import ProtectedParameter, grouped
from mas_ext._penalty.weight_updates import ProtectedUpdate

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
        updates: of weights by their adapters, which are moved likewise.
        model: its floating-point buffers are moved along: a buffer keeps the part of its change
            that the parameters keep of theirs, measured by ‖θ − θ*‖.
        buffers: the model's buffers when the task began, by name.
        weights: ``"importance"`` or ``"uniform"``.

    Attributes:
        is_uniform: whether the weights are uniform.
    """

    def __init__(
        self,
        protected: list[ProtectedParameter],
        updates: list[ProtectedUpdate],
        model: nn.Module,
        buffers: dict[str, Tensor],
        weights: str,
    ) -> None:
        self._moved = [one for one in protected if float(one.lambda_reg) > 0]
        held = [one for one in updates if float(one.lambda_reg) > 0]
        groups = grouped(self._moved)
        strengths = [float(one.lambda_reg) for one in groups] + [float(u.lambda_reg) for u in held]
        largest = max(strengths, default=1.0)
        # λ divided by the largest, so that patterns keep their proportions.
        self._groups = [g._replace(lambda_reg=g.lambda_reg / largest) for g in groups]
        self._updates = [_MovedUpdate(u, float(u.lambda_reg) / largest) for u in held]
        self.is_uniform = weights == "uniform"
        self._end = [local(one.param).detach().clone() for one in self._moved]
        self._buffers = [
            (now, now.detach().clone(), buffers[name].to(now))
            for name, now in model.named_buffers()
            if name in buffers and buffers[name].shape == now.shape
        ]
        self._length = self._distance()

    @torch.no_grad()
    def unit(self) -> float:
        """The c that moves the parameters about halfway."""
        if self.is_uniform:
            return 1.0
        size = 2 * sum(float(group.penalty()) for group in self._groups)
        size += sum(update.weighted for update in self._updates)
        unit = self._length**2 / size if size > 0 else 1.0
        return unit if 0 < unit < math.inf else 1.0

    @torch.no_grad()
    def put(self, c: float) -> None:
        """Sets the model to θ_c."""
        for one, end in zip(self._moved, self._end, strict=True):
            local(one.param).copy_(one.anchor if math.isinf(c) else end)
        for update in self._updates:
            update.put(c, self.is_uniform)
        if 0 < c < math.inf:
            self._move(c)
        kept = self._kept(c)
        for now, end, begun in self._buffers:
            now.copy_(end if kept == 1 else torch.lerp(begun, end, kept))

    def _move(self, c: float) -> None:
        if self.is_uniform:
            for one in self._moved:
                local(one.param).lerp_(one.anchor_beside(), c / (1 + c))
        else:
            for group in self._groups:
                group._replace(lambda_reg=group.lambda_reg * c).proximal_step_(1.0)

    def _kept(self, c: float) -> float:
        """The part of the change that is left, from 1 to 0."""
        if c == 0 or math.isinf(c):
            return 0.0 if c else 1.0
        if not 0 < self._length < math.inf:
            return 1 / (1 + c)
        return min(self._distance() / self._length, 1.0)

    def _distance(self) -> float:
        """‖θ − θ*‖."""
        squares = (
            Placement.of(one.param).sum_over_shards(
                (local(one.param).detach().double() - one.anchor_beside().double()).square().sum()
            )
            for one in self._moved
        )
        updates = (update.update.square() for update in self._updates)
        return math.sqrt(sum(float(square) for square in (*squares, *updates)))


class _MovedUpdate:
    """The update of one weight, on its way back.

    Attributes:
        update: what is moved.
        weighted: Σ λΩ(θ−θ*)² where training ended, with a λ relative to the largest.
    """

    def __init__(self, update: ProtectedUpdate, lambda_reg: float) -> None:
        self.update = update
        with torch.no_grad():
            self.weighted = 2 * float(update.penalty(lambda_reg))
        self._square = float(update.square())
        self._end = {name: one.copied() for name, one in update.weight.adapters().items()}
        if update.weight.layer.merged_adapters:
            raise ValueError(
                f"the adapters of {update.weight.name!r} are merged into it, and to move them "
                "would change nothing; call unmerge_adapter() before settle()"
            )

    def put(self, c: float, is_uniform: bool) -> None:
        """Keeps the part of the update that is left at c."""
        weighted = self._square if is_uniform else self.weighted
        if c == 0 or weighted == 0:
            kept = 1.0
        else:
            kept = 0.0 if math.isinf(c) else self._square / (self._square + c * weighted)
        for name, now in self.update.weight.adapters().items():
            end, before = self._end[name], self.update.before.get(name)
            now.b.copy_(end.b * kept if before is None else torch.lerp(before.b, end.b, kept))
            if before is not None:
                now.a.copy_(torch.lerp(before.a, end.a, kept))


def search(path: Path, drift: Callable[[], float], limit: float, before: float) -> Found | None:
    """The smallest c found whose drift is within the limit.

    The model is left at θ_c. The drift need not fall as c grows: what is returned was measured.

    Args:
        path: sets the model to a c.
        drift: measures it.
        limit: of the drift.
        before: the drift at c = 0, which is above the limit.

    Returns:
        None if no finite c keeps within the limit, and for ``"uniform"`` weights θ* neither.
    """

    def at(c: float) -> Found:
        path.put(c)
        return Found(c, drift())

    unit = path.unit()
    low, high = Found(0.0, before), at(unit)
    while high.drift > limit:
        if math.isinf(high.c) or (high.c >= LARGEST * unit and not path.is_uniform):
            return None
        low, high = high, at(math.inf if high.c >= LARGEST * unit else high.c * FACTOR)
    for _ in range(MOST):
        if high.drift >= CLOSE * limit or high.c <= unit / LARGEST:
            break
        middle = at(_between(low, high, limit))
        if middle.drift > limit:
            low = middle
        else:
            high = middle
    path.put(high.c)
    return high


class Found(NamedTuple):
    """A c, and the drift that was measured there."""

    c: float
    drift: float


def _between(low: Found, high: Found, limit: float) -> float:
    """Where a straight line from the one to the other meets the limit, in logarithms."""
    if low.c == 0:
        return high.c / FACTOR
    if math.isinf(high.c):
        return low.c * FACTOR
    aim = limit * (1 + CLOSE) / 2
    ways = [math.log(max(value, 1e-300)) for value in (low.drift, aim, high.drift)]
    share = 0.5 if math.isinf(low.drift) else (ways[0] - ways[1]) / (ways[0] - ways[2])
    share = min(max(share, 0.1), 0.9)
    return math.exp(math.log(low.c) + share * (math.log(high.c) - math.log(low.c)))
