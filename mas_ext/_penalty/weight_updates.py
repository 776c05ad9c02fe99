r"""The penalty on what LoRA adapters add to a weight, with its gradients to A and B.

.. math:: \frac{\lambda}{2}\sum_i \Omega_i\,(W + BA - \theta^*)_i^2

W does not change, and θ* is W plus the adapters when the last task ended. So the difference is one
product of two matrices, in which the old adapters have negative signs, and W is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mas_ext import functional
from mas_ext._adapters.lora import AdaptedWeight, Adapter
from mas_ext._penalty.parameter_groups import Scalar, to_device_of


@dataclass(frozen=True)
class ProtectedUpdate:
    """The update of a weight by its adapters, and how strongly it is regularized.

    Attributes:
        weight: the weight and its adapters.
        before: the adapters at θ*, by name.
        omega: Ω of the weight, as it is stored (:mod:`mas_ext.precision`).
        scales: of Ω, where it is stored as uint8 codes.
        lambda_reg: λ, a 0-dim tensor.
    """

    weight: AdaptedWeight
    before: Mapping[str, Adapter]
    omega: Tensor
    scales: Tensor | None
    lambda_reg: Tensor

    def change(self) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] of θ − θ*, differentiable; None if there are no adapters."""
        removed = [one._replace(scale=-one.scale) for one in self.before.values()]
        adapters = [*self.weight.adapters().values(), *removed]
        return self.weight.product(adapters) if adapters else None

    def penalty(self, lambda_reg: Tensor | float | None = None) -> Tensor:
        """The penalty, differentiable; with another λ if one is given."""
        change = self.change()
        if change is None:
            return torch.zeros((), device=self.omega.device)
        a, b = change
        omega, a = self.omega, a.view(-1, *self.omega.shape[1:])
        # Convolutions may have channels last: what is read is one matrix in memory.
        strides = omega.stride()
        order = [0, *sorted(range(1, omega.dim()), key=lambda d: -strides[d])]
        return functional.low_rank_penalty(
            a.permute(order).flatten(1),
            b,
            omega.permute(order).flatten(1),
            self.lambda_reg if lambda_reg is None else lambda_reg,
            omega_scales=self.scales,
        )

    def add_penalty_grad_(self, grad_scale: Scalar | None, only: Sequence[Tensor] | None) -> Tensor:
        """Adds the penalty's gradient to those of A and B; returns the penalty."""
        ids = None if only is None else set(map(id, only))
        params = [p for p in self.weight.params() if ids is None or id(p) in ids]
        with torch.inference_mode(False), torch.enable_grad():
            value = self.penalty()
            grads = torch.autograd.grad(value, params, allow_unused=True) if params else ()
        for p, grad in zip(params, grads, strict=True):
            if grad is None:
                continue
            if grad_scale is not None:
                grad = grad * to_device_of(p, grad_scale)
            p.grad = grad.to(p.dtype) if p.grad is None else p.grad.add_(grad)
        return value.detach()

    @torch.no_grad()
    def anchor(self) -> Tensor:
        """θ*: W, or a new tensor if adapters are part of only one of them."""
        weight = self.weight.weight.detach()
        parts = [*self.before.values()]
        if merged := self.weight.layer.merged_adapters:  # are in W by now
            now = self.weight.adapters()
            parts += [now[name]._replace(scale=-now[name].scale) for name in merged]
        if not parts:
            return weight
        a, b = self.weight.product(parts)
        return weight + (b @ a).view(weight.shape).to(weight.dtype)

    @torch.no_grad()
    def largest(self) -> float:
        """An upper bound of the penalty's curvature along A and B. Waits for the device."""
        omega = self.omega if self.scales is None else self.scales  # a block's largest Ω
        change = self.change()
        if change is None or not omega.numel():
            return 0.0
        a, b = change
        size = max(float(a.square().sum()), float(b.square().sum()))
        return float(self.lambda_reg) * float(omega.max()) * size

    @torch.no_grad()
    def square(self) -> Tensor:
        """‖θ − θ*‖², without forming the product."""
        change = self.change()
        if change is None:
            return torch.zeros((), dtype=torch.float64, device=self.omega.device)
        a, b = (factor.double() for factor in change)
        return ((b.T @ b) * (a @ a.T)).sum()


class Anchors(Mapping[str, Tensor]):
    """θ* by name; of adapted weights it is computed at each access, and unknown if quantized.

    Args:
        own: θ* of all others.
        updates: of the adapted weights.
    """

    def __init__(self, own: Mapping[str, Tensor], updates: list[ProtectedUpdate]) -> None:
        adapted = {update.weight.name for update in updates}
        self._own = {name: anchor for name, anchor in own.items() if name not in adapted}
        self._updates = {u.weight.name: u for u in updates if not u.weight.is_quantized}

    def __getitem__(self, name: str) -> Tensor:
        return self._updates[name].anchor() if name in self._updates else self._own[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._updates

    def __len__(self) -> int:
        return len(self._own) + len(self._updates)
