"""An optimizer's step with the penalty in it: SGD, momentum and AdamW, gradient and proximal mode.

Ours does both in one pass. The alternatives call our ``add_penalty_grad_`` (or ``proximal_step_``)
and one of torch's implementations. torch's are called the way the optimizer calls them, but without
the Python code that runs once per step, so that only the passes over memory are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from benchmarks.job import OURS, Job, Provider
from benchmarks.state import State, in_float64
from mas_ext import functional

LR, MOMENTUM, BETAS, EPS, DECAY = 1e-3, 0.9, (0.9, 0.999), 1e-8, 0.01
STEPS = 100.0  # taken already, so that the moments are those of mid-training


@dataclass
class Moments:
    """Optimizer state that all providers share, and gradients for those that write them."""

    first: list[Tensor]
    second: list[Tensor]
    steps: dict[str, list[Tensor]]  # on the device as torch's fused step needs them, and on the CPU
    grads: dict[str, list[Tensor]] = field(default_factory=dict)


def _moments(s: State) -> Moments:
    if "moments" not in s.cache:
        device = s.params[0].device
        generator = torch.Generator(device).manual_seed(1)

        def normal(p: Tensor) -> Tensor:
            return torch.empty_like(p).normal_(0, 0.01, generator=generator)

        first = [normal(p) for p in s.params]
        second = [normal(p).square_() + 1e-5 for p in s.params]
        fused = [torch.tensor(STEPS, device=device) for _ in s.params]
        steps = {"fused": fused, "foreach": [torch.tensor(STEPS) for _ in fused]}
        s.cache["moments"] = Moments(first, second, steps)
    return s.cache["moments"]


def _own_grads(s: State, name: str) -> list[Tensor]:
    grads = _moments(s).grads
    if name not in grads:
        grads[name] = [g.clone() for g in s.grads]
    return grads[name]


# -- our step, torch's, and the formula ------------------------------------------------------------
def _our_sgd(s: State, mode: str, **options: Any) -> Tensor:
    return functional.sgd_step_(
        s.params, s.grads, s.anchors, s.omega, s.lambda_reg, LR, mode=mode, **options
    )


def _our_momentum(s: State, mode: str) -> Tensor:
    return _our_sgd(s, mode, momentum_buffers=_moments(s).first, momentum=MOMENTUM)


def _our_adamw(s: State, mode: str) -> Tensor:
    m = _moments(s)
    moments = {"exp_avgs": m.first, "exp_avg_sqs": m.second, "steps": torch.stack(m.steps["fused"])}
    options = {"mode": mode, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    lists = s.params, s.grads, s.anchors, s.omega
    return functional.adamw_step_(*lists, s.lambda_reg, LR, **moments, **options)


def _torch_sgd(s: State, grads: list[Tensor], momentum: float = 0.0, **which: bool) -> None:
    options = {"dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    buffers = list(_moments(s).first) if momentum else [None] * len(s.params)
    sgd(s.params, grads, buffers, lr=LR, momentum=momentum, **options, **which)


def _torch_momentum(s: State, grads: list[Tensor], **which: bool) -> None:
    _torch_sgd(s, grads, MOMENTUM, **which)


def _torch_adamw(s: State, grads: list[Tensor], **which: bool) -> None:
    m = _moments(s)
    (implementation,) = which
    steps = m.steps[implementation]
    options = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True, "eps": EPS}
    rates = {"beta1": BETAS[0], "beta2": BETAS[1], "lr": LR, "weight_decay": DECAY}
    adam(s.params, grads, m.first, m.second, [], steps, **options, **rates, **which)


def _sgd_formula(p: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return (p - LR * g,)


def _momentum_formula(p: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    b = MOMENTUM * b + g
    return p - LR * b, b


def _adamw_formula(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
    first, second = (1 - beta ** (STEPS + 1) for beta in BETAS)
    return p - LR * DECAY * p - LR * (m / first) / ((v / second).sqrt() + EPS), m, v


@dataclass(frozen=True)
class Optimizer:
    """Bytes are per float32 parameter: of our one pass, and of torch's step by implementation."""

    title: str
    our_bytes: int
    torch_bytes: dict[str, int]
    ours: Callable[..., Tensor]
    torchs: Callable[..., None]
    formula: Callable[..., tuple[Tensor, ...]]  # θ, g, moments → θ, moments
    moments: Callable[[State], list[list[Tensor]]] = lambda s: []  # that the step writes


