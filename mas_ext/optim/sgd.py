"""SGD with the penalty in its step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from mas_ext import functional
from mas_ext._distributed.shards import local_grads, locals_of
from mas_ext._penalty.parameter_groups import ParameterGroup
from mas_ext.optim.base import Group, Number, PenaltyOptimizer
from mas_ext.quadratic import QuadraticRegularizer


def _is_narrow_on_cpu(p: Tensor) -> bool:
    """torch's fused SGD is wrong for these before torch 2.14."""
    return p.device.type == "cpu" and p.dtype in (torch.bfloat16, torch.float16)


class SGD(PenaltyOptimizer, torch.optim.SGD):
    r"""``torch.optim.SGD`` whose step includes the penalty.

    20 bytes of memory traffic per float32 parameter (28 with momentum), where
    ``mas.attach(optimizer)`` and torch's fused step take 32 (40). See :mod:`mas_ext.optim` for what
    the classes share, and :func:`mas_ext.functional.sgd_step_` for the equations.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as torch's.
        mas, mode, foreach, fused: see :mod:`mas_ext.optim`.
        differentiable: not available.

    Raises:
        ValueError: an option that is not available, or none of the model's parameters.
    """

    _operator = "sgd_step_"

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        mas: QuadraticRegularizer,
        mode: str = "gradient",
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        options = {"foreach": foreach, "differentiable": differentiable, "fused": fused}
        self._set_penalty(mas, mode, options)
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, fused=True
        )
        mas.protected.check_are_in(self)

    def _split(self, group: Group) -> Iterator[list[Tensor]]:
        for part, _ in self._by_history(group):
            yield part["params"]

    def _take_step(self, group: Group, protected: ParameterGroup) -> Tensor:
        buffers = [] if group["momentum"] == 0 else self._buffers(group)
        is_first = self._kept(group)[0] is None
        arguments = self._arguments(group, protected)
        with protected.naming_parameters():
            value = functional.sgd_step_(
                **arguments,
                momentum_buffers=locals_of(buffers),
                momentum=group["momentum"],
                dampening=0.0 if is_first else group["dampening"],
                nesterov=group["nesterov"],
            )
        if is_first:
            self._keep(group["params"], buffers)
        return value

    def _take_torch_step(self, group: Group) -> None:
        for part, is_first in self._by_history(group):
            narrow = [p for p in part["params"] if _is_narrow_on_cpu(p)]
            others = [p for p in part["params"] if not _is_narrow_on_cpu(p)]
            amp: dict[str, Any] = {
                name: getattr(self, name, None) for name in ("grad_scale", "found_inf")
            }
            if others:
                self._sgd({**part, "params": others}, is_first, fused=True, **amp)
            if narrow and not (amp["found_inf"] is not None and amp["found_inf"]):
                scale = 1.0 if amp["grad_scale"] is None else float(amp["grad_scale"])
                self._sgd({**part, "params": narrow}, is_first, scale)

    def _sgd(self, group: Group, is_first: bool, scale: float = 1.0, **how: Any) -> None:
        params, grads = group["params"], local_grads(group["params"])
        # Made here: torch's are not set to anything where the first step is skipped.
        buffers: list[Any] = [None] * len(params)
        if group["momentum"] != 0:
            buffers = self._buffers(group)
        sgd(
            locals_of(params),
            grads if scale == 1 else [g / scale for g in grads],
            locals_of(buffers),
            has_sparse_grad=any(g.is_sparse for g in grads),
            dampening=0.0 if is_first else group["dampening"],
            **{name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")},
            maximize=group["maximize"],
            **how,
        )
        if group["momentum"] != 0:
            self._keep(params, buffers)

    def _by_history(self, group: Group) -> Iterator[tuple[Group, bool]]:
        """Those with a momentum buffer, and those for which it is the first step."""
        has_history = [b is not None for b in self._kept(group)]
        if all(has_history):
            yield group, False
            return
        for is_first in (False, True):
            pairs = zip(group["params"], has_history, strict=True)
            chosen = [p for p, known in pairs if known != is_first]
            if chosen:
                yield {**group, "params": chosen}, is_first

    def _kept(self, group: Group) -> list[Tensor | None]:
        return [self.state.get(p, {}).get("momentum_buffer") for p in group["params"]]

    def _buffers(self, group: Group) -> list[Tensor]:
        return [
            torch.zeros_like(p) if b is None else b
            for p, b in zip(group["params"], self._kept(group), strict=True)
        ]

    def _keep(self, params: list[Tensor], buffers: list[Any]) -> None:
        for p, buffer in zip(params, buffers, strict=bool(buffers)):
            self.state[p]["momentum_buffer"] = buffer
