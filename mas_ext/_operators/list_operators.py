"""The operators ``torch.ops.mas_ext.*``: default kernels, fake kernels, autograd.

(Their schemas are in :mod:`mas_ext._operators.dispatch`, the kernels of the optimizer steps in
:mod:`mas_ext._operators.optimizer_steps`.)

How a call travels: :mod:`mas_ext.functional` → dispatcher → (Autograd, for the differentiable) →
(ADInplaceOrView, for those that write: it bumps version counters; :func:`writing` does that itself
where it can, and calls what is below) → a kernel. The default kernel is the reference in plain
PyTorch; ``native.py`` adds compiled ones for CPU and CUDA, so no code here or above asks
whether they are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from mas_ext import reference
from mas_ext._operators.checks import (
    Argument,
    check_abs_matmul,
    check_metadata,
    check_no_overlap,
    check_non_negative,
    check_scalar,
)
from mas_ext._operators.dispatch import LIBRARY, register

Tensors = Sequence[Tensor]


def state_arguments(
    params: Tensors, anchors: Tensors, omega: Tensors, written: bool
) -> list[Argument]:
    """θ, θ* and Ω as the checks see them."""
    return [
        Argument("params", params, writable=written),
        Argument("anchors", anchors),
        Argument("omega", omega, is_omega=True),
    ]


# ================================================================================================
# accumulate_importance_
# ================================================================================================
def _check_accumulate(omega: Tensors, grads: Tensors, scale: float) -> list[Argument]:
    check_non_negative("accumulate_importance_", "scale", scale)
    arguments = [
        Argument("omega", omega, is_omega=True, writable=True),
        Argument("grads", grads),
    ]
    check_metadata("accumulate_importance_", arguments)
    return arguments


def _accumulate_importance(omega: Tensors, grads: Tensors, scale: float = 1.0) -> None:
    check_no_overlap("accumulate_importance_", _check_accumulate(omega, grads, scale))
    reference.accumulate_importance_(omega, grads, scale)


def _accumulate_importance_fake(omega: Tensors, grads: Tensors, scale: float = 1.0) -> None:
    _check_accumulate(omega, grads, scale)


# ================================================================================================
# accumulate_abs_matmul_
# ================================================================================================
def _accumulate_abs_matmul(omega: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    op = "accumulate_abs_matmul_"
    check_no_overlap(op, check_abs_matmul(op, omega, left, right, scale))
    reference.accumulate_abs_matmul_(omega, left, right, scale)


def _accumulate_abs_matmul_fake(
    omega: Tensor, left: Tensor, right: Tensor, scale: float = 1.0
) -> None:
    check_abs_matmul("accumulate_abs_matmul_", omega, left, right, scale)


# ================================================================================================
# penalty
# ================================================================================================
def _check_penalty(
    op: str,
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    omega_scales: Tensors,
    lambda_reg: Tensor,
) -> None:
    check_scalar(op, "lambda_reg", lambda_reg, params)
    check_metadata(op, state_arguments(params, anchors, omega, written=False), omega_scales)


def empty_value(tensors: Tensors, lambda_reg: Tensor) -> Tensor:
    """A penalty as a fake kernel returns it."""
    device = tensors[0].device if tensors else lambda_reg.device
    return torch.empty((), dtype=reference.value_dtype(tensors), device=device)


def _penalty(
    params: Tensors, anchors: Tensors, omega: Tensors, omega_scales: Tensors, lambda_reg: Tensor
) -> Tensor:
    _check_penalty("penalty", params, anchors, omega, omega_scales, lambda_reg)
    return reference.penalty(params, anchors, omega, lambda_reg, omega_scales=omega_scales)


def _penalty_fake(
    params: Tensors, anchors: Tensors, omega: Tensors, omega_scales: Tensors, lambda_reg: Tensor
) -> Tensor:
    _check_penalty("penalty", params, anchors, omega, omega_scales, lambda_reg)
    return empty_value(params, lambda_reg)


def _save_state(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *lists, lambda_reg = inputs
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*chain(*lists), lambda_reg)


def _saved_state(ctx: Any) -> tuple[Tensors, Tensors, Tensors, Tensors, Tensor]:
    """θ, θ*, Ω, its scales and λ."""
    *saved, lambda_reg = ctx.saved_tensors
    each = iter(saved)
    params, anchors, omega, scales = ([*islice(each, length)] for length in ctx.lengths)
    return params, anchors, omega, scales, lambda_reg


def _penalty_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """∂/∂θ = gλΩδ = −∂/∂θ*, ∂/∂Ω = gλδ²/2, ∂/∂λ = gΣΩδ²/2.

    ∂/∂θ is the gradient of a penalty of strength gλ, so the fused operator computes it, and
    differentiating twice differentiates that operator.
    """
    *state, lambda_reg = _saved_state(ctx)
    params, anchors, omega, scales = state
    strength = lambda_reg * grad
    wants_params, wants_anchors, wants_omega, _, wants_lambda = ctx.needs_input_grad
    none: list[Tensor | None] = [None] * len(params)
    by_params = by_anchors = by_omega = none
    by_lambda = None
    if _wanted(wants_params) or _wanted(wants_anchors):
        _, by_params = torch.ops.mas_ext.penalty_and_grad(*state, strength)
    if _wanted(wants_anchors):
        by_anchors = [-g for g in by_params]  # type: ignore[operator]
    if _wanted(wants_omega):
        squares = [reference.displacement(p, a) ** 2 for p, a in zip(params, anchors, strict=True)]
        by_omega = [
            _of_kept(o, 0.5 * strength.to(square.dtype) * square)
            for o, square in zip(omega, squares, strict=True)
        ]
    if _wanted(wants_lambda):
        by_lambda = torch.ops.mas_ext.penalty(*state, grad).to(lambda_reg)
    return by_params, by_anchors, by_omega, [None] * len(scales), by_lambda


def _of_kept(omega: Tensor, grad: Tensor) -> Tensor | None:
    """A gradient with respect to Ω as it is kept: codes have none."""
    return grad.to(omega.dtype) if omega.is_floating_point() else None


def _wanted(needs: Any) -> bool:
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)


# ================================================================================================
# penalty_and_grad
# ================================================================================================
def _penalty_and_grad(
    params: Tensors, anchors: Tensors, omega: Tensors, omega_scales: Tensors, lambda_reg: Tensor
) -> tuple[Tensor, list[Tensor]]:
    _check_penalty("penalty_and_grad", params, anchors, omega, omega_scales, lambda_reg)
    value, grads = reference.penalty_and_grad(
        params, anchors, omega, lambda_reg, omega_scales=omega_scales
    )
    return value, [torch.empty_like(p).copy_(g) for p, g in zip(params, grads, strict=True)]


def _penalty_and_grad_fake(
    params: Tensors, anchors: Tensors, omega: Tensors, omega_scales: Tensors, lambda_reg: Tensor
) -> tuple[Tensor, list[Tensor]]:
    _check_penalty("penalty_and_grad", params, anchors, omega, omega_scales, lambda_reg)
    return empty_value(params, lambda_reg), [torch.empty_like(p) for p in params]


def _penalty_and_grad_backward(
    ctx: Any, grad: Tensor, grads: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """Of gV + Σ⟨h, G⟩, with V = λ/2 ΣΩδ² and G = λΩδ.

    ∂/∂θ = λΩ(gδ + h) = −∂/∂θ*, ∂/∂Ω = λδ(gδ/2 + h), ∂/∂λ = ΣΩδ(gδ/2 + h). In ordinary PyTorch,
    which can be differentiated again: this runs only when a gradient of a gradient is asked for.
    """
    params, anchors, kept, scales, lambda_reg = _saved_state(ctx)
    by_params, by_omega, by_lambda = [], [], torch.zeros_like(lambda_reg)
    omega = reference.wide(kept, scales)
    for p, a, k, o, h in zip(params, anchors, kept, omega, grads, strict=True):
        delta, lam, g = reference.displacement(p, a), lambda_reg.to(o.dtype), grad.to(o.dtype)
        h = torch.zeros_like(delta) if h is None else h.to(o.dtype)
        half = 0.5 * g * delta + h
        by_params.append((lam * o * (g * delta + h)).to(p.dtype))
        by_omega.append(_of_kept(k, lam * delta * half))
        by_lambda = by_lambda + (o * delta * half).sum().to(by_lambda)
    return by_params, [-g for g in by_params], by_omega, [None] * len(scales), by_lambda


# ================================================================================================
# add_penalty_grad_
# ================================================================================================
def _check_add_penalty_grad(
    grads: Tensors,
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    omega_scales: Tensors,
    lambda_reg: Tensor,
    grad_scale: Tensor | None,
) -> list[Argument]:
    op = "add_penalty_grad_"
    check_scalar(op, "lambda_reg", lambda_reg, grads)
    if grad_scale is not None:
        check_scalar(op, "grad_scale", grad_scale, grads)
    arguments = [
        Argument("grads", grads, writable=True),
        *state_arguments(params, anchors, omega, written=False),
    ]
    check_metadata(op, arguments, omega_scales)
    return arguments


def _add_penalty_grad(
    grads: Tensors,
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    omega_scales: Tensors,
    lambda_reg: Tensor,
    grad_scale: Tensor | None = None,
) -> Tensor:
    lists = grads, params, anchors, omega
    arguments = _check_add_penalty_grad(*lists, omega_scales, lambda_reg, grad_scale)
    check_non_negative("add_penalty_grad_", "lambda_reg", lambda_reg)
    if grad_scale is not None:
        check_non_negative("add_penalty_grad_", "grad_scale", grad_scale)
    check_no_overlap("add_penalty_grad_", arguments, omega_scales)
    return reference.add_penalty_grad_(*lists, lambda_reg, grad_scale, omega_scales=omega_scales)


def _add_penalty_grad_fake(
    grads: Tensors,
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    omega_scales: Tensors,
    lambda_reg: Tensor,
    grad_scale: Tensor | None = None,
) -> Tensor:
    lists = grads, params, anchors, omega
    _check_add_penalty_grad(*lists, omega_scales, lambda_reg, grad_scale)
    return empty_value(params, lambda_reg)


# ================================================================================================
# proximal_step_
# ================================================================================================
def _check_proximal(
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    omega_scales: Tensors,
    lambda_reg: Tensor,
    lr: Tensor,
) -> list[Argument]:
    check_scalar("proximal_step_", "lambda_reg", lambda_reg, params)
    check_scalar("proximal_step_", "lr", lr, params)
    arguments = state_arguments(params, anchors, omega, written=True)
    check_metadata("proximal_step_", arguments, omega_scales)
    return arguments


def _proximal_step(
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    omega_scales: Tensors,
    lambda_reg: Tensor,
    lr: Tensor,
) -> Tensor:
    arguments = _check_proximal(params, anchors, omega, omega_scales, lambda_reg, lr)
    check_non_negative("proximal_step_", "lambda_reg", lambda_reg)
    check_non_negative("proximal_step_", "lr", lr)
    check_no_overlap("proximal_step_", arguments, omega_scales)
    return reference.proximal_step_(
        params, anchors, omega, lambda_reg, lr, omega_scales=omega_scales
    )


def _proximal_step_fake(
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    omega_scales: Tensors,
    lambda_reg: Tensor,
    lr: Tensor,
) -> Tensor:
    _check_proximal(params, anchors, omega, omega_scales, lambda_reg, lr)
    return empty_value(params, lambda_reg)


# ================================================================================================
# Register the kernels
# ================================================================================================
register("accumulate_importance_", _accumulate_importance, _accumulate_importance_fake)
register("accumulate_abs_matmul_", _accumulate_abs_matmul, _accumulate_abs_matmul_fake)
register("penalty", _penalty, _penalty_fake)
register("penalty_and_grad", _penalty_and_grad, _penalty_and_grad_fake)
register("add_penalty_grad_", _add_penalty_grad, _add_penalty_grad_fake)
register("proximal_step_", _proximal_step, _proximal_step_fake)

torch.library.register_autograd(
    "mas_ext::penalty", _penalty_backward, setup_context=_save_state, lib=LIBRARY
)
torch.library.register_autograd(
    "mas_ext::penalty_and_grad",
    _penalty_and_grad_backward,
    setup_context=_save_state,
    lib=LIBRARY,
)
