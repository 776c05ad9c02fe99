"""The operators ``torch.ops.mas_ext.*``: schemas, default kernels, fake kernels, autograd.

(The kernels of the optimizer steps are in :mod:`mas_ext._steps`.)

How a call travels: :mod:`mas_ext.functional` → dispatcher → (Autograd, for the differentiable) →
(ADInplaceOrView, for those that write: it bumps version counters; :func:`writing` does that itself
where it can, and calls what is below) → a kernel. The default kernel is the reference in plain
PyTorch; ``mas_ext/_native.py`` adds compiled ones for CPU and CUDA, so no code here or above asks
whether they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.overrides import has_torch_function

from mas_ext import reference
from mas_ext._checks import (
    Argument,
    check_abs_matmul,
    check_metadata,
    check_no_overlap,
    check_non_negative,
    check_scalar,
)

Tensors = Sequence[Tensor]

# ================================================================================================
# Define the operators
# ================================================================================================
SCHEMAS = {
    "accumulate_importance_": "(Tensor(a!)[] omega, Tensor[] grads, float scale=1.0) -> ()",
    "accumulate_abs_matmul_": (
        "(Tensor(a!) omega, Tensor left, Tensor right, float scale=1.0) -> ()"
    ),
    "penalty": "(Tensor[] params, Tensor[] anchors, Tensor[] omega, Tensor lambda_reg) -> Tensor",
    "penalty_and_grad": (
        "(Tensor[] params, Tensor[] anchors, Tensor[] omega, Tensor lambda_reg)"
        " -> (Tensor, Tensor[])"
    ),
    "add_penalty_grad_": (
        "(Tensor(a!)[] grads, Tensor[] params, Tensor[] anchors, Tensor[] omega,"
        " Tensor lambda_reg, Tensor? grad_scale=None) -> Tensor"
    ),
    "proximal_step_": (
        "(Tensor(a!)[] params, Tensor[] anchors, Tensor[] omega, Tensor lambda_reg, Tensor lr)"
        " -> Tensor"
    ),
    "sgd_step_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] anchors,"
        " Tensor[] omega, Tensor lambda_reg, Tensor lr, float momentum=0.0, float dampening=0.0,"
        " float weight_decay=0.0, bool nesterov=False, bool maximize=False, bool proximal=False,"
        " Tensor? grad_scale=None, Tensor? found_inf=None) -> Tensor"
    ),
    "adamw_step_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        " Tensor steps, Tensor[] anchors, Tensor[] omega, Tensor lambda_reg, Tensor lr,"
        " float beta1=0.9, float beta2=0.999, float eps=1e-08, float weight_decay=0.01,"
        " bool decoupled=True, bool maximize=False, bool proximal=False,"
        " Tensor? grad_scale=None, Tensor? found_inf=None) -> Tensor"
    ),
}

_library = torch.library.Library("mas_ext", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


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
    op: str, params: Tensors, anchors: Tensors, omega: Tensors, lambda_reg: Tensor
) -> None:
    check_scalar(op, "lambda_reg", lambda_reg, params)
    check_metadata(op, state_arguments(params, anchors, omega, written=False))


def empty_value(tensors: Tensors, lambda_reg: Tensor) -> Tensor:
    """A penalty as a fake kernel returns it."""
    device = tensors[0].device if tensors else lambda_reg.device
    return torch.empty((), dtype=reference.value_dtype(tensors), device=device)


def _penalty(params: Tensors, anchors: Tensors, omega: Tensors, lambda_reg: Tensor) -> Tensor:
    _check_penalty("penalty", params, anchors, omega, lambda_reg)
    return reference.penalty(params, anchors, omega, lambda_reg)


def _penalty_fake(params: Tensors, anchors: Tensors, omega: Tensors, lambda_reg: Tensor) -> Tensor:
    _check_penalty("penalty", params, anchors, omega, lambda_reg)
    return empty_value(params, lambda_reg)


def _save_state(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    params, anchors, omega, lambda_reg = inputs
    ctx.count = len(params)
    ctx.save_for_backward(*params, *anchors, *omega, lambda_reg)


def _saved_state(ctx: Any) -> tuple[Tensors, Tensors, Tensors, Tensor]:
    n, saved = ctx.count, ctx.saved_tensors
    return saved[:n], saved[n : 2 * n], saved[2 * n : 3 * n], saved[-1]


def _penalty_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """∂/∂θ = gλΩδ = −∂/∂θ*, ∂/∂Ω = gλδ²/2, ∂/∂λ = gΣΩδ²/2.

    ∂/∂θ is the gradient of a penalty of strength gλ, so the fused operator computes it, and
    differentiating twice differentiates that operator.
    """
    params, anchors, omega, lambda_reg = _saved_state(ctx)
    strength = lambda_reg * grad
    wants_params, wants_anchors, wants_omega, wants_lambda = ctx.needs_input_grad
    none: list[Tensor | None] = [None] * len(params)
    by_params = by_anchors = by_omega = none
    by_lambda = None
    if _wanted(wants_params) or _wanted(wants_anchors):
        _, by_params = torch.ops.mas_ext.penalty_and_grad(params, anchors, omega, strength)
    if _wanted(wants_anchors):
        by_anchors = [-g for g in by_params]  # type: ignore[operator]
    if _wanted(wants_omega):
        squares = [reference.displacement(p, a) ** 2 for p, a in zip(params, anchors, strict=True)]
        by_omega = [0.5 * strength.to(square.dtype) * square for square in squares]
    if _wanted(wants_lambda):
        by_lambda = torch.ops.mas_ext.penalty(params, anchors, omega, grad).to(lambda_reg)
    return by_params, by_anchors, by_omega, by_lambda


def _wanted(needs: Any) -> bool:
    return any(needs) if isinstance(needs, (list, tuple)) else bool(needs)


# ================================================================================================
# penalty_and_grad
# ================================================================================================
def _penalty_and_grad(
    params: Tensors, anchors: Tensors, omega: Tensors, lambda_reg: Tensor
) -> tuple[Tensor, list[Tensor]]:
    _check_penalty("penalty_and_grad", params, anchors, omega, lambda_reg)
    value, grads = reference.penalty_and_grad(params, anchors, omega, lambda_reg)
    return value, [torch.empty_like(p).copy_(g) for p, g in zip(params, grads, strict=True)]


def _penalty_and_grad_fake(
    params: Tensors, anchors: Tensors, omega: Tensors, lambda_reg: Tensor
) -> tuple[Tensor, list[Tensor]]:
    _check_penalty("penalty_and_grad", params, anchors, omega, lambda_reg)
    return empty_value(params, lambda_reg), [torch.empty_like(p) for p in params]


def _penalty_and_grad_backward(
    ctx: Any, grad: Tensor, grads: Sequence[Tensor | None]
) -> tuple[Any, ...]:
    """Of gV + Σ⟨h, G⟩, with V = λ/2 ΣΩδ² and G = λΩδ.

    ∂/∂θ = λΩ(gδ + h) = −∂/∂θ*, ∂/∂Ω = λδ(gδ/2 + h), ∂/∂λ = ΣΩδ(gδ/2 + h). In ordinary PyTorch,
    which can be differentiated again: this runs only when a gradient of a gradient is asked for.
    """
    params, anchors, omega, lambda_reg = _saved_state(ctx)
    by_params, by_omega, by_lambda = [], [], torch.zeros_like(lambda_reg)
    for p, a, o, h in zip(params, anchors, omega, grads, strict=True):
        delta, lam, g = reference.displacement(p, a), lambda_reg.to(o.dtype), grad.to(o.dtype)
        h = torch.zeros_like(delta) if h is None else h.to(o.dtype)
        half = 0.5 * g * delta + h
        by_params.append((lam * o * (g * delta + h)).to(p.dtype))
        by_omega.append(lam * delta * half)
        by_lambda = by_lambda + (o * delta * half).sum().to(by_lambda)
    return by_params, [-g for g in by_params], by_omega, by_lambda


# ================================================================================================
# add_penalty_grad_
# ================================================================================================
def _check_add_penalty_grad(
    grads: Tensors,
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
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
    check_metadata(op, arguments)
    return arguments


def _add_penalty_grad(
    grads: Tensors,
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Tensor,
    grad_scale: Tensor | None = None,
) -> Tensor:
    arguments = _check_add_penalty_grad(grads, params, anchors, omega, lambda_reg, grad_scale)
    check_non_negative("add_penalty_grad_", "lambda_reg", lambda_reg)
    if grad_scale is not None:
        check_non_negative("add_penalty_grad_", "grad_scale", grad_scale)
    check_no_overlap("add_penalty_grad_", arguments)
    return reference.add_penalty_grad_(grads, params, anchors, omega, lambda_reg, grad_scale)


def _add_penalty_grad_fake(
    grads: Tensors,
    params: Tensors,
    anchors: Tensors,
    omega: Tensors,
    lambda_reg: Tensor,
    grad_scale: Tensor | None = None,
) -> Tensor:
    _check_add_penalty_grad(grads, params, anchors, omega, lambda_reg, grad_scale)
    return empty_value(params, lambda_reg)


# ================================================================================================
# proximal_step_
# ================================================================================================
def _check_proximal(
    params: Tensors, anchors: Tensors, omega: Tensors, lambda_reg: Tensor, lr: Tensor
) -> list[Argument]:
    check_scalar("proximal_step_", "lambda_reg", lambda_reg, params)
    check_scalar("proximal_step_", "lr", lr, params)
    arguments = state_arguments(params, anchors, omega, written=True)
    check_metadata("proximal_step_", arguments)
    return arguments


def _proximal_step(
    params: Tensors, anchors: Tensors, omega: Tensors, lambda_reg: Tensor, lr: Tensor
) -> Tensor:
    arguments = _check_proximal(params, anchors, omega, lambda_reg, lr)
    check_non_negative("proximal_step_", "lambda_reg", lambda_reg)
    check_non_negative("proximal_step_", "lr", lr)
    check_no_overlap("proximal_step_", arguments)
    return reference.proximal_step_(params, anchors, omega, lambda_reg, lr)


def _proximal_step_fake(
    params: Tensors, anchors: Tensors, omega: Tensors, lambda_reg: Tensor, lr: Tensor
) -> Tensor:
    _check_proximal(params, anchors, omega, lambda_reg, lr)
    return empty_value(params, lambda_reg)


# ================================================================================================
# Register the kernels
# ================================================================================================
def _written(op: torch._ops.OpOverload) -> list[int]:
    """The places of the arguments that an operator writes."""
    return [i for i, a in enumerate(op._schema.arguments) if a.alias_info and a.alias_info.is_write]


def _bump_versions(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """A kernel that calls the next one, then tells autograd which arguments changed.

    Without it a tensor saved for backward could be overwritten and the gradient be silently wrong.
    """
    written = [(i, op._schema.arguments[i].name) for i in _written(op)]

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            below = keyset & torch._C._after_ADInplaceOrView_keyset
            result = op.redispatch(below, *args, **kwargs)
        for i, name in written:  # not reached if it refused
            increment_version(args[i] if i < len(args) else kwargs[name])
        return result

    return kernel


def _goes_straight_to_a_kernel(arguments: tuple[Any, ...]) -> bool:
    """Whether nobody stands between caller and kernel: no compiler, mode, transform or subclass."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or has_torch_function(arguments)
        or any(has_torch_function(a) for a in arguments if isinstance(a, list))
    )


