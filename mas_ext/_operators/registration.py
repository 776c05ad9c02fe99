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
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.overrides import has_torch_function

from mas_ext._operators import native
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
    if operator.takes_packed_lists:
        LIBRARY.define(operator.packed_schema)
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
def _is_seen_by_others() -> bool:
    """Whether a compiler, mode or transform stands between the caller and a kernel."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_torch_function_mode_enabled()
    )


def _has_subclass(arguments: tuple[Any, ...]) -> bool:
    return has_torch_function(arguments) or any(
        has_torch_function(a) for a in arguments if isinstance(a, list)
    )


def _packed_call(
    op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...]]:
    """The overload for packed lists and its arguments; where it cannot serve, the operator."""
    lists = [a for a in args if isinstance(a, list)]
    if not lists or not lists[0]:
        return op.default, args
    # Single tensors are packed only to know that they have memory that a kernel can read.
    single = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    packed = native.pack([*lists, single])
    if packed is None:
        return op.default, args
    others = (a for a in args if not isinstance(a, list))
    return op.packed, (torch.frombuffer(packed, dtype=torch.uint8), lists[0][0], *others)


def writing(name: str) -> Callable[..., Any]:
    """An operator that writes, for Python: autograd records nothing, but learns what changed.

    The dispatcher converts every list several times, which for small tensors takes longer than the
    kernel. So lists are packed where their tensors allow it; otherwise, at least the kernel at
    ADInplaceOrView is skipped, which is in Python. Where anything else must see the call, it is an
    ordinary one. Lists must be given by position.
    """
    op = getattr(torch.ops.mas_ext, name)
    written = _written(op.default)

    def ordinary(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return op.default(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_seen_by_others():
            return ordinary(*args, **kwargs)
        overload, arguments = _packed_call(op, args, kwargs)
        # What could be packed has no subclasses.
        if overload is op.default and _has_subclass((*args, *kwargs.values())):
            return ordinary(*args, **kwargs)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = overload(*arguments, **kwargs)
        for i in written:  # not reached if the call is refused
            increment_version(args[i])
        return result

    return call
