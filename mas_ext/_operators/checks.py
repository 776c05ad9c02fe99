"""Argument checks of the operators' default kernels: those of ``csrc/checks.h``, in its words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from mas_ext.reference import BLOCK, accumulation_dtype, num_scales

SUPPORTED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KEPT = (torch.float32, torch.bfloat16, torch.uint8)  # Ω that is only read, beside all but float64


@dataclass(frozen=True)
class Argument:
    """One argument of an operator: a list, or a single tensor as a list of one."""

    name: str
    tensors: Sequence[Tensor]
    is_omega: bool = False  # has a dtype of its own; all others share one
    writable: bool = False
    is_list: bool = True

    def at(self, i: int) -> str:
        """How messages name the i-th tensor."""
        return f"{self.name}[{i}]" if self.is_list else self.name


def _fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"mas_ext::{op}: {message}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expected(argument: Argument, shared: torch.dtype) -> tuple[torch.dtype, ...]:
    """What an argument may be beside values of a dtype."""
    if not argument.is_omega:
        return (shared,)
    accumulates = argument.writable or shared == torch.float64
    return (accumulation_dtype(shared),) if accumulates else KEPT


def _names(dtypes: Sequence[torch.dtype]) -> str:
    *most, last = map(_name, dtypes)
    return f"{', '.join(most)} or {last}" if most else last


def _check_dtype(op: str, argument: Argument, i: int, shared: torch.dtype) -> None:
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


def _check_layout(op: str, argument: Argument, i: int) -> None:
    if argument.tensors[i].layout != torch.strided:
        _fail(op, f"{argument.at(i)} is not a dense (strided) tensor; convert it with to_dense()")


def _check_shape(op: str, argument: Argument, first: Argument, i: int) -> None:
    tensor, expected = argument.tensors[i], first.tensors[i]
    if tensor.shape != expected.shape:
        _fail(
            op,
            f"{argument.at(i)} has shape {list(tensor.shape)} but {first.at(i)} has shape "
            f"{list(expected.shape)}; tensors at one position must have one shape",
        )


def _check_device(op: str, argument: Argument, first: Argument, i: int) -> None:
    tensor, home = argument.tensors[i], first.tensors[0]
    if tensor.device != home.device:
        _fail(
            op,
            f"{argument.at(i)} is on {tensor.device} but {first.at(0)} is on {home.device}; "
            "all tensors of one call must be on one device",
        )


def _check_codes(op: str, omega: Argument, i: int, scales: Argument) -> None:
    """That the i-th Ω, which is uint8, has the scales of its blocks."""
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


def _check_scales(op: str, omega: Argument, scales: Argument) -> None:
    """Scales for every Ω that is kept in codes, and for no other."""
    if scales.tensors and len(scales.tensors) != len(omega.tensors):
        _fail(
            op,
            f"{scales.name} has {len(scales.tensors)} tensors but {omega.name} has "
            f"{len(omega.tensors)}; pass one for each, without elements where there are no codes",
        )
    for i, kept in enumerate(omega.tensors):
        if kept.dtype == torch.uint8:
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
                f"{_name(kept.dtype)}, which has no scales; pass a tensor without elements",
            )


def _scales_argument(omega_scales: Sequence[Tensor]) -> Argument:
    return Argument("omega_scales", omega_scales)


def check_metadata(
    op: str, arguments: Sequence[Argument], omega_scales: Sequence[Tensor] = ()
) -> None:
    """Lengths, shapes, dtypes, devices; the first argument is the one others are held against."""
    first = arguments[0]
    values = arguments[1] if first.is_omega else first
    for argument in arguments:
        if len(argument.tensors) != len(first.tensors):
            _fail(
                op,
                f"{argument.name} has {len(argument.tensors)} tensors but {first.name} has "
                f"{len(first.tensors)}; pass one of each per parameter",
            )
    for i in range(len(first.tensors)):
        for argument in arguments:
            _check_layout(op, argument, i)
            _check_shape(op, argument, first, i)
            _check_device(op, argument, first, i)
            _check_dtype(op, argument, i, values.tensors[i].dtype)
    for argument in arguments:
        if argument.is_omega:
            _check_scales(op, argument, _scales_argument(omega_scales))


@dataclass(frozen=True)
class _Span:
    """The memory a tensor touches: [begin, end) in bytes."""

    begin: int
    end: int
    argument: Argument
    index: int

    @property
    def tensor(self) -> Tensor:
        return self.argument.tensors[self.index]


def _spans(arguments: Sequence[Argument]) -> Iterator[_Span]:
    for argument in arguments:
        for i, tensor in enumerate(argument.tensors):
            if tensor.numel() > 0:
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                begin = tensor.data_ptr()
                yield _Span(begin, begin + (last + 1) * tensor.element_size(), argument, i)


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one range of memory, each place once, in whatever order."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _is_nested(tensor: Tensor) -> bool:
    """Whether every step goes beyond all that smaller steps reach: no place comes twice."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _addresses(tensor: Tensor) -> Tensor:
    """The address of every element, sorted. Only for the rare tensor that is not dense."""
    result = torch.tensor(tensor.data_ptr())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        result = result.unsqueeze(-1) + torch.arange(size) * stride * tensor.element_size()
    return result.flatten().sort().values


