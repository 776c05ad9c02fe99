"""Argument checks for the default kernels and fake tensors.

``csrc/checks.h`` makes the same checks, in the same words, for the compiled kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from mas_ext._operators.arguments import Argument, Operands, Role
from mas_ext._operators.operator import Call, Operator
from mas_ext.precision import BLOCK, accumulation_dtype, num_scales

SUPPORTED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STORED = (torch.float32, torch.bfloat16, torch.uint8)  # Ω that is only read, except beside float64


def _fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"mas_ext::{op}: {message}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expected(argument: Operands, shared: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes an argument may have beside values of dtype ``shared``."""
    if not argument.is_omega:
        return (shared,)
    accumulates = argument.written or shared == torch.float64
    return (accumulation_dtype(shared),) if accumulates else STORED


def _names(dtypes: Sequence[torch.dtype]) -> str:
    *most, last = map(_name, dtypes)
    return f"{', '.join(most)} or {last}" if most else last


def _check_dtype(op: str, argument: Operands, i: int, shared: torch.dtype) -> None:
    dtype, expected = argument.tensors[i].dtype, _expected(argument, shared)
    if dtype in expected and (argument.is_omega or dtype in SUPPORTED):
        return
    if dtype not in SUPPORTED:
        _fail(
            op,
            f"{argument.at(i)} has dtype {_name(dtype)}, which is not supported; "
            "pass float32, float64, bfloat16 or float16",
        )
    _fail(
        op,
        f"{argument.at(i)} has dtype {_name(dtype)} where {_names(expected)} is expected beside "
        f"{_name(shared)} values; convert it (omega is float64 beside float64 values and float32 "
        "beside others, or, where it is only read, bfloat16 or uint8)",
    )


def _check_layout(op: str, argument: Operands, i: int) -> None:
    if argument.tensors[i].layout != torch.strided:
        _fail(op, f"{argument.at(i)} is not a dense (strided) tensor; convert it with to_dense()")


def _check_shape(op: str, argument: Operands, first: Operands, i: int) -> None:
    tensor, expected = argument.tensors[i], first.tensors[i]
    if tensor.shape != expected.shape:
        _fail(
            op,
            f"{argument.at(i)} has shape {list(tensor.shape)} but {first.at(i)} has shape "
            f"{list(expected.shape)}; tensors at one position must have one shape",
        )


def _check_device(op: str, argument: Operands, first: Operands, i: int) -> None:
    tensor, home = argument.tensors[i], first.tensors[0]
    if tensor.device != home.device:
        _fail(
            op,
            f"{argument.at(i)} is on {tensor.device} but {first.at(0)} is on {home.device}; "
            "all tensors of one call must be on one device",
        )


def _check_codes(op: str, omega: Operands, i: int, scales: Operands) -> None:
    """The i-th Ω, which is uint8, must have the scales of its blocks."""
    codes, given = omega.tensors[i], scales.tensors[i]
    _check_layout(op, scales, i)
    if given.device != codes.device:
        _fail(
            op,
            f"{scales.at(i)} is on {given.device} but {omega.at(i)} is on {codes.device}; "
            "move it there",
        )
    if given.dtype != torch.float32:
        _fail(op, f"{scales.at(i)} has dtype {_name(given.dtype)}; pass float32")
    blocks = num_scales(codes.numel())
    if given.dim() != 1 or given.numel() != blocks:
        _fail(
            op,
            f"{scales.at(i)} has shape {list(given.shape)} where [{blocks}] is expected, a scale "
            f"for every {BLOCK} codes of {omega.at(i)}; pass those it was compressed with",
        )
    if not given.is_contiguous():
        _fail(op, f"{scales.at(i)} is not contiguous; pass contiguous()")
    if not is_dense(codes):
        _fail(
            op,
            f"{omega.at(i)} has uint8 codes that do not fill their memory, along which blocks run; "
            "pass a dense tensor and the scales it was compressed with",
        )


