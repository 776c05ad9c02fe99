"""How operators are defined, get their kernels, and are called from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.overrides import has_torch_function

# ================================================================================================
# Define the operators
# ================================================================================================
SCHEMAS = {
    "accumulate_importance_": "(Tensor(a!)[] omega, Tensor[] grads, float scale=1.0) -> ()",
    "accumulate_abs_matmul_": (
        "(Tensor(a!) omega, Tensor left, Tensor right, float scale=1.0) -> ()"
    ),
    "penalty": (
        "(Tensor[] params, Tensor[] anchors, Tensor[] omega, Tensor[] omega_scales,"
        " Tensor lambda_reg) -> Tensor"
    ),
    "penalty_and_grad": (
        "(Tensor[] params, Tensor[] anchors, Tensor[] omega, Tensor[] omega_scales,"
        " Tensor lambda_reg) -> (Tensor, Tensor[])"
    ),
    "add_penalty_grad_": (
        "(Tensor(a!)[] grads, Tensor[] params, Tensor[] anchors, Tensor[] omega,"
        " Tensor[] omega_scales, Tensor lambda_reg, Tensor? grad_scale=None) -> Tensor"
    ),
    "proximal_step_": (
        "(Tensor(a!)[] params, Tensor[] anchors, Tensor[] omega, Tensor[] omega_scales,"
        " Tensor lambda_reg, Tensor lr) -> Tensor"
    ),
    "sgd_step_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] anchors,"
        " Tensor[] omega, Tensor[] omega_scales, Tensor lambda_reg, Tensor lr,"
        " float momentum=0.0, float dampening=0.0, float weight_decay=0.0,"
        " bool nesterov=False, bool maximize=False, bool proximal=False,"
        " Tensor? grad_scale=None, Tensor? found_inf=None) -> Tensor"
    ),
    "adamw_step_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        " Tensor steps, Tensor[] anchors, Tensor[] omega, Tensor[] omega_scales,"
        " Tensor lambda_reg, Tensor lr,"
        " float beta1=0.9, float beta2=0.999, float eps=1e-08, float weight_decay=0.01,"
        " bool decoupled=True, bool maximize=False, bool proximal=False,"
        " Tensor? grad_scale=None, Tensor? found_inf=None) -> Tensor"
    ),
}

LIBRARY = torch.library.Library("mas_ext", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# ================================================================================================
# Kernels, and calls that write
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
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mas_ext::{name}", fake, lib=LIBRARY)
    if writes:
        op = getattr(torch.ops.mas_ext, name).default
        LIBRARY.impl(name, _bump_versions(op), "ADInplaceOrView", with_keyset=True)