def _share_memory(a: _Span, b: _Span) -> bool:
    """Whether two tensors whose spans meet really share memory (two column slices do not)."""
    if is_dense(a.tensor) and is_dense(b.tensor):
        return True
    left, right = _addresses(a.tensor), _addresses(b.tensor)
    # For each element on the right, the first on the left that ends after it begins.
    reaching = torch.searchsorted(left + a.tensor.element_size(), right, right=True)
    exists = reaching < len(left)
    begins = left[reaching.clamp_max(len(left) - 1)]
    return bool((exists & (begins < right + b.tensor.element_size())).any())


def _check_no_self_overlap(op: str, span: _Span) -> None:
    if span.argument.writable and not _is_nested(span.tensor):
        places = _addresses(span.tensor)
        if (places[1:] == places[:-1]).any():
            _fail(
                op,
                f"{span.argument.at(span.index)} is written but overlaps itself in memory "
                "(an expanded tensor?); pass a clone()",
            )


def check_no_overlap(
    op: str, arguments: Sequence[Argument], omega_scales: Sequence[Tensor] = ()
) -> None:
    """Nothing that is written may share memory with anything else: two threads would race."""
    still_open: list[_Span] = []  # spans that reach beyond the one at hand
    spans = _spans([*arguments, _scales_argument(omega_scales)])
    for span in sorted(spans, key=lambda span: span.begin):
        _check_no_self_overlap(op, span)
        still_open = [other for other in still_open if other.end > span.begin]
        for other in still_open:
            written, aliased = (span, other) if span.argument.writable else (other, span)
            if written.argument.writable and _share_memory(span, other):
                _fail(
                    op,
                    f"{written.argument.at(written.index)} is written but shares memory with "
                    f"{aliased.argument.at(aliased.index)}; pass a clone() of one of them",
                )
        still_open.append(span)


def check_scalar(op: str, name: str, scalar: Tensor, tensors: Sequence[Tensor]) -> None:
    """A 0-dim float32 or float64 tensor, on the CPU or with the tensors."""
    if scalar.dim() != 0:
        _fail(op, f"{name} has shape {list(scalar.shape)}; pass a number or a 0-dim tensor")
    if scalar.dtype not in (torch.float32, torch.float64):
        _fail(op, f"{name} has dtype {_name(scalar.dtype)}; pass a float32 or float64 tensor")
    if scalar.device.type != "cpu" and tensors and scalar.device != tensors[0].device:
        _fail(
            op,
            f"{name} is on {scalar.device} but the tensors are on {tensors[0].device}; "
            "keep it on the CPU or on their device",
        )


