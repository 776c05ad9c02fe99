"""Defines and registers the declared operators, and calls those that write from Python.

How a call travels: :mod:`mas_ext.functional` → dispatcher → (Autograd, if differentiable) →
(ADInplaceOrView, if the operator writes: increments version counters; :func:`writing` does that
itself where it can and calls what is below) → a kernel. The default kernel is the reference in
plain PyTorch. :mod:`mas_ext._operators.native` loads the compiled kernels for CPU and CUDA, so no
code here or above asks whether they are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.overrides import has_torch_function

from mas_ext._operators.checks import check_call, check_no_overlap
from mas_ext._operators.declarations import OPERATORS
from mas_ext._operators.operator import Operator

LIBRARY = torch.library.Library("mas_ext", "DEF")


# ================================================================================================
# Kernels
# ================================================================================================
def default_kernel(operator: Operator) -> Callable[..., Any]:
    """The reference, after the argument checks."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        call = operator.bind(args, kwargs)
        operands = check_call(operator, call, read=True)
        if operator.writes:
            check_no_overlap(operator.name, operands)
        return operator.default(**call)

    # Below autograd nothing is recorded, but PyTorch warns where the grad mode is left on.
    return torch.no_grad()(kernel) if operator.writes else kernel


def _fake_kernel(operator: Operator) -> Callable[..., Any]:
    """The checks of what fake tensors have, and empty results."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        call = operator.bind(args, kwargs)
        check_call(operator, call, read=False)
        return operator.result.empty(call)

    return kernel


def _written(op: torch._ops.OpOverload) -> list[int]:
    """The positions of the arguments that an operator writes."""
    return [i for i, a in enumerate(op._schema.arguments) if a.alias_info and a.alias_info.is_write]


def _version_kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """Calls the next kernel, then tells autograd which arguments changed.

    Without it a tensor saved for backward could be overwritten and the gradient silently wrong.
    """
    written = [(i, op._schema.arguments[i].name) for i in _written(op)]

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            below = keyset & torch._C._after_ADInplaceOrView_keyset
            result = op.redispatch(below, *args, **kwargs)
        for i, name in written:  # not reached if the call is refused
            increment_version(args[i] if i < len(args) else kwargs[name])
        return result

    return kernel


def _register(operator: Operator) -> None:
    name, qualified = operator.name, f"mas_ext::{operator.name}"
    LIBRARY.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, default_kernel(operator), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, _fake_kernel(operator), lib=LIBRARY)
    if operator.writes:
        op = getattr(torch.ops.mas_ext, name).default
        LIBRARY.impl(name, _version_kernel(op), "ADInplaceOrView", with_keyset=True)
    if operator.backward is not None:
        torch.library.register_autograd(
            qualified, operator.backward, setup_context=operator.save, lib=LIBRARY
        )


for _operator in OPERATORS.values():
    _register(_operator)


# ================================================================================================
# Calls that write
# ================================================================================================
def _goes_straight_to_a_kernel(arguments: tuple[Any, ...]) -> bool:
    """Whether no compiler, mode, transform or subclass stands between the caller and a kernel."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or has_torch_function(arguments)
        or any(has_torch_function(a) for a in arguments if isinstance(a, list))
    )


def writing(name: str) -> Callable[..., Any]:
    """An operator that writes, for Python: autograd records nothing, but learns what changed.

    The kernel at ADInplaceOrView is in Python, and for it the dispatcher converts every list to
    Python and back, which is half the cost of a call with small tensors. Here the lists are at
    hand, so that kernel is skipped. Where anything else must see the call, it is an ordinary one.
    """
    op = getattr(torch.ops.mas_ext, name).default
    written = _written(op)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not _goes_straight_to_a_kernel((*args, *kwargs.values())):
            with torch.no_grad():
                return op(*args, **kwargs)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op(*args, **kwargs)
        for i in written:  # not reached if the call is refused
            increment_version(args[i])
        return result

    return call
