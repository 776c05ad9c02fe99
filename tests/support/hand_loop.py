"""A training loop with MAS as anyone would write it, in float64 and plain PyTorch.

It shares no code with mas_ext, so that the two can disagree. The model only computes the gradients
of its loss, in its own precision. Everything after that is float64, and the optimizer is one of
torch's, without foreach and without fused kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Values = dict[str, Tensor]
Loss = Callable[[nn.Module], Tensor]


class Protection(NamedTuple):
    """λ, and Ω and θ* by parameter name."""

    strength: float
    omega: Values
    anchor: Values

    @classmethod
    def of(cls, mas: Any, strength: float | None = None) -> Protection:
        """What a MAS remembers, in float64."""
        omega, anchor = (
            {name: t.detach().double().clone() for name, t in values.items()}
            for values in (mas.importance, mas.anchor)
        )
        return cls(mas.lambda_reg if strength is None else strength, omega, anchor)

    def gradient(self, name: str, theta: Tensor) -> Tensor:
        """λΩ(θ − θ*)."""
        if name not in self.omega:
            return torch.zeros_like(theta)
        return self.strength * self.omega[name] * (theta - self.anchor[name])

    def proximal(self, name: str, theta: Tensor, lr: float) -> Tensor:
        """(θ + ηλΩθ*) / (1 + ηλΩ)."""
        if name not in self.omega:
            return theta
        c = lr * self.strength * self.omega[name]
        return (theta + c * self.anchor[name]) / (1 + c)

    def penalty(self, theta: Mapping[str, Tensor]) -> float:
        """λ/2 Σ Ω (θ − θ*)² of these parameters."""
        return sum(
            float(self.strength / 2 * (omega * (theta[n].double() - self.anchor[n]) ** 2).sum())
            for n, omega in self.omega.items()
            if n in theta
        )


class HandLoop:
    """Trains a copy of a model, step by step.

    Args:
        model: stays as it is; its parameters that require gradients are trained.
        protection: may be replaced between two steps.
        make_optimizer: makes one of torch's from named float64 parameters.

    Attributes:
        theta: the parameters, in float64.
        penalties: one for each step that was taken.
    """

    def __init__(
        self,
        model: nn.Module,
        protection: Protection,
        make_optimizer: Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.model = copy.deepcopy(model)
        self.protection = protection
        self.theta = {
            n: nn.Parameter(p.detach().double().clone())
            for n, p in self.model.named_parameters()
            if p.requires_grad
        }
        self.optimizer = make_optimizer(self.theta)
        self.penalties: list[float] = []

    def step(
        self,
        losses: Sequence[Loss],
        *,
        clip: float | None = None,
        clip_penalty: bool = False,
        proximal: bool = False,
        skip: bool = False,
    ) -> None:
        """One optimizer step on the mean of the losses.

        Args:
            losses: one for each micro-batch.
            clip: the largest norm of the gradients.
            clip_penalty: clip the sum of both gradients, instead of the loss's alone.
            proximal: take the proximal step, instead of adding the penalty's gradient.
            skip: leave the step out, as a loss scaler does.
        """
        self._compute_gradients(losses)
        if skip:
            return
        with torch.no_grad():
            if not clip_penalty:
                self._clip(clip)
            if not proximal:
                self.penalties.append(self.protection.penalty(self._stepped()))
                for name, p in self._stepped().items():
                    p.grad += self.protection.gradient(name, p)
            if clip_penalty:
                self._clip(clip)
            self.optimizer.step()
            if proximal:
                for name, p in self._stepped().items():
                    p.copy_(self.protection.proximal(name, p, self._rate(p)))
                self.penalties.append(self.protection.penalty(self._stepped()))

    def _compute_gradients(self, losses: Sequence[Loss]) -> None:
        params = {n: p for n, p in self.model.named_parameters() if n in self.theta}
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(self.theta[name])
        self.optimizer.zero_grad()
        for loss in losses:
            value = loss(self.model) / len(losses)
            grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            for theta, grad in zip(self.theta.values(), grads, strict=True):
                if grad is not None:
                    before = 0.0 if theta.grad is None else theta.grad
                    theta.grad = before + grad.double()

    def _stepped(self) -> dict[str, nn.Parameter]:
        """The optimizer's parameters that have a gradient."""
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.theta.items() if id(p) in owned and p.grad is not None}

    def _clip(self, largest: float | None) -> None:
        if largest is None:
            return
        grads = [p.grad for p in self._stepped().values()]
        norm = float(sum(g.square().sum() for g in grads) ** 0.5)
        assert norm > largest, "nothing is clipped"
        for grad in grads:
            grad *= largest / (norm + 1e-6)

    def _rate(self, p: nn.Parameter) -> float:
        groups = self.optimizer.param_groups
        return next(float(g["lr"]) for g in groups if any(p is q for q in g["params"]))


def sgd(lr: float = 0.05, momentum: float = 0.9, **options: Any) -> Callable[[Values], Any]:
    """What makes the loop's optimizer."""
    return lambda named: torch.optim.SGD(
        named.values(), lr, momentum=momentum, foreach=False, **options
    )


def assert_trained(
    model: nn.Module, expected: Mapping[str, Tensor], start: nn.Module, within: float
) -> None:
    """The parameters moved, and are off by at most this fraction of the largest move.

    Relative to the parameters' own size, rounding alone would decide for those that hardly move.
    """
    actual = {n: p.detach().double() for n, p in model.named_parameters() if n in expected}
    began = {n: p.detach().double() for n, p in start.named_parameters() if n in expected}
    assert set(actual) == set(expected) == set(began)
    way = max(float((expected[n] - began[n]).detach().abs().max()) for n in expected)
    assert way > 0
    for name, value in expected.items():
        error = float((actual[name] - value).detach().abs().max())
        assert error <= within * way, f"{name}: off by {error / way:.2g} of the way"