def check_non_negative(op: str, name: str, value: float | Tensor) -> None:
    """Finite and ≥ 0; a scalar on a device is not looked at, since that would wait for it."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            return
        value = float(value)
    if not value >= 0 or math.isinf(value):
        _fail(op, f"{name} is {value:g}; pass a finite number that is not negative")


def _check_dimensions(op: str, name: str, tensor: Tensor, dims: int, expected: str) -> None:
    if tensor.dim() != dims:
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


def check_abs_matmul(
    op: str, omega: Tensor, left: Tensor, right: Tensor, scale: float
) -> list[Argument]:
    """Ω[p, d], left[b, t, p] and right[b, t, d]."""
    check_non_negative(op, "scale", scale)
    arguments = [
        Argument("omega", [omega], is_omega=True, writable=True, is_list=False),
        Argument("left", [left], is_list=False),
        Argument("right", [right], is_list=False),
    ]
    for argument in arguments:
        _check_layout(op, argument, 0)
        _check_device(op, argument, arguments[0], 0)
        _check_dtype(op, argument, 0, left.dtype)
    tensors = {"omega": omega, "left": left, "right": right}
    _check_dimensions(op, "omega", omega, 2, "a matrix [p, d]")
    _check_dimensions(op, "left", left, 3, "[samples, positions, p]")
    _check_dimensions(op, "right", right, 3, "[samples, positions, d]")
    _check_same_size(op, tensors, ("right", 0), ("left", 0), "the samples")
    _check_same_size(op, tensors, ("right", 1), ("left", 1), "the positions")
    _check_same_size(op, tensors, ("left", 2), ("omega", 0), "p")
    _check_same_size(op, tensors, ("right", 2), ("omega", 1), "d")
    return arguments


def _check_positive(op: str, name: str, value: Tensor) -> None:
    if value.device.type == "cpu" and not 0 < float(value) < math.inf:
        _fail(op, f"{name} is {float(value):g}; pass a finite number above zero")


def check_strengths(op: str, lambda_reg: Tensor, lr: Tensor, grad_scale: Tensor | None) -> None:
    """Of an optimizer's step."""
    check_non_negative(op, "lambda_reg", lambda_reg)
    check_non_negative(op, "lr", lr)
    if grad_scale is not None:
        _check_positive(op, "grad_scale", grad_scale)


def check_sgd_options(
    op: str,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    momentum_buffers: Sequence[Tensor],
) -> None:
    """Numbers that every call is told."""
    check_non_negative(op, "momentum", momentum)
    check_non_negative(op, "dampening", dampening)
    check_non_negative(op, "weight_decay", weight_decay)
    if nesterov and (momentum == 0 or dampening != 0):
        _fail(op, "nesterov needs a momentum above zero and no dampening")
    if momentum == 0 and momentum_buffers:
        _fail(
            op,
            f"momentum_buffers has {len(momentum_buffers)} tensors but momentum is 0; "
            "leave them out",
        )


def check_adam_options(
    op: str, beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    """Numbers that every call is told."""
    for name, beta in {"beta1": beta1, "beta2": beta2}.items():
        if not 0 <= beta < 1:
            _fail(op, f"{name} is {beta:g}; pass a number from 0 up to but not including 1")
    check_non_negative(op, "eps", eps)
    check_non_negative(op, "weight_decay", weight_decay)


def check_steps(op: str, steps: Tensor, params: Sequence[Tensor]) -> None:
    """One count a parameter."""
    if steps.dim() != 1 or len(steps) != len(params):
        _fail(
            op,
            f"steps has shape {list(steps.shape)} but there are {len(params)} params; "
            "pass one count for each, as one tensor",
        )
    if steps.dtype not in (torch.float32, torch.float64):
        _fail(op, f"steps has dtype {_name(steps.dtype)}; pass a float32 or float64 tensor")
    if params and steps.device != params[0].device:
        _fail(
            op,
            f"steps is on {steps.device} but the tensors are on {params[0].device}; move it there",
        )


def check_counts(op: str, steps: Tensor) -> None:
    """That no count is negative, where looking at them waits for nothing."""
    if steps.device.type == "cpu":
        for i, count in enumerate(steps.tolist()):
            check_non_negative(op, f"steps[{i}]", count)
