"""MAS in a training loop as anyone would write it, in float64 and plain PyTorch.

Shares no code with mas_ext, so that the two can disagree. A model is only asked for the gradients
of its loss, in its own precision; all that follows is float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Values = dict[str, Tensor]
Loss = Callable[[nn.Module], Tensor]
Rule = Callable[[str, Tensor, Tensor], Tensor]


class Memory(NamedTuple):
    """λ, and Ω and θ* by parameter name."""

    strength: float
    omega: Values
    anchor: Values

    @classmethod
    def of(cls, mas: object) -> Memory:
        """What a MAS remembers, in float64."""
        omega, anchor = (
            {name: t.detach().double().clone() for name, t in values.items()}
            for values in (mas.importance, mas.anchor)
        )
        return cls(mas.lambda_reg, omega, anchor)

    def pull(self, name: str, theta: Tensor) -> Tensor:
        """λΩ(θ − θ*)."""
        if name not in self.omega:
            return torch.zeros_like(theta)
        return self.strength * self.omega[name] * (theta - self.anchor[name])

    def towards_anchor(self, name: str, theta: Tensor, lr: float) -> Tensor:
        """(θ + ηλΩθ*) / (1 + ηλΩ)."""
        if name not in self.omega:
            return theta
        c = lr * self.strength * self.omega[name]
        return (theta + c * self.anchor[name]) / (1 + c)

    def penalty(self, theta: Mapping[str, Tensor]) -> float:
        """λ/2 Σ Ω (θ − θ*)²."""
        return sum(
            float(self.strength / 2 * (omega * (theta[n].double() - self.anchor[n]) ** 2).sum())
            for n, omega in self.omega.items()
        )


class Sgd:
    """θ ← θ − ηb with b ← μb + g; ``lr`` may be a mapping from a name's beginning to η."""

    def __init__(self, lr: float | Mapping[str, float], momentum: float = 0.0) -> None:
        self.lr, self.momentum, self.buffers = lr, momentum, {}

    def rate(self, name: str) -> float:
        if isinstance(self.lr, Mapping):
            return next(rate for start, rate in self.lr.items() if name.startswith(start))
        return self.lr

    def __call__(self, name: str, theta: Tensor, grad: Tensor) -> Tensor:
        self.buffers[name] = self.momentum * self.buffers.get(name, 0.0) + grad
        return theta - self.rate(name) * self.buffers[name]


class AdamW:
    """Decoupled weight decay w, bias-corrected moments."""

    def __init__(self, lr: float, betas=(0.9, 0.999), eps: float = 1e-8, decay: float = 1e-2):
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, decay
        self.first, self.second, self.count = {}, {}, {}

    def rate(self, name: str) -> float:
        return self.lr

    def __call__(self, name: str, theta: Tensor, grad: Tensor) -> Tensor:
        (b1, b2), t = self.betas, self.count.get(name, 0) + 1
        m = self.first[name] = b1 * self.first.get(name, 0.0) + (1 - b1) * grad
        v = self.second[name] = b2 * self.second.get(name, 0.0) + (1 - b2) * grad**2
        self.count[name] = t
        step = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + self.eps)
        return (1 - self.lr * self.decay) * theta - self.lr * step


def clipped(grads: Values, largest: float | None) -> Values:
    """All scaled down together to a norm of at most this, by torch's formula."""
    if largest is None:
        return grads
    norm = float(sum(g.square().sum() for g in grads.values()) ** 0.5)
    return {name: g * min(1.0, largest / (norm + 1e-6)) for name, g in grads.items()}


def _gradients(model: nn.Module, theta: Values, losses: Sequence[Loss]) -> Values:
    """Of the mean of these losses, where they give one."""
    params = {n: p for n, p in model.named_parameters() if n in theta}
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(theta[name])
    totals: Values = {}
    for loss in losses:
        grads = torch.autograd.grad(
            loss(model) / len(losses), list(params.values()), allow_unused=True
        )
        for name, grad in zip(params, grads, strict=True):
            if grad is not None:
                totals[name] = totals.get(name, 0.0) + grad.double()
    return totals


def by_hand(
    model: nn.Module,
    memory: Memory,
    rule: Rule,
    steps: Iterable[Sequence[Loss]],
    *,
    clip: float | None = None,
    clip_penalty: bool = False,
    proximal: bool = False,
    skipped: Iterable[int] = (),
) -> Values:
    """Where a loop ends that starts at this model, which stays as it is.

    Args:
        model: measured and trained are its parameters that require gradients.
        memory: what holds them.
        rule: (name, θ, gradient) → θ after the step.
        steps: for each step the losses of its micro-batches, whose mean is minimised.
        clip: the largest norm of the gradients.
        clip_penalty: clip with the penalty's gradient in them, and not before it joins.
        proximal: the stable step after the rule's, and not the penalty's gradient in it.
        skipped: numbers of steps that a loss scaler leaves out.
    """
    model = copy.deepcopy(model)
    theta = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    for number, losses in enumerate(steps):
        grads = _gradients(model, theta, losses)
        if number in set(skipped):
            continue
        if not clip_penalty:
            grads = clipped(grads, clip)
        if not proximal:
            grads = {n: g + memory.pull(n, theta[n]) for n, g in grads.items()}
        if clip_penalty:
            grads = clipped(grads, clip)
        for name, grad in grads.items():
            moved = rule(name, theta[name], grad)
            if proximal:
                moved = memory.towards_anchor(name, moved, rule.rate(name))
            theta[name] = moved
    return theta


class ByHand:
    """A copy of a model, and what MAS adds to its training inside another library's loop.

    Attributes:
        penalties: of every step so far.
    """

    def __init__(self, model: nn.Module, omega: Values, strength: float) -> None:
        self.model = copy.deepcopy(model)
        self.penalties: list[float] = []
        anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
        kept = {name: value.clone() for name, value in omega.items()}
        self._memory = Memory(strength, kept, anchor)

    @torch.no_grad()
    def before_step(self, mode: str) -> None:
        if mode == "gradient":
            self._note()
            for name, p in self.model.named_parameters():
                p.grad += self._memory.pull(name, p)

    @torch.no_grad()
    def after_step(self, mode: str, lr: float) -> None:
        if mode == "proximal":
            for name, p in self.model.named_parameters():
                p.copy_(self._memory.towards_anchor(name, p, lr))
            self._note()

    def _note(self) -> None:
        self.penalties.append(self._memory.penalty(dict(self.model.named_parameters())))


def assert_trained(model: nn.Module, expected: Values, start: nn.Module, within: float) -> None:
    """The model is there to this part of the way that the parameters moved, and they moved.

    The way is the largest move of any parameter; relative to the parameters' own size rounding
    alone would decide for those that hardly move.
    """
    actual = {n: p.detach().double() for n, p in model.named_parameters() if n in expected}
    began = {n: p.detach().double() for n, p in start.named_parameters() if n in expected}
    assert set(actual) == set(expected) == set(began)
    way = max(float((expected[n] - began[n]).abs().max()) for n in expected)
    assert way > 0
    for name, value in expected.items():
        error = float((actual[name] - value).abs().max())
        assert error <= within * way, f"{name}: off by {error / way:.2g} of the way"