def writing(name: str) -> Callable[..., Any]:
    """An operator that writes, for Python: autograd records nothing, but learns what changed.

    The kernel at ADInplaceOrView is in Python, and for it the dispatcher turns every list into
    Python's and back: half of what a call with small tensors costs. Here the lists are at hand.
    Others on the way would be run with autograd off as well, so they get the ordinary call.
    """
    op = getattr(torch.ops.mas_ext, name).default
    written = _written(op)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not _goes_straight_to_a_kernel((*args, *kwargs.values())):
            with torch.no_grad():
                return op(*args, **kwargs)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op(*args, **kwargs)
        for i in written:  # not reached if it refused
            increment_version(args[i])
        return result

    return call


def register(name: str, default: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Gives an operator of ``SCHEMAS`` its default and fake kernels, and counts what it writes."""
    writes = name.endswith("_")
    # Below autograd nothing is recorded, but PyTorch warns where the grad mode is left on.
    kernel = torch.no_grad()(default) if writes else default
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mas_ext::{name}", fake, lib=_library)
    if writes:
        op = getattr(torch.ops.mas_ext, name).default
        _library.impl(name, _bump_versions(op), "ADInplaceOrView", with_keyset=True)


register("accumulate_importance_", _accumulate_importance, _accumulate_importance_fake)
register("accumulate_abs_matmul_", _accumulate_abs_matmul, _accumulate_abs_matmul_fake)
register("penalty", _penalty, _penalty_fake)
register("penalty_and_grad", _penalty_and_grad, _penalty_and_grad_fake)
register("add_penalty_grad_", _add_penalty_grad, _add_penalty_grad_fake)
register("proximal_step_", _proximal_step, _proximal_step_fake)

torch.library.register_autograd(
    "mas_ext::penalty", _penalty_backward, setup_context=_save_state, lib=_library
)
torch.library.register_autograd(
    "mas_ext::penalty_and_grad",
    _penalty_and_grad_backward,
    setup_context=_save_state,
    lib=_library,
)