def _check_scales(op: str, omega: Operands, scales: Operands) -> None:
    """Scales for every Ω that is stored in codes, and for no other."""
    if scales.tensors and len(scales.tensors) != len(omega.tensors):
        _fail(
            op,
            f"{scales.name} has {len(scales.tensors)} tensors but {omega.name} has "
            f"{len(omega.tensors)}; pass one for each, without elements where there are no codes",
        )
    for i, stored in enumerate(omega.tensors):
        if stored.dtype == torch.uint8:
            if not scales.tensors:
                _fail(
                    op,
                    f"{omega.at(i)} has uint8 codes but {scales.name} is empty; "
                    "pass the scales it was compressed with",
                )
            _check_codes(op, omega, i, scales)
        elif scales.tensors and scales.tensors[i].numel() != 0:
            _fail(
                op,
                f"{scales.at(i)} has shape {list(scales.tensors[i].shape)} but {omega.at(i)} is "
                f"{_name(stored.dtype)}, which has no scales; pass a tensor without elements",
            )


def check_lists(op: str, operands: Sequence[Operands]) -> None:
    """Lengths, shapes, dtypes and devices; the first list is what the others are compared with."""
    first = operands[0]
    values = operands[1] if first.is_omega else first
    for argument in operands:
        if len(argument.tensors) != len(first.tensors):
            _fail(
                op,
                f"{argument.name} has {len(argument.tensors)} tensors but {first.name} has "
                f"{len(first.tensors)}; pass one of each per parameter",
            )
    for i in range(len(first.tensors)):
        for argument in operands:
            _check_layout(op, argument, i)
            _check_shape(op, argument, first, i)
            _check_device(op, argument, first, i)
            _check_dtype(op, argument, i, values.tensors[i].dtype)


@dataclass(frozen=True)
class _Span:
    """The memory a tensor touches: [begin, end) in bytes."""

    begin: int
    end: int
    argument: Operands
    index: int

    @property
    def tensor(self) -> Tensor:
        return self.argument.tensors[self.index]


