"""Every operator of ``torch.ops.mas_ext``, declared once.

A new operator is a function in :mod:`mas_ext.reference` and in :mod:`mas_ext.functional`, a
declaration here, an entry in ``csrc/operators.h`` and its kernels. It takes at least one list
beside Ω, from which the expected dtypes follow. :mod:`mas_ext._operators.registration` derives the
rest: the schema, the argument checks, the default kernel (the reference in plain PyTorch, after the
checks), the kernel for fake tensors, the version counters of what is written, and autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mas_ext import reference
from mas_ext._operators import autograd, checks
from mas_ext._operators.arguments import (
    Argument,
    Role,
    flag,
    matrix,
    number,
    optional_scalar,
    scalar,
    values,
    written,
)
from mas_ext._operators.checks import check_beta, check_non_negative, check_positive
from mas_ext._operators.operator import Call, Operator, Result
from mas_ext.precision import accumulation_dtype


def _empty_penalty(call: Call) -> Tensor:
    params = call["params"]
    device = (params[0] if params else call["lambda_reg"]).device
    return torch.empty((), dtype=reference.value_dtype(params), device=device)


def _empty_penalty_and_grads(call: Call) -> tuple[Tensor, list[Tensor]]:
    return _empty_penalty(call), [torch.empty_like(p) for p in call["params"]]


def _empty_low_rank_penalty(call: Call) -> Tensor:
    a = call["a"]
    return torch.empty((), dtype=reference.value_dtype([a]), device=a.device)


def _low_rank_grads(call: Call) -> tuple[Tensor, Tensor]:
    """Zeros in the accumulation dtype, which a backward pass multiplies before it rounds."""
    dtype = accumulation_dtype(call["a"].dtype)
    shapes = [call[name].shape if call["with_grads"] else (0,) for name in ("a", "b")]
    by_a, by_b = (call["a"].new_zeros(shape, dtype=dtype) for shape in shapes)
    return by_a, by_b


NOTHING = Result("()", lambda call: None)
PENALTY = Result("Tensor", _empty_penalty)
PENALTY_AND_GRADS = Result("(Tensor, Tensor[])", _empty_penalty_and_grads)
LOW_RANK_PENALTY = Result("Tensor", _empty_low_rank_penalty)
LOW_RANK_PENALTY_AND_GRADS = Result(
    "(Tensor, Tensor, Tensor)",
    lambda call: (_empty_low_rank_penalty(call), *_low_rank_grads(call)),
)


# ================================================================================================
# Arguments that several operators have
# ================================================================================================
PARAMS, ANCHORS, GRADS = values("params"), values("anchors"), values("grads")
OMEGA = Argument("omega", "Tensor[]", Role.OMEGA)
# Ω as it is stored, with the scales of those that are uint8 codes.
STORED_OMEGA = (OMEGA, Argument("omega_scales", "Tensor[]", Role.OMEGA_SCALES))
STATE = (PARAMS, ANCHORS, *STORED_OMEGA)
# What is added to Ω: the scale times |g|, or times g².
MAGNITUDE = (number("scale", 1.0, check_non_negative), flag("square"))
LAMBDA = scalar("lambda_reg", check_non_negative)
LR = scalar("lr", check_non_negative)
# A LoRA adapter's factors and the Ω of the weight that it changes.
ADAPTER = (
    matrix("a"),
    matrix("b"),
    matrix("omega", Role.OMEGA),
    Argument("omega_scales", "Tensor?", Role.OMEGA_SCALES),
)
ADAPTER_SCALE = number("scale", 1.0, check_non_negative)
# How a step ends: of every optimizer.
STEP_OPTIONS = (
    flag("maximize"),
    flag("proximal"),
    optional_scalar("grad_scale", check_positive),
    optional_scalar("found_inf"),
)


# ================================================================================================
# Default kernels that are not a function of reference.py as it is
# ================================================================================================
def _accumulate_importance(*, square: bool, **call: Any) -> None:
    reference.accumulate_importance_(**call, reduction="square" if square else "abs")


def _accumulate_outer(*, square: bool, **call: Any) -> None:
    reference.accumulate_outer_(**call, reduction="square" if square else "abs")


def _penalty_and_new_grads(**call: Any) -> tuple[Tensor, list[Tensor]]:
    value, grads = reference.penalty_and_grad(**call)
    likes = zip(call["params"], grads, strict=True)
    return value, [torch.empty_like(p).copy_(g) for p, g in likes]  # in the strides of params


def _low_rank_penalty(**call: Any) -> tuple[Tensor, Tensor, Tensor]:
    by_a, by_b = _low_rank_grads(call)
    if call.pop("with_grads"):
        return reference.low_rank_penalty_grad_(by_a, by_b, **call), by_a, by_b
    return reference.low_rank_penalty(**call), by_a, by_b


def _sgd_step(*, proximal: bool, **call: Any) -> Tensor:
    return reference.sgd_step_(**call, mode="proximal" if proximal else "gradient")


def _adamw_step(*, proximal: bool, beta1: float, beta2: float, **call: Any) -> Tensor:
    mode = "proximal" if proximal else "gradient"
    return reference.adamw_step_(**call, betas=(beta1, beta2), mode=mode)


# ================================================================================================
# The operators
# ================================================================================================
_DECLARED = (
    Operator(
        "accumulate_importance_",
        (written(OMEGA), GRADS, *MAGNITUDE),
        NOTHING,
        _accumulate_importance,
    ),
    Operator(
        "accumulate_outer_",
        (written(matrix("omega", Role.OMEGA)), matrix("left"), matrix("right"), *MAGNITUDE),
        NOTHING,
        _accumulate_outer,
        check_operands=checks.check_factors,
    ),
    Operator(
        "penalty",
        (*STATE, scalar("lambda_reg")),
        PENALTY,
        reference.penalty,
        backward=autograd.penalty_backward,
    ),
    Operator(
        "penalty_and_grad",
        (*STATE, scalar("lambda_reg")),
        PENALTY_AND_GRADS,
        _penalty_and_new_grads,
        backward=autograd.penalty_and_grad_backward,
    ),
    Operator(
        "add_penalty_grad_",
        (written(GRADS), *STATE, LAMBDA, optional_scalar("grad_scale", check_non_negative)),
        PENALTY,
        reference.add_penalty_grad_,
    ),
    Operator(
        "low_rank_penalty",
        (*ADAPTER, scalar("lambda_reg"), ADAPTER_SCALE, flag("with_grads", True)),
        LOW_RANK_PENALTY_AND_GRADS,
        _low_rank_penalty,
        check_operands=checks.check_low_rank,
        backward=autograd.low_rank_penalty_backward,
        save=autograd.save_low_rank,
    ),
    Operator(
        "low_rank_penalty_grad_",
        (written(matrix("grad_a")), written(matrix("grad_b")), *ADAPTER, LAMBDA, ADAPTER_SCALE),
        LOW_RANK_PENALTY,
        reference.low_rank_penalty_grad_,
        check_operands=checks.check_low_rank,
    ),
    Operator(
        "proximal_step_",
        (written(PARAMS), ANCHORS, *STORED_OMEGA, LAMBDA, LR),
        PENALTY,
        reference.proximal_step_,
    ),
    Operator(
        "sgd_step_",
        (
            written(PARAMS),
            GRADS,
            written(values("momentum_buffers", only_with="momentum")),
            ANCHORS,
            *STORED_OMEGA,
            LAMBDA,
            LR,
            number("momentum", 0.0, check_non_negative),
            number("dampening", 0.0, check_non_negative),
            number("weight_decay", 0.0, check_non_negative),
            flag("nesterov"),
            *STEP_OPTIONS,
        ),
        PENALTY,
        _sgd_step,
        check=checks.check_nesterov,
    ),
    Operator(
        "adamw_step_",
        (
            written(PARAMS),
            GRADS,
            written(values("exp_avgs")),
            written(values("exp_avg_sqs")),
            Argument("steps", "Tensor", Role.COUNTS),
            ANCHORS,
            *STORED_OMEGA,
            LAMBDA,
            LR,
            number("beta1", 0.9, check_beta),
            number("beta2", 0.999, check_beta),
            number("eps", 1e-8, check_non_negative),
            number("weight_decay", 1e-2, check_non_negative),
            flag("decoupled", True),
            *STEP_OPTIONS,
        ),
        PENALTY,
        _adamw_step,
        check=checks.check_steps,
    ),
)
OPERATORS = {operator.name: operator for operator in _DECLARED}
