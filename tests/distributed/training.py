"""Training with the penalty, as each program does it, and by hand on the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mas_ext
from mas_ext import MAS
from tests.distributed.models import Net, alone, assert_same, net, parameters, samples, sharded
from tests.support.hand_loop import HandLoop, Protection

LAMBDA, RATE, STEPS = 3.0, 0.05, 3


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Something to learn that is not what was measured."""
    return (model(x) - 1).square().mean()


ADAMW, SGD = ("AdamW", {"lr": RATE}), ("SGD", {"lr": RATE, "momentum": 0.9})
# Way → (the optimizer, whether the step is the proximal one).
WAYS: dict[str, tuple[tuple[str, dict[str, float]], bool]] = {
    "in the loss": (SGD, False),
    "called": (ADAMW, False),
    "called, proximal": (ADAMW, True),
    "attached": (ADAMW, False),
    "attached, proximal": (SGD, True),
    "ours, SGD": (SGD, False),
    "ours": (ADAMW, False),
    "ours, proximal": (ADAMW, True),
}


def optimizer_of(model: nn.Module, mas: MAS, way: str) -> tuple[Any, Callable[[], Tensor | None]]:
    """One that includes the penalty where the way says so, and what tells the penalty."""
    (name, options), proximal = WAYS[way]
    mode = "proximal" if proximal else "gradient"
    if way.startswith("ours"):
        made = getattr(mas_ext.optim, name)(model.parameters(), mas=mas, mode=mode, **options)
        return made, lambda: made.last_penalty
    made = getattr(torch.optim, name)(model.parameters(), **options)
    if way.startswith("attached"):
        handle = mas.attach(made, mode=mode, every=1)
        return made, lambda: handle.last_penalty
    return made, lambda: None


def train(model: nn.Module, mas: MAS, way: str, x: Tensor) -> list[float]:
    """On this rank's batch; returns the penalties."""
    optimizer, last_penalty = optimizer_of(model, mas, way)
    seen = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = mas.penalty() if way == "in the loss" else None
        (loss(model, x) if value is None else loss(model, x) + value).backward()
        if way == "called":
            value = mas.add_penalty_grad_()
        optimizer.step()
        if way == "called, proximal":
            value = mas.proximal_step_(RATE)
        value = last_penalty() if value is None else value
        assert type(value.detach()) is Tensor
        assert value.dim() == 0
        seen.append(value.item())
    return seen


def by_hand(plain: nn.Module, measured: list[Tensor], way: str) -> HandLoop:
    """A loop on the whole model, which has learned a task."""
    mas = MAS(plain, LAMBDA, process_group=alone())
    mas.consolidate(measured)
    (name, options), _ = WAYS[way]
    make = getattr(torch.optim, name)
    return HandLoop(
        copy.deepcopy(plain).double(),
        Protection.of(mas),
        lambda named: make(named.values(), foreach=False, **options),
    )


def check_every_way(prepared: Callable[[Net], nn.Module], rank: int, size: int) -> None:
    """All ways of training, in float64, against the loop by hand.

    Args:
        prepared: shards or wraps a model, maybe in place.
        rank: of the data ranks, of which there are ``size``.
    """
    shares = list(samples(3 * size, torch.float64, seed=5).split(3))
    measured = list(samples(4 * size, torch.float64).split(4))
    for way, (_, proximal) in WAYS.items():
        hand = by_hand(net(torch.float64), measured, way)
        for _ in range(STEPS):
            hand.step([partial(loss, x=x) for x in shares], proximal=proximal)
        model = prepared(net(torch.float64))
        mas = MAS(model, LAMBDA)
        mas.consolidate([measured[rank]])
        seen = train(model, mas, way, shares[rank])
        try:
            assert seen == pytest.approx(hand.penalties, rel=1e-9)
            # torch's fused steps count in float32.
            assert_same(parameters(model), hand.theta, 1e-6 if way.startswith("ours") else 1e-9)
        except AssertionError as problem:
            raise AssertionError(f"{way}: {problem}") from None


def check_scaling_and_clipping(rank: int, size: int) -> None:
    """An Inf on one rank, of the loss's or the penalty's, skips the step of all.

    What is clipped is the loss's gradient, before what is attached adds its own.
    """
    shares = [samples(6, seed=other + 2) for other in range(size)]
    measured = [samples()]
    for way in ("attached", "attached, proximal", "ours, SGD", "ours, proximal"):
        proximal, model = WAYS[way][1], sharded(net())
        hand = by_hand(net(), measured, way)
        mas = MAS(model, LAMBDA)
        mas.consolidate(measured if rank == 0 else [])
        clean = mas.state_dict()
        optimizer, _ = optimizer_of(model, mas, way)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        skipped = {1: "loss"} if proximal else {1: "loss", 3: "penalty"}
        for number in range(5):
            optimizer.zero_grad()
            is_infinite = skipped.get(number) == "loss" and rank == 0
            scaler.scale(loss(model, shares[rank]) * (torch.inf if is_infinite else 1.0)).backward()
            if skipped.get(number) == "penalty" and rank == size - 1:
                mas.importance["mix"].to_local()[0, 0] = torch.inf
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            mas.load_state_dict(clean)
            losses = [partial(lambda m, x: loss(m, x.double()), x=x) for x in shares]
            hand.step(losses, clip=0.05, proximal=proximal, skip=number in skipped)
        assert scaler.get_scale() == 64.0 / 2 ** len(skipped), way
        assert_same(parameters(model), hand.theta, 1e-5)
