"""An optimizer's step with the penalty in it: SGD, momentum and AdamW, gradient and proximal.

Ours does both in one pass. The others are our own ``add_penalty_grad_`` (or ``proximal_step_``) and
one of torch's implementations, called as the optimizer calls it but without what it does once a
step in Python, so that only the passes over memory are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from benchmarks.lists.providers import Job, Provider
from benchmarks.lists.state import State, in_float64
from mas_ext import functional

LR, MOMENTUM, BETAS, EPS, DECAY = 1e-3, 0.9, (0.9, 0.999), 1e-8, 0.01
STEPS = 100.0  # taken already, so that the moments are what they are in mid-training


@dataclass
class Moments:
    """What the optimizers keep, shared by all; and gradients of its own for who writes to them."""

    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]
    grads: dict[str, list[Tensor]] = field(default_factory=dict)


def _moments(s: State) -> Moments:
    if "moments" not in s.kept:
        generator = torch.Generator().manual_seed(1)

        def normal(p: Tensor) -> Tensor:
            return torch.empty(p.shape).normal_(0, 0.01, generator=generator)

        first = [normal(p) for p in s.params]
        second = [normal(p).square_() + 1e-5 for p in s.params]
        s.kept["moments"] = Moments(first, second, [torch.tensor(STEPS) for _ in s.params])
    return s.kept["moments"]


def _own_grads(s: State, name: str) -> list[Tensor]:
    grads = _moments(s).grads
    if name not in grads:
        grads[name] = [g.clone() for g in s.grads]
    return grads[name]


@dataclass(frozen=True)
class Rule:
    """An optimizer: our fused step, torch's, and the formula."""

    title: str
    bytes_in_one_pass: int  # a float32 parameter
    bytes_of_torchs: dict[str, int]  # of torch's step alone
    ours: Callable[..., Tensor]
    theirs: Callable[..., None]
    moments: Callable[[State], list[list[Tensor]]]  # that are written
    formula: Callable[..., tuple[Tensor, ...]]  # θ, g, moments → θ, moments


def _our_sgd(s: State, mode: str, **options: Any) -> Tensor:
    return functional.sgd_step_(
        s.params, s.grads, s.anchors, s.omega, s.lambda_reg, LR, mode=mode, **options
    )


def _our_momentum(s: State, mode: str) -> Tensor:
    return _our_sgd(s, mode, momentum_buffers=_moments(s).first, momentum=MOMENTUM)


def _our_adamw(s: State, mode: str) -> Tensor:
    m = _moments(s)
    return functional.adamw_step_(
        s.params,
        s.grads,
        s.anchors,
        s.omega,
        s.lambda_reg,
        LR,
        mode=mode,
        exp_avgs=m.first,
        exp_avg_sqs=m.second,
        steps=torch.stack(m.steps),
        betas=BETAS,
        eps=EPS,
        weight_decay=DECAY,
    )


