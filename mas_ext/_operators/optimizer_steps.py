"""The optimizer steps among the operators: their default and fake kernels.

See :mod:`mas_ext._operators.list_operators` for how a call travels. A call is an object here,
whose fields are the schema's arguments in their order: checked the same way by both kernels,
which differ in whether there are values and addresses to look at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from mas_ext import reference
from mas_ext._operators.checks import (
    Argument,
    check_adam_options,
    check_counts,
    check_metadata,
    check_no_overlap,
    check_scalar,
    check_sgd_options,
    check_steps,
    check_strengths,
)
from mas_ext._operators.dispatch import register
from mas_ext._operators.list_operators import Tensors, empty_value


class _Call(Protocol):
    """What the two have in common."""

    op: ClassVar[str]
    params: Tensors
    grads: Tensors
    anchors: Tensors
    omega: Tensors
    omega_scales: Tensors
    lambda_reg: Tensor
    lr: Tensor
    proximal: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def check_options(self, look: bool) -> None: ...

    def moments(self) -> dict[str, Tensors]: ...

    def run(self) -> Tensor: ...


@dataclass
class _SgdStep:
    op: ClassVar[str] = "sgd_step_"

    params: Tensors
    grads: Tensors
    momentum_buffers: Tensors
    anchors: Tensors
    omega: Tensors
    omega_scales: Tensors
    lambda_reg: Tensor
    lr: Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    proximal: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def check_options(self, look: bool) -> None:
        check_sgd_options(
            self.op,
            self.momentum,
            self.dampening,
            self.weight_decay,
            self.nesterov,
            self.momentum_buffers,
        )

    def moments(self) -> dict[str, Tensors]:
        return {} if self.momentum == 0 else {"momentum_buffers": self.momentum_buffers}

    def run(self) -> Tensor:
        return reference.sgd_step_(
            *_state(self),
            momentum_buffers=self.momentum_buffers,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            **_rest(self),
        )


@dataclass
class _AdamWStep:
    op: ClassVar[str] = "adamw_step_"

    params: Tensors
    grads: Tensors
    exp_avgs: Tensors
    exp_avg_sqs: Tensors
    steps: Tensor
    anchors: Tensors
    omega: Tensors
    omega_scales: Tensors
    lambda_reg: Tensor
    lr: Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    decoupled: bool = True
    maximize: bool = False
    proximal: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def check_options(self, look: bool) -> None:
        check_adam_options(self.op, self.beta1, self.beta2, self.eps, self.weight_decay)
        check_steps(self.op, self.steps, self.params)
        if look:
            check_counts(self.op, self.steps)

    def moments(self) -> dict[str, Tensors]:
        return {"exp_avgs": self.exp_avgs, "exp_avg_sqs": self.exp_avg_sqs}

    def run(self) -> Tensor:
        return reference.adamw_step_(
            *_state(self),
            exp_avgs=self.exp_avgs,
            exp_avg_sqs=self.exp_avg_sqs,
            steps=self.steps,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled=self.decoupled,
            **_rest(self),
        )


def _state(call: _Call) -> tuple[Any, ...]:
    return call.params, call.grads, call.anchors, call.omega, call.lambda_reg, call.lr


def _rest(call: Any) -> dict[str, Any]:
    return {
        "omega_scales": call.omega_scales,
        "mode": "proximal" if call.proximal else "gradient",
        "maximize": call.maximize,
        "grad_scale": call.grad_scale,
        "found_inf": call.found_inf,
    }


def _check(call: _Call, look: bool) -> None:
    for name in ("lambda_reg", "lr", "grad_scale", "found_inf"):
        scalar = getattr(call, name)
        if scalar is not None:
            check_scalar(call.op, name, scalar, call.params)
    if look:
        check_strengths(call.op, call.lambda_reg, call.lr, call.grad_scale)
    call.check_options(look)
    written = {"params": call.params, **call.moments()}
    arguments = [
        *(Argument(name, tensors, writable=True) for name, tensors in written.items()),
        Argument("grads", call.grads),
        Argument("anchors", call.anchors),
        Argument("omega", call.omega, is_omega=True),
    ]
    check_metadata(call.op, arguments, call.omega_scales)
    if look:
        check_no_overlap(call.op, arguments, call.omega_scales)


def _register(kind: Callable[..., _Call]) -> None:
    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        call = kind(*args, **kwargs)
        _check(call, look=True)
        return call.run()

    def fake(*args: Any, **kwargs: Any) -> Tensor:
        call = kind(*args, **kwargs)
        _check(call, look=False)
        return empty_value(call.params, call.lambda_reg)

    register(kind.op, kernel, fake)  # type: ignore[attr-defined]


_register(_SgdStep)
_register(_AdamWStep)
