"""Protected parameters, and the groups of them that share one operator call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from mas_ext import functional
from mas_ext._distributed.shards import (
    Placement,
    are_plain,
    differentiable_part,
    locals_of,
    placement_key,
    redistribute_like,
)

Scalar = float | Tensor


class ProtectedParameter(NamedTuple):
    """A parameter, what is remembered of it, and how strongly it is regularized.

    Attributes:
        name: its canonical name.
        param: θ, as the model has it.
        anchor: θ*; of a DTensor, of its local part.
        omega: Ω as it is stored (:mod:`mas_ext.precision`); of a DTensor, of its local part.
        scales: of Ω, where it is stored as uint8 codes.
        pattern: what decides its λ; parameters that share it share a call.
        lambda_reg: λ, a 0-dim tensor.
    """

    name: str
    param: Parameter
    anchor: Tensor
    omega: Tensor
    scales: Tensor | None
    pattern: str
    lambda_reg: Tensor

    def largest(self) -> float:
        """max λΩ; of a DTensor, over its local part. Waits for the device."""
        omega = self.omega if self.scales is None else self.scales  # a block's largest Ω
        return float(self.lambda_reg) * float(omega.max()) if omega.numel() else 0.0


class ParameterGroup(NamedTuple):
    """Protected parameters that one operator call serves: one device, one sharding, one λ.

    Attributes:
        placement: the device they are on, and how they are sharded.
        lambda_reg: λ, a 0-dim tensor.
        names, params, anchors, omega: one entry per parameter.
        scales: of Ω that is stored as uint8 codes, empty tensors for others; no entries for none.
    """

    placement: Placement
    lambda_reg: Tensor
    names: list[str]
    params: list[Parameter]
    anchors: list[Tensor]
    omega: list[Tensor]
    scales: list[Tensor]

    def operator_arguments(self) -> dict[str, Any]:
        """θ*, Ω and λ, as the functions of :mod:`mas_ext.functional` take them."""
        return {
            "anchors": self.anchors,
            "omega": self.omega,
            "lambda_reg": self.lambda_reg,
            "omega_scales": self.scales,
        }

    def penalty(self) -> Tensor:
        """The penalty of these parameters, differentiable."""
        params = [differentiable_part(p) for p in self.params]
        return self.sum_over_shards(functional.penalty(params, **self.operator_arguments()))

    def add_penalty_grad_(self, grad_scale: Scalar | None) -> Tensor:
        """Adds the penalty's gradient; a gradient that is None is set only if the call succeeds."""
        found = [p.grad for p in self.params]
        grads = found if are_dense(found) else _dense_grads(self.params)
        with self.naming_parameters():
            value = functional.add_penalty_grad_(
                locals_of(grads),
                locals_of(self.params),
                **self.operator_arguments(),
                grad_scale=to_device_of(self.params[0], grad_scale),
            )
        if grads is not found:
            for p, grad in zip(self.params, grads, strict=True):
                p.grad = grad
        return self.sum_over_shards(value)

    def proximal_step_(self, lr: Scalar) -> Tensor:
        """Takes the proximal step; returns the penalty after it."""
        with self.naming_parameters():
            value = functional.proximal_step_(
                locals_of(self.params),
                **self.operator_arguments(),
                lr=to_device_of(self.params[0], lr),
            )
        return self.sum_over_shards(value)

    def penalty_grads(self) -> list[Tensor]:
        """The penalty's gradients; of a DTensor, of its local part."""
        with self.naming_parameters():
            return functional.penalty_and_grad(locals_of(self.params), **self.operator_arguments())[
                1
            ]

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """A value of the local parts, summed over all processes that hold other parts."""
        return self.placement.sum_over_shards(value)

    @contextmanager
    def naming_parameters(self) -> Iterator[None]:
        """Adds the parameter's name to an operator's error, beside its place in the list."""
        try:
            yield
        except RuntimeError as error:
            text = re.sub(r"\[(\d+)\] (has|is)", _with_name(self.names), str(error))
            if text == str(error):
                raise
            raise RuntimeError(text) from None


def grouped(protected: Iterable[ProtectedParameter]) -> list[ParameterGroup]:
    """A group for each placement, of which a model may have several, and each λ."""
    groups: dict[Any, ParameterGroup] = {}
    for name, p, anchor, omega, scales, pattern, lambda_reg in protected:
        key = placement_key(p), pattern
        group = groups.get(key)
        if group is None:
            group = groups[key] = ParameterGroup(Placement.of(p), lambda_reg, [], [], [], [], [])
        group.names.append(name)
        group.params.append(p)
        group.anchors.append(anchor)
        group.omega.append(omega)
        group.scales.append(torch.empty(0, device=omega.device) if scales is None else scales)
    return [
        group if any(s.numel() for s in group.scales) else group._replace(scales=[])
        for group in groups.values()
    ]


def largest_penalty_grads(protected: Iterable[ProtectedParameter]) -> Iterator[Tensor]:
    """max |λΩ(θ−θ*)| of every parameter, a 0-dim tensor; of a DTensor, over its local part.

    One gradient is in memory at a time.
    """
    for parameter in protected:
        (group,) = grouped([parameter])
        (grad,) = group.penalty_grads()
        if grad.numel():
            yield torch.linalg.vector_norm(grad, torch.inf)


def are_dense(grads: list[Tensor | None]) -> bool:
    """Whether all are plain tensors to which the penalty's gradients can be added in place."""
    return are_plain(grads) and {g.layout for g in grads} <= {torch.strided}  # type: ignore[union-attr]


@torch.no_grad()
def _dense_grads(params: list[Parameter]) -> list[Tensor]:
    """Zeros for None; dense, as the penalty's are and the sum is; and placed like the parameter."""
    with torch.inference_mode(False):
        return [
            torch.zeros_like(p)
            if p.grad is None
            else redistribute_like(p.grad.to_dense() if p.grad.is_sparse else p.grad, p)
            for p in params
        ]


def to_device_of(tensor: Tensor, scalar: Any) -> Any:
    """A scalar that is on another accelerator, where a model spans several, on the tensor's."""
    elsewhere = isinstance(scalar, Tensor) and scalar.device.type != "cpu"
    return scalar.to(tensor.device, non_blocking=True) if elsewhere else scalar


def _with_name(names: list[str]) -> Callable[[re.Match[str]], str]:
    return lambda found: f"[{found[1]}] ({names[int(found[1])]!r}) {found[2]}"
