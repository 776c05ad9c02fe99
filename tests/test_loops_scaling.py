"""GradScaler and autocast: an Inf of the penalty's is caught like any other.

Real scalers, on the CPU. Every training is compared with the loop by hand in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import mas_ext
from mas_ext import MAS
from tests.hand_loop import AdamW, Memory, Sgd, assert_trained, by_hand
from tests.models import mlp, vectors

X = vectors(dtype=torch.float32)
STEPS = 8
SCALE = 1024.0
LR = {"SGD": 0.05, "AdamW": 0.01}
RULES = {"SGD": lambda: Sgd(LR["SGD"], 0.9), "AdamW": lambda: AdamW(LR["AdamW"])}
OPTIONS = {"SGD": {"lr": LR["SGD"], "momentum": 0.9}, "AdamW": {"lr": LR["AdamW"]}}


def learned(dtype: torch.dtype = torch.float32, lambda_reg: float = 5.0) -> tuple[nn.Module, MAS]:
    """A model that has moved since its only task ended."""
    model = mlp(torch.float32).to(dtype)
    mas = MAS(model, lambda_reg)
    mas.consolidate([X.to(dtype)])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    return model, mas


def task_loss(model: nn.Module) -> Tensor:
    x = X.to(next(model.parameters()).dtype)
    return (model(x) - 1).float().pow(2).mean()


def optimizer_of(kind: str, how: str, model: nn.Module, mas: MAS) -> torch.optim.Optimizer:
    """One that has the penalty in its step: attached, or ours."""
    if how == "ours":
        return getattr(mas_ext.optim, kind)(model.parameters(), mas=mas, **OPTIONS[kind])
    optimizer = getattr(torch.optim, kind)(
        model.parameters(), fused=how == "fused", **OPTIONS[kind]
    )
    mas.attach(optimizer)
    return optimizer


def scaled_step(model, optimizer, scaler, clip=None, loss=task_loss) -> None:
    optimizer.zero_grad()
    scaler.scale(loss(model)).backward()
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


def infinite_product(mas: MAS) -> None:
    mas.lambda_reg = 3e38
    mas.importance["0.weight"].mul_(1e4)  # the penalty's factors are finite, λΩδ is not


def infinite_importance(mas: MAS) -> None:
    mas.importance["2.weight"][1, 2] = torch.inf


def infinite_anchor(mas: MAS) -> None:
    mas.anchor["0.bias"][3] = -torch.inf


each_kind = pytest.mark.parametrize("kind", ["SGD", "AdamW"])
each_way = pytest.mark.parametrize("how", ["plain", "fused", "ours"])
each_inf = pytest.mark.parametrize(
    "inject", [infinite_product, infinite_importance, infinite_anchor]
)
each_clip = pytest.mark.parametrize("clip", [None, 0.5])


@each_kind
@each_way
@each_inf
@each_clip
def test_an_inf_of_the_penaltys_skips_the_step_and_lowers_the_scale(kind, how, inject, clip):
    """In the third step: the others are taken as if it had not been, and none other is skipped."""
    model, mas = learned()
    start, clean = copy.deepcopy(model), mas.state_dict()
    expected = by_hand(
        mlp64(start), Memory.of(mas), RULES[kind](), [[task_loss]] * STEPS, clip=clip, skipped=[2]
    )
    optimizer = optimizer_of(kind, how, model, mas)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    for number in range(STEPS):
        if number == 2:
            inject(mas)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        scaled_step(model, optimizer, scaler, clip)
        if number == 2:
            assert_same_state((model.state_dict(), optimizer.state_dict()), before)
            mas.load_state_dict(clean)
    assert scaler.get_scale() == SCALE / 2
    assert_trained(model, expected, start, 1e-4)


def mlp64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def assert_same_state(now, before) -> None:
    tensors = [torch.utils._pytree.tree_leaves(states) for states in (now, before)]
    for a, b in zip(*tensors, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@each_kind
@each_way
@each_clip
def test_a_loss_that_overflows_is_skipped_as_ever(kind, how, clip):
    model, mas = learned()
    start = copy.deepcopy(model)
    expected = by_hand(
        mlp64(start), Memory.of(mas), RULES[kind](), [[task_loss]] * STEPS, clip=clip, skipped=[3]
    )
    optimizer = optimizer_of(kind, how, model, mas)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    for number in range(STEPS):
        factor = torch.inf if number == 3 else 1.0
        scaled_step(model, optimizer, scaler, clip, lambda m, f=factor: f * task_loss(m))
    assert scaler.get_scale() == SCALE / 2
    assert_trained(model, expected, start, 1e-4)


def test_without_a_scaler_the_gradients_are_what_they_are():
    """Nothing is looked at and nothing skipped: an Inf reaches the weights, as by hand."""
    model, mas = learned()
    optimizer = optimizer_of("SGD", "plain", model, mas)
    infinite_importance(mas)
    task_loss(model).backward()
    optimizer.step()
    assert not model[2].weight.isfinite().all()


@each_way
def test_a_scaler_that_is_switched_off_looks_at_nothing(how):
    model, mas = learned()
    start = copy.deepcopy(model)
    expected = by_hand(mlp64(start), Memory.of(mas), RULES["SGD"](), [[task_loss]] * STEPS)
    optimizer = optimizer_of("SGD", how, model, mas)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(STEPS):
        scaled_step(model, optimizer, scaler)
    assert_trained(model, expected, start, 1e-4)


@pytest.mark.parametrize("how", ["fused", "ours"])
def test_somebody_elses_found_inf_is_raised_too(how):
    """A fused optimizer is told through these attributes, whoever sets them."""
    model, mas = learned()
    optimizer = optimizer_of("AdamW", how, model, mas)
    infinite_importance(mas)
    task_loss(model).backward()
    before = copy.deepcopy(model.state_dict())
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    optimizer.step()
    assert optimizer.found_inf == 1
    assert_same_state(model.state_dict(), before)


def test_gradients_that_were_withheld_come_back():
    model, mas = learned()
    optimizer = optimizer_of("SGD", "plain", model, mas)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    infinite_importance(mas)
    scaled_step(model, optimizer, scaler)
    assert [p.grad.isfinite().all() for p in model.parameters()] == [True, True, False, True]


# ================================================================================================
# float16: gradients overflow at 65504, though the penalty is far from it
# ================================================================================================
@pytest.mark.parametrize(("scale", "overflows"), [(2.0**16, True), (2.0**10, False)])
def test_float16_gradients_under_a_fused_optimizer_find_their_scale(scale, overflows):
    """(torch's scaler takes float16 gradients of fused optimizers only.)"""
    model, mas = learned(torch.float16, lambda_reg=50.0)
    memory, start = Memory.of(mas), copy.deepcopy(model)
    pulls = [memory.pull(n, p.detach().double()) for n, p in model.named_parameters()]
    assert (max(float(g.abs().max()) for g in pulls) * scale > 65504) == overflows
    optimizer = torch.optim.SGD(model.parameters(), 0.005, fused=True)
    mas.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    skips = 0
    for _ in range(12):
        before, held = scaler.get_scale(), copy.deepcopy(model)
        scaled_step(model, optimizer, scaler)
        if scaler.get_scale() < before:
            skips += 1
            assert_same_state(model.state_dict(), held.state_dict())
        assert all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() == scale / 2**skips
    assert (skips > 0) == overflows
    expected = by_hand(mlp64(start), memory, Sgd(0.005), [[task_loss]] * (12 - skips))
    assert_trained(model, expected, start, 0.05)


# ================================================================================================
# By hand: before the scaler looks, with its scale
# ================================================================================================
@each_kind
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("inject", [None, infinite_importance])
def test_add_penalty_grad_with_the_scalers_scale(kind, fused, inject):
    model, mas = learned()
    start, clean = copy.deepcopy(model), mas.state_dict()
    skipped = [] if inject is None else [2]
    expected = by_hand(
        mlp64(start), Memory.of(mas), RULES[kind](), [[task_loss]] * STEPS, skipped=skipped
    )
    optimizer = getattr(torch.optim, kind)(model.parameters(), fused=fused, **OPTIONS[kind])
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    for number in range(STEPS):
        if number in skipped:
            inject(mas)
        optimizer.zero_grad()
        scaler.scale(task_loss(model)).backward()
        mas.add_penalty_grad_(grad_scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        mas.load_state_dict(clean)
    assert scaler.get_scale() == (SCALE / 2 if skipped else SCALE)
    assert_trained(model, expected, start, 1e-4)


@each_kind
def test_the_penalty_in_the_loss_is_scaled_with_it(kind):
    model, mas = learned()
    start = copy.deepcopy(model)
    expected = by_hand(mlp64(start), Memory.of(mas), RULES[kind](), [[task_loss]] * STEPS)
    optimizer = getattr(torch.optim, kind)(model.parameters(), **OPTIONS[kind])
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for _ in range(STEPS):
        scaled_step(model, optimizer, scaler, loss=lambda m: task_loss(m) + mas.penalty())
    assert_trained(model, expected, start, 1e-4)
