"""Adam and AdamW with the penalty in their step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from mas_ext import functional
from mas_ext._distributed.shards import local_grads, locals_of
from mas_ext._penalty.parameter_groups import ParameterGroup
from mas_ext.optim.base import Group, Number, PenaltyOptimizer
from mas_ext.quadratic import QuadraticRegularizer


class Adam(PenaltyOptimizer, torch.optim.Adam):
    r"""``torch.optim.Adam`` whose step includes the penalty.

    36 bytes of memory traffic per float32 parameter, where ``mas.attach(optimizer)`` and torch's
    fused step take 48. See :mod:`mas_ext.optim` for what the classes share, and
    :func:`mas_ext.functional.adamw_step_` for the equations (``decoupled=False`` is this one's).

    Args:
        params, lr, betas, eps, weight_decay, maximize: as torch's.
        mas, mode, foreach, fused: see :mod:`mas_ext.optim`.
        capturable: accepted and ignored: the step always is.
        amsgrad, differentiable: not available.

    Raises:
        ValueError: an option that is not available, or none of the model's parameters.
    """

    _operator = "adamw_step_"

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        mas: QuadraticRegularizer,
        mode: str = "gradient",
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **more: Any,
    ) -> None:
        options = {"foreach": foreach, "fused": fused}
        self._set_penalty(
            mas, mode, {**options, "amsgrad": amsgrad, "differentiable": differentiable}
        )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            maximize=maximize,
            capturable=capturable,
            fused=True,
            **more,
        )
        mas.protected.check_are_in(self)

    def _take_step(self, group: Group, protected: ParameterGroup) -> Tensor:
        _, _, exp_avgs, exp_avg_sqs, steps = self._state_of(group)
        arguments = self._arguments(group, protected)
        with protected.naming_parameters():
            value = functional.adamw_step_(
                **arguments,
                exp_avgs=locals_of(exp_avgs),
                exp_avg_sqs=locals_of(exp_avg_sqs),
                steps=torch.stack(steps),
                betas=(float(group["betas"][0]), float(group["betas"][1])),
                eps=group["eps"],
                decoupled=group["decoupled_weight_decay"],
            )
        found_inf = arguments["found_inf"]
        taken = 1.0 if found_inf is None else (found_inf == 0).float()
        torch._foreach_add_(steps, taken)
        return value

    def _take_torch_step(self, group: Group) -> None:
        params, _, exp_avgs, exp_avg_sqs, steps = self._state_of(group)
        adam(
            locals_of(params),
            local_grads(params),
            locals_of(exp_avgs),
            locals_of(exp_avg_sqs),
            [],
            steps,
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            **{name: group[name] for name in ("lr", "weight_decay", "eps", "maximize")},
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )

    def _state_of(self, group: Group) -> tuple[list[Tensor], ...]:
        """θ, g, m, v and steps taken, made as torch makes them."""
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        self._init_group(group, *lists)
        params, grads, exp_avgs, exp_avg_sqs, _, steps = lists
        return params, grads, exp_avgs, exp_avg_sqs, steps


class AdamW(Adam, torch.optim.AdamW):
    r"""``torch.optim.AdamW`` whose step includes the penalty.

    36 bytes of memory traffic per float32 parameter, where ``mas.attach(optimizer)`` and torch's
    fused step take 48. See :mod:`mas_ext.optim` for what the classes share, and
    :func:`mas_ext.functional.adamw_step_` for the equations.

    Arguments and errors are those of :class:`Adam`.
    """

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        mas: QuadraticRegularizer,
        mode: str = "gradient",
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, mas=mas, mode=mode, **options
        )