def _spans(operands: Sequence[Operands]) -> Iterator[_Span]:
    for argument in operands:
        for i, tensor in enumerate(argument.tensors):
            if tensor.numel() > 0:
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                begin = tensor.data_ptr()
                yield _Span(begin, begin + (last + 1) * tensor.element_size(), argument, i)


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one range of memory, each address once, in any order."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _is_nested(tensor: Tensor) -> bool:
    """Whether every stride exceeds what smaller strides reach, so that no address comes twice."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _addresses(tensor: Tensor) -> Tensor:
    """The address of every element, sorted. Only for the rare tensor that is not dense."""
    result = torch.tensor(tensor.data_ptr(), device="cpu")
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = torch.arange(size, device="cpu") * (stride * tensor.element_size())
        result = result.unsqueeze(-1) + steps
    return result.flatten().sort().values


def _share_memory(a: _Span, b: _Span) -> bool:
    """Whether tensors whose spans overlap really share memory (two column slices do not)."""
    if is_dense(a.tensor) and is_dense(b.tensor):
        return True
    left, right = _addresses(a.tensor), _addresses(b.tensor)
    # For each element on the right, the first on the left that ends after it begins.
    reaching = torch.searchsorted(left + a.tensor.element_size(), right, right=True)
    exists = reaching < len(left)
    begins = left[reaching.clamp_max(len(left) - 1)]
    return bool((exists & (begins < right + b.tensor.element_size())).any())


def _check_no_self_overlap(op: str, span: _Span) -> None:
    if span.argument.written and not _is_nested(span.tensor):
        places = _addresses(span.tensor)
        if (places[1:] == places[:-1]).any():
            _fail(
                op,
                f"{span.argument.at(span.index)} is written but overlaps itself in memory "
                "(an expanded tensor?); pass a clone()",
            )


def check_no_overlap(op: str, operands: Sequence[Operands]) -> None:
    """Checks that no written tensor shares memory with another one: threads would race."""
    still_open: list[_Span] = []  # spans that reach beyond the current one's beginning
    for span in sorted(_spans(operands), key=lambda span: span.begin):
        _check_no_self_overlap(op, span)
        still_open = [other for other in still_open if other.end > span.begin]
        for other in still_open:
            written, aliased = (span, other) if span.argument.written else (other, span)
            if written.argument.written and _share_memory(span, other):
                _fail(
                    op,
                    f"{written.argument.at(written.index)} is written but shares memory with "
                    f"{aliased.argument.at(aliased.index)}; pass a clone() of one of them",
                )
        still_open.append(span)


# ================================================================================================
# Numbers
# ================================================================================================
def check_non_negative(op: str, name: str, value: float) -> None:
    if not value >= 0 or math.isinf(value):
        _fail(op, f"{name} is {value:g}; pass a finite number that is not negative")


def check_positive(op: str, name: str, value: float) -> None:
    if not 0 < value < math.inf:
        _fail(op, f"{name} is {value:g}; pass a finite number above zero")


def check_beta(op: str, name: str, value: float) -> None:
    if not 0 <= value < 1:
        _fail(op, f"{name} is {value:g}; pass a number from 0 up to but not including 1")


def _check_float_dtype(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        _fail(op, f"{name} has dtype {_name(tensor.dtype)}; pass a float32 or float64 tensor")


def _check_scalar(op: str, name: str, scalar: Tensor, tensors: Sequence[Tensor]) -> None:
    """A 0-dim float32 or float64 tensor, on the CPU or with the tensors."""
    if scalar.dim() != 0:
        _fail(op, f"{name} has shape {list(scalar.shape)}; pass a number or a 0-dim tensor")
    _check_float_dtype(op, name, scalar)
    if scalar.device.type != "cpu" and tensors and scalar.device != tensors[0].device:
        _fail(
            op,
            f"{name} is on {scalar.device} but the tensors are on {tensors[0].device}; "
            "keep it on the CPU or on their device",
        )


# ================================================================================================
# What single operators require
# ================================================================================================
def check_factors(op: str, operands: Sequence[Operands]) -> None:
    """Ω[p, *d], left[b, *t, p], right[b, *t, *d], where *t and *d are one dimension or several."""
    for argument in operands:
        _check_layout(op, argument, 0)
        _check_device(op, argument, operands[0], 0)
        _check_dtype(op, argument, 0, operands[1].tensors[0].dtype)
    omega, left, right = (argument.tensors[0] for argument in operands)
    _check_least_dimensions(op, "omega", omega, 2, "a matrix [p, d]")
    _check_least_dimensions(op, "left", left, 3, "[samples, positions, p]")
    positions, columns = left.dim() - 2, omega.dim() - 1
    _check_dimensions(op, "right", right, 1 + positions + columns, "[samples, positions, d]")
    tensors = {"omega": omega, "left": left, "right": right}
    _check_same_size(op, tensors, ("right", 0), ("left", 0), "the samples")
    for d in range(1, positions + 1):
        _check_same_size(op, tensors, ("right", d), ("left", d), "the positions")
    _check_same_size(op, tensors, ("left", 1 + positions), ("omega", 0), "p")
    for d in range(1, columns + 1):
        _check_same_size(op, tensors, ("right", positions + d), ("omega", d), "d")


def check_low_rank(op: str, operands: Sequence[Operands]) -> None:
    """A[rank, in], B[out, rank], Ω[out, in], and gradients in the shapes of A and B."""
    tensors = {argument.name: argument.tensors[0] for argument in operands}
    for argument in operands:
        _check_layout(op, argument, 0)
        _check_device(op, argument, operands[0], 0)
        _check_dtype(op, argument, 0, tensors["a"].dtype)
    _check_dimensions(op, "a", tensors["a"], 2, "[rank, in]")
    _check_dimensions(op, "b", tensors["b"], 2, "[out, rank]")
    _check_dimensions(op, "omega", tensors["omega"], 2, "a matrix [out, in]")
    _check_same_size(op, tensors, ("b", 1), ("a", 0), "the rank")
    _check_same_size(op, tensors, ("omega", 0), ("b", 0), "out")
    _check_same_size(op, tensors, ("omega", 1), ("a", 1), "in")
    if "grad_a" in tensors:
        _check_grad_shape(op, "grad_a", tensors["grad_a"], "a", tensors["a"])
        _check_grad_shape(op, "grad_b", tensors["grad_b"], "b", tensors["b"])


def _check_grad_shape(op: str, name: str, grad: Tensor, of: str, tensor: Tensor) -> None:
    if grad.shape != tensor.shape:
        _fail(
            op,
            f"{name} has shape {list(grad.shape)} but {of} has shape {list(tensor.shape)}; pass a "
            "gradient in its shape",
        )


def _check_dimensions(op: str, name: str, tensor: Tensor, dims: int, expected: str) -> None:
    if tensor.dim() != dims:
        _fail(op, f"{name} has shape {list(tensor.shape)}; pass {expected}")


def _check_least_dimensions(op: str, name: str, tensor: Tensor, least: int, expected: str) -> None:
    if tensor.dim() < least:
        _fail(op, f"{name} has shape {list(tensor.shape)}; pass {expected}")


def _check_same_size(
    op: str, tensors: dict[str, Tensor], size: tuple[str, int], other: tuple[str, int], meaning: str
) -> None:
    (name, d), (other_name, other_d) = size, other
    tensor, expected = tensors[name], tensors[other_name]
    if tensor.shape[d] != expected.shape[other_d]:
        _fail(
            op,
            f"{name} has shape {list(tensor.shape)} but {other_name} has shape "
            f"{list(expected.shape)}; size {d} of {name} and size {other_d} of {other_name} are "
            f"both {meaning}",
        )


def check_nesterov(op: str, call: Call, read: bool) -> None:
    if call["nesterov"] and (call["momentum"] == 0 or call["dampening"] != 0):
        _fail(op, "nesterov needs a momentum above zero and no dampening")


def check_steps(op: str, call: Call, read: bool) -> None:
    """One count per parameter, none of them negative."""
    steps, params = call["steps"], call["params"]
    if steps.dim() != 1 or len(steps) != len(params):
        _fail(
            op,
            f"steps has shape {list(steps.shape)} but there are {len(params)} params; "
            "pass one count for each, as one tensor",
        )
    _check_float_dtype(op, "steps", steps)
    if params and steps.device != params[0].device:
        _fail(
            op,
            f"steps is on {steps.device} but the tensors are on {params[0].device}; move it there",
        )
    if read and steps.device.type == "cpu":  # on a device, reading them would wait
        for i, count in enumerate(steps.tolist()):
            check_non_negative(op, f"steps[{i}]", count)


# ================================================================================================
# A whole call
# ================================================================================================
def check_call(operator: Operator, call: Call, *, read: bool) -> list[Operands]:
    """Checks everything but overlap in memory, and returns the tensors that are in the lists.

    Args:
        operator: the declaration.
        call: the arguments by name.
        read: whether tensors have values. Those on a device are not read, since that would wait.
    """
    _check_scalars(operator, call)
    _check_numbers(operator, call, read)
    operator.check(operator.name, call, read)
    operands = [
        Operands(argument, _tensors_of(argument, call))
        for argument in operator.arguments
        if argument.role in (Role.VALUES, Role.OMEGA) and not _left_out(operator, argument, call)
    ]
    (operator.check_operands or check_lists)(operator.name, operands)
    for argument in operator.arguments:
        if argument.role is Role.OMEGA_SCALES:
            scales = Operands(argument, _tensors_of(argument, call))
            (omega,) = (each for each in operands if each.is_omega)
            _check_scales(operator.name, omega, scales)
            operands.append(scales)
    return operands


def _tensors_of(argument: Argument, call: Call) -> Sequence[Tensor]:
    """Those that a call gives for an argument: a list, a single tensor or, for None, nothing."""
    given = call[argument.name]
    if argument.is_list:
        return given
    return [] if given is None else [given]


def _check_scalars(operator: Operator, call: Call) -> None:
    first = next(
        _tensors_of(a, call) for a in operator.arguments if a.role in (Role.VALUES, Role.OMEGA)
    )
    for argument in operator.arguments:
        value = call[argument.name]
        if argument.role is Role.SCALAR and value is not None:
            _check_scalar(operator.name, argument.name, value, first)


def _check_numbers(operator: Operator, call: Call, read: bool) -> None:
    for argument in operator.arguments:
        value: Any = call[argument.name]
        if argument.check is None or value is None:
            continue
        if not isinstance(value, Tensor):
            argument.check(operator.name, argument.name, value)
        elif read and value.device.type == "cpu":
            argument.check(operator.name, argument.name, float(value))


def _left_out(operator: Operator, argument: Argument, call: Call) -> bool:
    """Whether a list has no part in this call, in which case it must be empty."""
    if not argument.only_with or call[argument.only_with] != 0:
        return False
    tensors = call[argument.name]
    if tensors:
        _fail(
            operator.name,
            f"{argument.name} has {len(tensors)} tensors but {argument.only_with} is 0; "
            "leave them out",
        )
    return True