def _their_sgd(s: State, grads: list[Tensor], momentum: float = 0.0, **which: bool) -> None:
    options = {"dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    buffers = list(_moments(s).first) if momentum else [None] * len(s.params)
    sgd(s.params, grads, buffers, lr=LR, momentum=momentum, **options, **which)


def _their_momentum(s: State, grads: list[Tensor], **which: bool) -> None:
    _their_sgd(s, grads, MOMENTUM, **which)


def _their_adamw(s: State, grads: list[Tensor], **which: bool) -> None:
    m = _moments(s)
    adam(
        s.params,
        grads,
        m.first,
        m.second,
        [],
        m.steps,
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=LR,
        weight_decay=DECAY,
        eps=EPS,
        maximize=False,
        decoupled_weight_decay=True,
        **which,
    )
    torch._foreach_sub_(m.steps, 1)  # the same step again, so that all take the same


def _sgd_formula(p: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return (p - LR * g,)


def _momentum_formula(p: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    b = MOMENTUM * b + g
    return p - LR * b, b


def _adamw_formula(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
    first, second = (1 - beta ** (STEPS + 1) for beta in BETAS)
    return p - LR * DECAY * p - LR * (m / first) / ((v / second).sqrt() + EPS), m, v


RULES = {
    "sgd": Rule(
        "SGD", 20, {"fused": 12, "foreach": 12}, _our_sgd, _their_sgd, lambda s: [], _sgd_formula
    ),
    "momentum": Rule(
        "SGD with momentum",
        28,
        {"fused": 20, "foreach": 32},  # foreach: b·μ 8, +g 12, θ−ηb 12
        _our_momentum,
        _their_momentum,
        lambda s: [_moments(s).first],
        _momentum_formula,
    ),
    "adamw": Rule(
        "AdamW",
        36,
        {
            "fused": 28,
            "foreach": 88,
        },  # foreach: decay 8, m 12, v 8 and 12, root and its scale 32, θ 16
        _our_adamw,
        _their_adamw,
        lambda s: [_moments(s).first, _moments(s).second],
        _adamw_formula,
    ),
}


def _unfused(rule: Rule, mode: str, which: str) -> Provider:
    """Our penalty and torch's step, one after the other."""
    gradient = mode == "gradient"
    name = f"add_penalty_grad_, torch {which}" if gradient else f"torch {which}, proximal_step_"

    @torch.no_grad()
    def step(s: State) -> Tensor:
        state = s.params, s.anchors, s.omega, s.lambda_reg
        grads = _own_grads(s, name)
        if not gradient:
            rule.theirs(s, grads, **{which: True})
            return functional.proximal_step_(*state, LR)
        value = functional.add_penalty_grad_(grads, *state)
        rule.theirs(s, grads, **{which: True})
        return value

    return Provider(name, step, (20 if gradient else 16) + rule.bytes_of_torchs[which])


def _expected(s: State, rule: Rule, mode: str) -> tuple[list[Tensor], Tensor]:
    written: list[list[Tensor]] = [[] for _ in range(1 + len(rule.moments(s)))]
    energy = torch.zeros((), dtype=torch.float64)

    def formula(p: Tensor, g: Tensor, a: Tensor, o: Tensor, *moments: Tensor) -> Tensor:
        nonlocal energy
        if mode == "gradient":
            energy += (o * (p - a) ** 2).sum()
            return rule.formula(p, g + s.lambda_reg * o * (p - a), *moments)
        p, *moments = rule.formula(p, g, *moments)
        c = LR * s.lambda_reg * o
        p = (p + c * a) / (1 + c)
        energy += (o * (p - a) ** 2).sum()
        return p, *moments

    pieces = zip(s.params, s.grads, s.anchors, s.omega, *rule.moments(s), strict=True)
    for piece in pieces:
        for tensors, result in zip(written, in_float64(formula, *piece), strict=True):
            tensors.append(result.float())
    return [t for tensors in written for t in tensors], s.lambda_reg / 2 * energy


def _job(name: str, mode: str) -> Job:
    rule = RULES[name]
    where = "added to its gradient" if mode == "gradient" else "as a proximal step after it"
    return Job(
        name=f"{name}_{mode}",
        title=f"{rule.title}: a step with the penalty {where}",
        about="One pass for both, beside our penalty and then torch's step.",
        bytes_per_parameter=rule.bytes_in_one_pass,
        providers=(
            Provider("mas_ext", lambda s: rule.ours(s, mode), rule.bytes_in_one_pass),
            _unfused(rule, mode, "fused"),
            _unfused(rule, mode, "foreach"),
        ),
        written=lambda s: [
            *(p.detach() for p in s.params),
            *(t for tensors in rule.moments(s) for t in tensors),
        ],
        expected=lambda s: _expected(s, rule, mode),
        streams=lambda s: [s.params, *rule.moments(s), s.grads, s.anchors, s.omega],
        sizes=("mlp", "resnet50", "gpt2") if mode == "gradient" else ("mlp", "resnet50"),
    )


JOBS = tuple(_job(name, mode) for name in RULES for mode in ("gradient", "proximal"))
