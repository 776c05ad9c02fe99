"""Gradients of the penalty's operators.

Those on lists have the arguments θ, θ*, Ω, its scales and λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from mas_ext import reference
from mas_ext.precision import accumulation_dtype, to_accumulation_dtype

Tensors = Sequence[Tensor]


def save_state(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *lists, lambda_reg = inputs
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*chain(*lists), lambda_reg)


def _saved_state(ctx: Any) -> tuple[Tensors, Tensors, Tensors, Tensors, Tensor]:
    *saved, lambda_reg = ctx.saved_tensors
    each = iter(saved)
    params, anchors, omega, scales = ([*islice(each, length)] for length in ctx.lengths)
    return params, anchors, omega, scales, lambda_reg


def penalty_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """∂/∂θ = gλΩδ = −∂/∂θ*, ∂/∂Ω = gλδ²/2, ∂/∂λ = gΣΩδ²/2.

    ∂/∂θ is the gradient of a penalty of strength gλ, so the fused operator computes it, and
    differentiating twice differentiates that operator.
    """
    *state, lambda_reg = _saved_state(ctx)
    params, anchors, omega, scales = state
    strength = lambda_reg * grad
    wants_params, wants_anchors, wants_omega, _, wants_lambda = map(_any, ctx.needs_input_grad)
    none: list[Tensor | None] = [None] * len(params)
    by_params = by_anchors = by_omega = none
    by_lambda = None
    if wants_params or wants_anchors:
        _, by_params = torch.ops.mas_ext.penalty_and_grad(*state, strength)
    if wants_anchors:
        by_anchors = [-g for g in by_params]  # type: ignore[operator]
    if wants_omega:
        squares = [reference.displacement(p, a) ** 2 for p, a in zip(params, anchors, strict=True)]
        by_omega = [
            _like_stored(o, 0.5 * strength.to(square.dtype) * square)
            for o, square in zip(omega, squares, strict=True)
        ]
    if wants_lambda:
        by_lambda = torch.ops.mas_ext.penalty(*state, grad).to(lambda_reg)
    return by_params, by_anchors, by_omega, [None] * len(scales), by_lambda


def penalty_and_grad_backward(
    ctx: Any, grad: Tensor, grads: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """The gradient of gV + Σ⟨h, G⟩, with V = λ/2 ΣΩδ² and G = λΩδ.

    ∂/∂θ = λΩ(gδ + h) = −∂/∂θ*, ∂/∂Ω = λδ(gδ/2 + h), ∂/∂λ = ΣΩδ(gδ/2 + h). In ordinary PyTorch,
    which can be differentiated again: this runs only for the gradient of a gradient.
    """
    params, anchors, stored, scales, lambda_reg = _saved_state(ctx)
    by_params, by_omega, by_lambda = [], [], torch.zeros_like(lambda_reg)
    omega = to_accumulation_dtype(stored, scales)
    for p, a, s, o, h in zip(params, anchors, stored, omega, grads, strict=True):
        delta, lam, g = reference.displacement(p, a), lambda_reg.to(o.dtype), grad.to(o.dtype)
        h = torch.zeros_like(delta) if h is None else h.to(o.dtype)
        half = 0.5 * g * delta + h
        by_params.append((lam * o * (g * delta + h)).to(p.dtype))
        by_omega.append(_like_stored(s, lam * delta * half))
        by_lambda = by_lambda + (o * delta * half).sum().to(by_lambda)
    return by_params, [-g for g in by_params], by_omega, [None] * len(scales), by_lambda


# ================================================================================================
# The penalty of a low-rank update
# ================================================================================================
def save_low_rank(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.with_grads = inputs
    _, by_a, by_b = output
    ctx.save_for_backward(*tensors, by_a, by_b)
    ctx.set_materialize_grads(False)  # of a gradient that nobody differentiates


def low_rank_penalty_backward(
    ctx: Any, grad: Tensor | None, grad_a: Tensor | None, grad_b: Tensor | None
) -> tuple[Any, ...]:
    """The gradient of gV + ⟨h, G⟩ of A and B, where V is the penalty and G its gradients.

    The forward pass has formed G, in the accumulation dtype, so that gG is rounded once. What h
    contributes is the gradient of a gradient.
    """
    a, b, omega, scales, lambda_reg, *grads = ctx.saved_tensors
    wants_a, wants_b, wants_omega, _, wants_lambda, *_ = ctx.needs_input_grad
    if not ctx.with_grads:  # G are empty
        grad_a = grad_b = None
    lacks_grads = (wants_a or wants_b) and not ctx.with_grads
    if lacks_grads or grad is None or grad_a is not None or grad_b is not None:
        return _low_rank_second_order(ctx, grad, grad_a, grad_b)
    by_a, by_b = ((grad * g).to(a.dtype) if ctx.with_grads else None for g in grads)
    by_omega = by_lambda = None
    if wants_omega:
        delta = _low_rank_delta(ctx.scale, a, b)
        by_omega = _like_stored(omega, 0.5 * (lambda_reg * grad).to(delta.dtype) * delta**2)
    if wants_lambda:
        state = a, b, omega, scales, grad, ctx.scale, torch.is_grad_enabled()
        by_lambda = torch.ops.mas_ext.low_rank_penalty(*state)[0].to(lambda_reg)
    return by_a, by_b, by_omega, None, by_lambda, None, None


def _low_rank_delta(scale: float, a: Tensor, b: Tensor) -> Tensor:
    dtype = accumulation_dtype(a.dtype)
    return scale * (b.to(dtype) @ a.to(dtype))


def _low_rank_second_order(
    ctx: Any, grad: Tensor | None, grad_a: Tensor | None, grad_b: Tensor | None
) -> tuple[Any, ...]:
    """In ordinary PyTorch, which can be differentiated again and allocates what Ω does.

    With D, by how much Δ moves along h, the sum is ⟨λΩΔ, gΔ/2 + D⟩; D depends on A and B, too.
    """
    a, b, stored, scales, lambda_reg, _, _ = ctx.saved_tensors
    (omega,) = to_accumulation_dtype([stored], [] if scales is None else [scales])
    left, right, lam = b.to(omega.dtype), a.to(omega.dtype), lambda_reg.to(omega.dtype)
    h_a = torch.zeros_like(right) if grad_a is None else grad_a
    h_b = torch.zeros_like(left) if grad_b is None else grad_b
    g = torch.zeros_like(lam) if grad is None else grad
    delta = ctx.scale * (left @ right)
    moved = ctx.scale * (left @ h_a + h_b @ right)
    by_delta, by_moved, half = (
        lam * omega * (g * delta + moved),
        lam * omega * delta,
        0.5 * g * delta,
    )
    by_a = ctx.scale * (left.mT @ by_delta + h_b.mT @ by_moved)
    by_b = ctx.scale * (by_delta @ right.mT + by_moved @ h_a.mT)
    by_omega = _like_stored(stored, lam * delta * (half + moved))
    by_lambda = (omega * delta * (half + moved)).sum()
    by_lambda = by_lambda.to(lambda_reg)
    return by_a.to(a.dtype), by_b.to(b.dtype), by_omega, None, by_lambda, None, None


def _like_stored(omega: Tensor, grad: Tensor) -> Tensor | None:
    """A gradient in the dtype of the stored Ω; codes have none."""
    return grad.to(omega.dtype) if omega.is_floating_point() else None


def _any(needs: Any) -> bool:
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)
