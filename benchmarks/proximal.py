"""The proximal step θ ← (θ + ηλΩθ*)/(1 + ηλΩ), and the penalty λ/2 Σ Ω(θ−θ*)² after it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.job import OURS, Job, Provider, compiled
from benchmarks.state import State, in_float64
from mas_ext import functional


def fused(s: State) -> Tensor:
    return functional.proximal_step_(s.params, s.anchors, s.omega, s.lambda_reg, s.lr)


@torch.no_grad()
def eager_formula(s: State) -> Tensor:
    """A literal translation of the formula."""
    energy, strength = 0.0, s.lr * s.lambda_reg
    for p, anchor, omega in zip(s.params, s.anchors, s.omega, strict=True):
        p.copy_((p + strength * omega * anchor) / (1 + strength * omega))
        energy = energy + (omega * (p - anchor) ** 2).sum()
    return s.lambda_reg / 2 * energy


@torch.no_grad()
def eager_in_place(s: State) -> Tensor:
    """Shrinks the distance to the anchor: two temporaries per tensor, and BLAS for the sum."""
    energy, one, strength = 0.0, torch.ones(()), s.lr * s.lambda_reg
    for p, anchor, omega in zip(s.params, s.anchors, s.omega, strict=True):
        delta = p - anchor
        delta.div_(torch.add(one, omega, alpha=strength))
        torch.add(anchor, delta, out=p)
        energy += torch.dot(omega.view(-1), delta.square_().view(-1))
    return s.lambda_reg / 2 * energy


@torch.no_grad()
def foreach(s: State) -> Tensor:
    deltas = torch._foreach_sub(s.params, s.anchors)
    shrink = torch._foreach_mul(s.omega, s.lr * s.lambda_reg)
    torch._foreach_add_(shrink, 1.0)
    torch._foreach_div_(deltas, shrink)
    torch._foreach_copy_(s.params, s.anchors)
    torch._foreach_add_(s.params, deltas)
    torch._foreach_mul_(deltas, deltas)
    torch._foreach_mul_(deltas, s.omega)
    return s.lambda_reg / 2 * torch.stack([d.sum() for d in deltas]).sum()


@compiled
@torch.no_grad()
def by_formula(
    params: list[Tensor], anchors: list[Tensor], omega: list[Tensor], lambda_reg: float, lr: float
) -> Tensor:
    """Plain arithmetic for torch.compile to fuse."""
    energy = 0.0
    for p, anchor, o in zip(params, anchors, omega, strict=True):
        delta = (p - anchor) / (1 + lr * lambda_reg * o)
        p.copy_(anchor + delta)
        energy = energy + (o * delta * delta).sum()
    return lambda_reg / 2 * energy


def torch_compile(s: State) -> Tensor | None:
    return by_formula(s.params, s.anchors, s.omega, s.lambda_reg, s.lr)


def _expected(s: State) -> tuple[list[Tensor], Tensor]:
    energy, params, strength = 0.0, [], s.lr * s.lambda_reg
    for p, anchor, omega in zip(s.params, s.anchors, s.omega, strict=True):
        moved = in_float64(
            lambda p, a, o: (p + strength * o * a) / (1 + strength * o), p, anchor, omega
        )
        energy += in_float64(lambda p, a, o: (o * (p - a) ** 2).sum(), moved, anchor, omega)
        params.append(moved.float())
    return params, s.lambda_reg / 2 * energy


JOB = Job(
    name="proximal",
    title="Proximal step, in place, and the penalty after it",
    about="The update that is stable for any λ, and the penalty after it.",
    bytes_per_parameter=16,
    providers=(
        Provider(OURS, fused, 16),
        Provider("mas_ext, flat", fused, 16, flat=True),
        Provider("torch.compile, flat", torch_compile, 28, flat=True),
        Provider("torch.compile, list", torch_compile, 28, most_tensors=50),
        Provider("eager, no_grad in place", eager_in_place, 60),
        Provider("torch._foreach", foreach, 84),
        Provider("eager, by formula", eager_formula, 104),
    ),
    written=lambda s: s.params,
    expected=_expected,
    streams=lambda s: [s.params, s.anchors, s.omega],
)
