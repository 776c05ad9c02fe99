"""The ways of doing each job, as code that can be counted; those that are benchmarked are theirs.

Where Ω has a dtype of its own, BLAS's dot refuses, and a product and a sum take its place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.lists import accumulate, penalty
from benchmarks.lists.state import State, make_state
from mas_ext import functional

LR = 0.5
Step = Callable[[State], object]


def make(sizes: list[int], dtype: str) -> State:
    """A state of that dtype, with Ω in the dtype that goes with it."""
    state, wanted = make_state([torch.Size([n]) for n in sizes]), getattr(torch, dtype)
    params = [p.detach().to(wanted).requires_grad_() for p in state.params]
    for new, old in zip(params, state.params, strict=True):
        new.grad = old.grad.to(wanted)
    wide = torch.float64 if wanted == torch.float64 else torch.float32
    anchors = [a.to(wanted) for a in state.anchors]
    return State(params, anchors, [o.to(wide) for o in state.omega])


def _dot(omega: Tensor, values: Tensor) -> Tensor:
    if omega.dtype == values.dtype:
        return torch.dot(omega, values)
    return (omega * values).sum()


def _state(s: State) -> tuple[list[Tensor], list[Tensor], list[Tensor], float]:
    return s.params, s.anchors, s.omega, s.lambda_reg


def _total(sums: list[Tensor], s: State) -> Tensor:
    return s.lambda_reg / 2 * torch.stack(sums).sum()


# ================================================================================================
# add_penalty_grad_, where the benchmark's own function refuses
# ================================================================================================
@torch.no_grad()
def _eager_add(s: State) -> Tensor:
    energy = torch.zeros((), dtype=s.omega[0].dtype)
    for p, grad, anchor, omega in zip(s.params, s.grads, s.anchors, s.omega, strict=True):
        delta = p - anchor
        grad.addcmul_(omega, delta, value=s.lambda_reg)
        energy += _dot(omega, delta.square_())
    return s.lambda_reg / 2 * energy


# ================================================================================================
# penalty
# ================================================================================================
@torch.no_grad()
def _fused_value(s: State) -> Tensor:
    return functional.penalty(*_state(s))


@torch.no_grad()
def _eager_value(s: State) -> Tensor:
    energy = torch.zeros((), dtype=s.omega[0].dtype)
    for p, anchor, omega in zip(s.params, s.anchors, s.omega, strict=True):
        energy += _dot(omega, (p - anchor).square_())
    return s.lambda_reg / 2 * energy


def _foreach_energies(s: State) -> list[Tensor]:
    deltas = torch._foreach_sub(s.params, s.anchors)
    torch._foreach_mul_(deltas, deltas)
    torch._foreach_mul_(deltas, s.omega)
    return [d.sum() for d in deltas]


@torch.no_grad()
def _foreach_value(s: State) -> Tensor:
    return _total(_foreach_energies(s), s)


def _fused_backward(s: State) -> None:
    functional.penalty(*_state(s)).backward()


# ================================================================================================
# penalty_and_grad
# ================================================================================================
@torch.no_grad()
def _fused_both(s: State) -> object:
    return functional.penalty_and_grad(*_state(s))


@torch.no_grad()
def _eager_both(s: State) -> object:
    energy, grads = torch.zeros((), dtype=s.omega[0].dtype), []
    for p, anchor, omega in zip(s.params, s.anchors, s.omega, strict=True):
        delta = p - anchor
        grad = omega * delta
        energy += _dot(grad, delta)
        grads.append(grad.mul_(s.lambda_reg).to(p.dtype))
    return s.lambda_reg / 2 * energy, grads


@torch.no_grad()
def _foreach_both(s: State) -> object:
    deltas = torch._foreach_sub(s.params, s.anchors)
    grads = torch._foreach_mul(s.omega, deltas)
    torch._foreach_mul_(deltas, grads)
    value = _total([d.sum() for d in deltas], s)
    torch._foreach_mul_(grads, s.lambda_reg)
    return value, [g.to(p.dtype) for g, p in zip(grads, s.params, strict=True)]


def _autograd_both(s: State) -> object:
    loss = torch.zeros(())
    for p, anchor, omega in zip(s.params, s.anchors, s.omega, strict=True):
        loss = loss + (omega * (p - anchor) ** 2).sum()
    value = s.lambda_reg / 2 * loss
    return value.detach(), torch.autograd.grad(value, s.params)


# ================================================================================================
# proximal_step_
# ================================================================================================
@torch.no_grad()
def _fused_proximal(s: State) -> Tensor:
    return functional.proximal_step_(*_state(s), LR)


@torch.no_grad()
def _eager_proximal(s: State) -> Tensor:
    energy = torch.zeros((), dtype=s.omega[0].dtype)
    for p, anchor, omega in zip(s.params, s.anchors, s.omega, strict=True):
        c = omega * (s.lambda_reg * LR)
        c.div_(1 + c)
        p.lerp_(anchor, c.to(p.dtype))
        energy += _dot(omega, (p - anchor).square_())
    return s.lambda_reg / 2 * energy


@torch.no_grad()
def _foreach_proximal(s: State) -> Tensor:
    cs = torch._foreach_mul(s.omega, s.lambda_reg * LR)
    torch._foreach_div_(cs, torch._foreach_add(cs, 1.0))
    weights = [c.to(p.dtype) for c, p in zip(cs, s.params, strict=True)]
    torch._foreach_lerp_(s.params, s.anchors, weights)
    return _total(_foreach_energies(s), s)


STEPS: dict[tuple[str, str], Step] = {
    ("accumulate_importance_", "mas_ext"): accumulate.fused,
    ("accumulate_importance_", "eager, in place"): accumulate.eager_in_place,
    ("accumulate_importance_", "torch._foreach"): accumulate.foreach,
    ("accumulate_importance_", "notebook loop"): accumulate.notebook_loop,
    ("add_penalty_grad_", "mas_ext"): penalty.fused,
    ("add_penalty_grad_", "eager, in place"): penalty.eager_no_grad,
    ("add_penalty_grad_", "torch._foreach"): penalty.foreach,
    ("add_penalty_grad_", "eager autograd"): penalty.eager_autograd,
    ("penalty", "mas_ext"): _fused_value,
    ("penalty", "eager, in place"): _eager_value,
    ("penalty", "torch._foreach"): _foreach_value,
    ("penalty, backward", "mas_ext"): _fused_backward,
    ("penalty, backward", "eager autograd"): penalty.eager_autograd,
    ("penalty_and_grad", "mas_ext"): _fused_both,
    ("penalty_and_grad", "eager, in place"): _eager_both,
    ("penalty_and_grad", "torch._foreach"): _foreach_both,
    ("penalty_and_grad", "eager autograd"): _autograd_both,
    ("proximal_step_", "mas_ext"): _fused_proximal,
    ("proximal_step_", "eager, in place"): _eager_proximal,
    ("proximal_step_", "torch._foreach"): _foreach_proximal,
}
MIXED = {("add_penalty_grad_", "eager, in place"): _eager_add}


def step(job: str, way: str, dtype: str) -> Step:
    is_mixed = dtype in ("bfloat16", "float16")
    return MIXED.get((job, way), STEPS[job, way]) if is_mixed else STEPS[job, way]
