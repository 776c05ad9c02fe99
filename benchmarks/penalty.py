"""Adding the penalty's gradient λΩ(θ−θ*) to p.grad, and its value λ/2 Σ Ω(θ−θ*)²."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.job import OURS, Job, Provider, compiled
from benchmarks.state import State, in_float64
from mas_ext import functional


def fused(s: State) -> Tensor:
    return functional.add_penalty_grad_(s.grads, s.params, s.anchors, s.omega, s.lambda_reg)


def eager_autograd(s: State) -> Tensor:
    """As most code writes it: a term of the loss, differentiated by autograd."""
    loss = 0.0
    for p, anchor, omega in zip(s.params, s.anchors, s.omega, strict=True):
        loss = loss + (omega * (p - anchor) ** 2).sum()
    penalty = s.lambda_reg / 2 * loss
    penalty.backward()
    return penalty.detach()


@torch.no_grad()
def eager_no_grad(s: State) -> Tensor:
    """The gradient by hand: one temporary per tensor, and BLAS for the sum."""
    energy = 0.0
    for p, grad, anchor, omega in zip(s.params, s.grads, s.anchors, s.omega, strict=True):
        delta = p - anchor
        grad.addcmul_(omega, delta, value=s.lambda_reg)
        energy += torch.dot(omega.view(-1), delta.square_().view(-1))
    return s.lambda_reg / 2 * energy


@torch.no_grad()
def foreach(s: State) -> Tensor:
    deltas = torch._foreach_sub(s.params, s.anchors)
    torch._foreach_addcmul_(s.grads, s.omega, deltas, value=s.lambda_reg)
    torch._foreach_mul_(deltas, deltas)
    torch._foreach_mul_(deltas, s.omega)
    return s.lambda_reg / 2 * torch.stack([d.sum() for d in deltas]).sum()


@compiled
@torch.no_grad()
def by_formula(
    grads: list[Tensor],
    params: list[Tensor],
    anchors: list[Tensor],
    omega: list[Tensor],
    lambda_reg: float,
) -> Tensor:
    """Plain arithmetic for torch.compile to fuse."""
    energy = 0.0
    for grad, p, anchor, o in zip(grads, params, anchors, omega, strict=True):
        delta = p - anchor
        weighted = o * delta
        grad.add_(lambda_reg * weighted)
        energy = energy + (weighted * delta).sum()
    return lambda_reg / 2 * energy


def torch_compile(s: State) -> Tensor | None:
    return by_formula(s.grads, s.params, s.anchors, s.omega, s.lambda_reg)


def _expected(s: State) -> tuple[list[Tensor], Tensor]:
    energy, grads = 0.0, []
    for p, grad, anchor, omega in zip(s.params, s.grads, s.anchors, s.omega, strict=True):
        energy += in_float64(lambda p, a, o: (o * (p - a) ** 2).sum(), p, anchor, omega)
        total = in_float64(
            lambda g, p, a, o: g + s.lambda_reg * o * (p - a), grad, p, anchor, omega
        )
        grads.append(total.float())
    return grads, s.lambda_reg / 2 * energy


JOB = Job(
    name="penalty",
    title="Penalty: value, and gradient added to p.grad",
    about="p.grad holds the gradient of a task's loss. Add λΩ(θ−θ*) to it, and return the penalty "
    "λ/2 Σ Ω(θ−θ*)².",
    bytes_per_parameter=20,
    providers=(
        Provider(OURS, fused, 20),
        Provider("mas_ext, flat", fused, 20, flat=True),
        Provider("torch.compile, flat", torch_compile, 32, flat=True),
        Provider("torch.compile, list", torch_compile, 32, most_tensors=50),
        Provider("eager, no_grad in place", eager_no_grad, 44),
        Provider("torch._foreach", foreach, 52),
        Provider("eager autograd", eager_autograd, 84),
    ),
    written=lambda s: s.grads,
    expected=_expected,
    streams=lambda s: [s.grads, s.params, s.anchors, s.omega],
)
