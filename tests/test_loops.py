"""Precision, accumulation, clipping and groups: each the loop by hand in float64."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import mas_ext
from mas_ext import MAS
from tests.hand_loop import AdamW, Memory, Sgd, assert_trained, by_hand
from tests.models import mlp, vectors
from tests.oracle import one_by_one

X = vectors(12)
STEPS = 6
CLIP = 0.3


def learned(dtype: torch.dtype = torch.float64, lambda_reg: float = 5.0) -> tuple[nn.Module, MAS]:
    """A model that has moved since its only task ended."""
    model = mlp(dtype)
    mas = MAS(model, lambda_reg)
    mas.consolidate([X.to(dtype)])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    return model, mas


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    return (model(x.to(next(model.parameters()).dtype)) - 1).pow(2).mean()


def sgd(model: nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, **options)


# ================================================================================================
# Who adds the penalty, and where
# ================================================================================================
def attached(model, mas, mode="gradient"):
    optimizer = sgd(model)
    mas.attach(optimizer, mode)
    return optimizer, lambda: None


def ours(model, mas, mode="gradient"):
    optimizer = mas_ext.optim.SGD(model.parameters(), 0.05, momentum=0.9, mas=mas, mode=mode)
    return optimizer, lambda: None


def called(model, mas):
    return sgd(model), mas.add_penalty_grad_


WAYS = [attached, ours, called]
each_way = pytest.mark.parametrize("way", WAYS)
CLIPPED = [(way, "before the penalty") for way in WAYS] + [(called, "with the penalty")]


@pytest.mark.parametrize(("way", "clip"), [(way, "nothing") for way in WAYS] + CLIPPED)
def test_clipping(way, clip):
    """attach and mas_ext.optim add after clipping; who calls chooses."""
    model, mas = learned()
    start, largest = copy.deepcopy(model), None if clip == "nothing" else CLIP
    expected = by_hand(
        model,
        Memory.of(mas),
        Sgd(0.05, 0.9),
        [[loss_of]] * STEPS,
        clip=largest,
        clip_penalty=clip == "with the penalty",
    )
    optimizer, add = way(model, mas)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        if clip == "with the penalty":
            add()
        if largest:
            norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
            assert norm > largest
        if clip != "with the penalty":
            add()
        optimizer.step()
    assert_trained(model, expected, start, 1e-10)


def test_clipping_with_the_penalty_in_the_loss():
    model, mas = learned()
    start = copy.deepcopy(model)
    expected = by_hand(
        model, Memory.of(mas), Sgd(0.05, 0.9), [[loss_of]] * STEPS, clip=CLIP, clip_penalty=True
    )
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (loss_of(model) + mas.penalty()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    assert_trained(model, expected, start, 1e-10)


# ================================================================================================
# Accumulation: the penalty counts once a step, not once a micro-batch
# ================================================================================================
def micro_losses() -> list:
    return [partial(loss_of, x=x) for x in X.split(4)]


@each_way
def test_accumulation(way):
    model, mas = learned()
    start = copy.deepcopy(model)
    expected = by_hand(model, Memory.of(mas), Sgd(0.05, 0.9), [micro_losses()] * STEPS)
    optimizer, add = way(model, mas)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for loss in micro_losses():
            (loss(model) / 3).backward()
        add()
        optimizer.step()
    assert_trained(model, expected, start, 1e-10)


def test_accumulation_with_the_penalty_in_every_loss_divides_it_too():
    model, mas = learned()
    start = copy.deepcopy(model)
    expected = by_hand(model, Memory.of(mas), Sgd(0.05, 0.9), [micro_losses()] * STEPS)
    optimizer = sgd(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for loss in micro_losses():
            ((loss(model) + mas.penalty()) / 3).backward()
        optimizer.step()
    assert_trained(model, expected, start, 1e-10)


@pytest.mark.parametrize("way", [attached, ours])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_accumulation_under_a_scaler(way, mode):
    """Scaled losses, three a step, clipped; an Inf in one of them skips the step."""
    model, mas = learned(torch.float32)
    start = copy.deepcopy(model)
    expected = by_hand(
        copy.deepcopy(model).double(),
        Memory.of(mas),
        Sgd(0.05, 0.9),
        [micro_losses()] * STEPS,
        clip=CLIP,
        proximal=mode == "proximal",
        skipped=[1],
    )
    optimizer, _ = way(model, mas, mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(STEPS):
        optimizer.zero_grad()
        for i, loss in enumerate(micro_losses()):
            factor = float("inf") if (number, i) == (1, 2) else 1 / 3
            scaler.scale(loss(model) * factor).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_trained(model, expected, start, 1e-4)


# ================================================================================================
# Groups with a learning rate of their own
# ================================================================================================
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("library", [torch.optim, mas_ext.optim])
def test_groups_with_their_own_learning_rate(mode, library):
    rates = {"0.": 0.08, "2.": 0.01}
    model, mas = learned()
    start = copy.deepcopy(model)
    expected = by_hand(
        model, Memory.of(mas), Sgd(rates, 0.9), [[loss_of]] * STEPS, proximal=mode == "proximal"
    )
    groups = [{"params": model[int(n[0])].parameters(), "lr": rate} for n, rate in rates.items()]
    if library is torch.optim:
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        mas.attach(optimizer, mode)
    else:
        optimizer = mas_ext.optim.SGD(groups, momentum=0.9, mas=mas, mode=mode)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert_trained(model, expected, start, 1e-10)


# ================================================================================================
# autocast
# ================================================================================================
each_narrow = pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)


def autocast_loss(model: nn.Module, narrow: torch.dtype) -> Tensor:
    with torch.autocast("cpu", narrow):
        output = model(X.float())
        assert output.dtype == narrow
        return (output.float() - 1).pow(2).mean()


@each_narrow
@pytest.mark.parametrize("way", ["attached", "ours", "called", "in the loss", "proximal"])
def test_autocast_reaches_the_loss_and_not_the_penalty(narrow, way):
    """Against a loop whose losses alone are computed in ``narrow``, from float32 weights."""
    model, mas = learned(torch.float32)
    start, rule = copy.deepcopy(model), AdamW(0.01)
    loss = partial(autocast_loss, narrow=narrow)
    expected = by_hand(model, Memory.of(mas), rule, [[loss]] * STEPS, proximal=way == "proximal")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    if way == "ours":
        optimizer = mas_ext.optim.AdamW(model.parameters(), 0.01, mas=mas)
    elif way in ("attached", "proximal"):
        mas.attach(optimizer, mode="proximal" if way == "proximal" else "gradient")
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = loss(model)
        with torch.autocast("cpu", narrow):
            if way == "in the loss":
                assert mas.penalty().dtype == torch.float32
                total = total + mas.penalty()
        total.backward()
        with torch.autocast("cpu", narrow):
            if way == "called":
                mas.add_penalty_grad_()
            optimizer.step()
    # A rounding that falls the other way in the forward pass moves a gradient by 2⁻⁸ of itself.
    assert_trained(model, expected, start, 0.02)


@each_narrow
def test_importance_under_autocast(narrow):
    """That of the network as it runs: every sample alone, under the same autocast."""
    model = mlp(torch.float32)
    mas = MAS(model)
    with torch.autocast("cpu", narrow):
        mas.consolidate([X.float()])
    context = partial(torch.autocast, "cpu", narrow)
    expected = one_by_one(copy.deepcopy(model), [X.float()], context=context)
    for name, omega in expected.items():
        error = (mas.importance[name].double() - omega).abs().max() / omega.max()
        assert error < 0.02, name


@each_narrow
def test_autocast_with_a_scaler_and_clipping(narrow):
    model, mas = learned(torch.float32)
    start = copy.deepcopy(model)
    loss = partial(autocast_loss, narrow=narrow)
    expected = by_hand(model, Memory.of(mas), Sgd(0.05, 0.9), [[loss]] * STEPS, clip=CLIP)
    optimizer, _ = attached(model, mas)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss(model)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**8
    assert_trained(model, expected, start, 0.02)