OPTIMIZERS = {
    "sgd": Optimizer("SGD", 20, {"fused": 12, "foreach": 12}, _our_sgd, _torch_sgd, _sgd_formula),
    "momentum": Optimizer(
        "SGD with momentum",
        28,
        {"fused": 20, "foreach": 32},  # foreach: b·μ 8, +g 12, θ−ηb 12
        _our_momentum,
        _torch_momentum,
        _momentum_formula,
        lambda s: [_moments(s).first],
    ),
    "adamw": Optimizer(
        "AdamW",
        36,
        {"fused": 28, "foreach": 88},  # foreach: decay 8, m 12, v 8 + 12, root and scale 32, θ 16
        _our_adamw,
        _torch_adamw,
        _adamw_formula,
        lambda s: [_moments(s).first, _moments(s).second],
    ),
}


def _two_passes(optimizer: Optimizer, mode: str, which: str) -> Provider:
    """Our penalty and torch's step, one after the other."""
    gradient = mode == "gradient"
    name = f"add_penalty_grad_, torch {which}" if gradient else f"torch {which}, proximal_step_"

    @torch.no_grad()
    def step(s: State) -> Tensor:
        state = s.params, s.anchors, s.omega, s.lambda_reg
        grads = _own_grads(s, name)
        if not gradient:
            optimizer.torchs(s, grads, **{which: True})
            return functional.proximal_step_(*state, LR)
        value = functional.add_penalty_grad_(grads, *state)
        optimizer.torchs(s, grads, **{which: True})
        return value

    return Provider(name, step, (20 if gradient else 16) + optimizer.torch_bytes[which])


def _expected(s: State, optimizer: Optimizer, mode: str) -> tuple[list[Tensor], Tensor]:
    moments = optimizer.moments(s)
    written: list[list[Tensor]] = [[] for _ in range(1 + len(moments))]
    energy = 0.0

    def formula(p: Tensor, g: Tensor, a: Tensor, o: Tensor, *m: Tensor) -> tuple[Tensor, ...]:
        """The sum of the penalty comes first."""
        if mode == "gradient":
            new = optimizer.formula(p, g + s.lambda_reg * o * (p - a), *m)
            return (o * (p - a) ** 2).sum(), *new
        p, *m = optimizer.formula(p, g, *m)
        c = LR * s.lambda_reg * o
        p = (p + c * a) / (1 + c)
        return (o * (p - a) ** 2).sum(), p, *m

    for tensors in zip(s.params, s.grads, s.anchors, s.omega, *moments, strict=True):
        part, *results = in_float64(formula, *tensors)
        energy += part
        for written_list, result in zip(written, results, strict=True):
            written_list.append(result.float())
    return [t for tensors in written for t in tensors], s.lambda_reg / 2 * energy


def _job(name: str, mode: str) -> Job:
    optimizer = OPTIMIZERS[name]
    where = "added to its gradient" if mode == "gradient" else "as a proximal step after it"
    return Job(
        name=f"{name}_{mode}",
        title=f"{optimizer.title}: a step with the penalty {where}",
        about="The penalty and the optimizer's step in one pass, or one after the other.",
        bytes_per_parameter=optimizer.our_bytes,
        providers=(
            Provider(OURS, lambda s: optimizer.ours(s, mode), optimizer.our_bytes),
            *(_two_passes(optimizer, mode, which) for which in optimizer.torch_bytes),
        ),
        written=lambda s: [
            *(p.detach() for p in s.params),
            *(t for tensors in optimizer.moments(s) for t in tensors),
        ],
        expected=lambda s: _expected(s, optimizer, mode),
        streams=lambda s: [s.params, *optimizer.moments(s), s.grads, s.anchors, s.omega],
        sizes=("mlp", "resnet50", "gpt2") if mode == "gradient" else ("mlp", "resnet50"),
    )


JOBS = tuple(_job(name, mode) for name in OPTIMIZERS for mode in ("gradient", "proximal"))
