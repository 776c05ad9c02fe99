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
from mas_ext._penalty import streaming
from mas_ext._penalty.streaming import Lists

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

    def anchor_beside(self) -> Tensor:
        """θ* on the parameter's device; a copy where the state is in host memory."""
        return self.anchor.to(self.param.device)

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

    θ*, Ω and scales may be in host memory; then a call brings them to the device in pieces.
    """

    placement: Placement
    lambda_reg: Tensor
    names: list[str]
    params: list[Tensor]
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
        if self.is_elsewhere:
            return self.sum_over_shards(_penalty_in_pieces(self, params))
        return self.sum_over_shards(functional.penalty(params, **self.operator_arguments()))

    def add_penalty_grad_(self, grad_scale: Scalar | None) -> Tensor:
        """Adds the penalty's gradient; a gradient that is None is set only if the call succeeds."""
        found = [p.grad for p in self.params]
        grads = found if are_dense(found) else _dense_grads(self.params)
        scale = to_device_of(self.params[0], grad_scale)

        def add(piece: ParameterGroup, lists: Lists) -> Tensor:
            with piece.naming_parameters():
                return functional.add_penalty_grad_(
                    lists[0],
                    locals_of(piece.params),
                    **piece.operator_arguments(),
                    grad_scale=scale,
                )

        value = self._call(add, "add_penalty_grad_", grads=locals_of(grads))
        if grads is not found:
            for p, grad in zip(self.params, grads, strict=True):
                p.grad = grad
        return self.sum_over_shards(value)

    def proximal_step_(self, lr: Scalar) -> Tensor:
        """Takes the proximal step; returns the penalty after it."""
        rate = to_device_of(self.params[0], lr)

        def step(piece: ParameterGroup, lists: Lists) -> Tensor:
            with piece.naming_parameters():
                return functional.proximal_step_(
                    locals_of(piece.params), **piece.operator_arguments(), lr=rate
                )

        return self.sum_over_shards(self._call(step, "proximal_step_"))

    def penalty_grads(self) -> list[Tensor]:
        """The penalty's gradients, where the state is; of a DTensor, of its local part."""
        with self.naming_parameters():
            return functional.penalty_and_grad(locals_of(self.params), **self.operator_arguments())[
                1
            ]

    @property
    def is_elsewhere(self) -> bool:
        """Whether θ* and Ω are on another device than the parameters."""
        return streaming.is_elsewhere(self.omega[0], self.placement.device)

    def pieces(self, whole: bool = False) -> Iterator[ParameterGroup]:
        """Groups whose θ* and Ω are beside the parameters; this one if that is where they are.

        Args:
            whole: whether no parameter may be cut.
        """
        if not self.is_elsewhere:
            yield self
            return
        for piece, _ in streaming.pieces_of(self, whole=whole):
            yield piece

    def _call(self, call: streaming.Call, operator: str, **lists: list[Tensor]) -> Tensor:
        """An operator's value; in pieces, if the state is elsewhere.

        Args:
            call: of a group and the parts of ``lists``.
            operator: its name.
            lists: its arguments that have one plain tensor per parameter, beside the group's.
        """
        if not self.is_elsewhere:
            return call(self, [*lists.values()])
        self.check(operator, **lists)
        return streaming.sum_over_pieces(self, call, *lists.values())

    def check(self, operator: str, **lists: list[Tensor]) -> None:
        """Raises what an operator would, before the first of several pieces is written."""
        streaming.check(self, operator, params=locals_of(self.params), **lists)

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


@torch.compiler.disable
def _penalty_in_pieces(group: ParameterGroup, params: list[Tensor]) -> Tensor:
    """The penalty, differentiable with respect to ``params``, which stand for the group's."""
    state = *group.anchors, *group.omega
    value: Tensor = _PenaltyInPieces.apply(group, len(params), *params, *state)
    return value


class _PenaltyInPieces(torch.autograd.Function):
    """Brings the state to the device twice: its copies are not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, group: ParameterGroup, count: int, *tensors: Tensor) -> Tensor:
        ctx.group, ctx.count = group, count
        ctx.save_for_backward(*tensors)  # the state too: autograd notices if it is written

        def value(piece: ParameterGroup, lists: Lists) -> Tensor:
            return functional.penalty(locals_of(piece.params), **piece.operator_arguments())

        return streaming.sum_over_pieces(group._replace(params=[*tensors[:count]]), value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        params = [*ctx.saved_tensors[: ctx.count]]
        group = ctx.group._replace(params=params, lambda_reg=ctx.group.lambda_reg * grad)
        # A gradient that is differentiated again needs the whole state at once.
        grads = _differentiable_grads(group) if torch.is_grad_enabled() else _grads(group)
        return (None, None, *grads, *[None] * (2 * ctx.count))


def _grads(group: ParameterGroup) -> list[Tensor]:
    grads = [torch.empty_like(p) for p in group.params]

    def write(piece: ParameterGroup, lists: Lists) -> Tensor:
        value, found = functional.penalty_and_grad(piece.params, **piece.operator_arguments())
        for part, grad in zip(lists[0], found, strict=True):
            part.copy_(grad)
        return value

    streaming.sum_over_pieces(group, write, grads)
    return grads


def _differentiable_grads(group: ParameterGroup) -> list[Tensor]:
    device = group.placement.device
    anchors, omega, scales = (
        [tensor.to(device) for tensor in tensors]
        for tensors in (group.anchors, group.omega, group.scales)
    )
    here = group._replace(anchors=anchors, omega=omega, scales=scales)
    return functional.penalty_and_grad(group.params, **here.operator_arguments())[1]


def grouped(protected: Iterable[ProtectedParameter]) -> list[ParameterGroup]:
    """A group for each placement, of which a model may have several, and each λ."""
    groups: dict[Any, ParameterGroup] = {}
    scales_of: dict[Any, list[Tensor | None]] = {}
    for name, p, anchor, omega, scales, pattern, lambda_reg in protected:
        key = placement_key(p), pattern
        group = groups.get(key)
        if group is None:
            group = groups[key] = ParameterGroup(Placement.of(p), lambda_reg, [], [], [], [], [])
            scales_of[key] = []
        group.names.append(name)
        group.params.append(p)
        group.anchors.append(anchor)
        group.omega.append(omega)
        scales_of[key].append(scales)
    return [group._replace(scales=_all_or_none(scales_of[key])) for key, group in groups.items()]


def _all_or_none(scales: list[Tensor | None]) -> list[Tensor]:
    """Scales with empty tensors for what has none; no entries if nothing has any."""
    some = next((one for one in scales if one is not None), None)
    if some is None:
        return []
    return [some.new_empty(0) if one is None else one for one in scales]


def largest_penalty_grads(protected: Iterable[ProtectedParameter]) -> Iterator[Tensor]:
    """max |λΩ(θ−θ*)| of every parameter, a 0-dim tensor; of a DTensor, over its local part.

    One gradient is in memory at a time. Where the state is elsewhere, it is that of each piece.
    """
    for parameter in protected:
        (group,) = grouped([parameter])
        for piece in group.pieces():
            (grad,) = piece.penalty_grads()
            if grad.numel():
                yield torch.linalg.vector_norm(grad, torch.inf)


def are_dense(grads: list[Tensor | None]) -> bool:
    """Whether all are plain tensors to which the penalty's gradients can be added in place."""
    return are_plain(grads) and {g.layout for g in grads} <= {torch.strided}  # type: ignore[union-attr]


@torch.no_grad()
def _dense_grads(params: list[Tensor]) -> list[Tensor]:
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
