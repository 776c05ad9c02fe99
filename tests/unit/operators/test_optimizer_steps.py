"""sgd_step_ and adamw_step_ beside torch's own optimizers, and steps that are skipped.

Their results for all samples are in test_results.py, what they refuse in test_refusals.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from mas_ext import functional, reference
from tests.support.exact import assert_value_near
from tests.support.operators import (
    MODES,
    OPERATORS,
    RULES,
    STEPS,
    Scalars,
    call,
    lists_of,
    small,
    step_operator,
)
from tests.support.tensors import DTYPES, State, assert_same_bits

each_mode = pytest.mark.parametrize("mode", MODES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

TORCH = {
    "sgd": (torch.optim.SGD, {"weight_decay": 0.03}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.03}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.07, "betas": (0.9, 0.99)}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.07}),
}
# Of the largest parameter, after five steps; the unfused step rounds the gradient on the way.
UNFUSED = {"float32": 2e-6, "float64": 4e-15, "bfloat16": 2**-5, "float16": 2**-8}


def zeroed(op: str, dtype: torch.dtype) -> State:
    """As before the first step."""
    state = small(op, dtype)
    for name in OPERATORS[op].moments:
        for tensor in getattr(state, name):
            tensor.zero_()
    return state


def implementations(name: str, dtype: str) -> list[str]:
    if "16" not in dtype:
        return ["fused", "foreach"]
    # torch's ε is 0 in float16; its fused SGD is wrong before 2.14.
    return ["fused"] if "adam" in name else ["foreach"]


@each_mode
@pytest.mark.parametrize(
    ("name", "dtype", "implementation"),
    [
        (name, dtype, how)
        for name in TORCH
        for dtype in UNFUSED
        for how in implementations(name, dtype)
    ],
)
def test_five_steps_are_those_of_torch(
    name: str, dtype: str, implementation: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = TORCH[name]
    decoupled = {"decoupled": name == "adamw"} if "adam" in name else {}
    op = f"{name} {mode}"
    row = step_operator(*RULES[name][:2], {**options, **decoupled}, mode)
    monkeypatch.setitem(OPERATORS, op, row)
    mine, s = zeroed(op, DTYPES[dtype]), zeroed(op, DTYPES[dtype])
    optimizer = kind(s.params, lr=0.01, **options, **{implementation: True})
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(mine.grads, s.grads, strict=True):
            a.copy_(torch.randn(a.shape, generator=generator))
            b.copy_(a)
        for counts in mine.steps:
            counts.fill_(step)
        call(functional, op, mine, Scalars(lr=0.01, grad_scale=None))
        for p, g in zip(s.params, s.grads, strict=True):
            p.grad = g
        if mode == "gradient":
            functional.add_penalty_grad_(s.grads, s.params, s.anchors, s.omega, 0.7)
        optimizer.step()
        if mode == "proximal":
            functional.proximal_step_(s.params, s.anchors, s.omega, 0.7, 0.01)
    for a, b in zip(mine.params, s.params, strict=True):
        error = (a.double() - b.detach().double()).abs().max()
        assert error <= UNFUSED[dtype] * a.double().abs().max()


@pytest.mark.parametrize("op", STEPS)
@each_dtype
def test_a_skipped_step_keeps_every_bit(op: str, dtype: torch.dtype) -> None:
    for module in (functional, reference):
        for found in (1.0, torch.tensor(2.0)):
            state, before = small(op, dtype), small(op, dtype)
            for grad in state.grads:
                grad.fill_(math.nan)
            value = call(module, op, state, Scalars(found_inf=found)).value
            for name in OPERATORS[op].written:
                for now, old in zip(
                    lists_of(op, state)[name], lists_of(op, before)[name], strict=True
                ):
                    assert_same_bits(now, old)
            wanted = functional.penalty(before.params, before.anchors, before.omega, 0.7)
            assert_value_near(value, float(wanted), dtype=value.dtype)
