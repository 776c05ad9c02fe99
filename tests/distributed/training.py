"""Training with the penalty, as each program does it and as written by hand on the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import mas_ext
from mas_ext import MAS
from tests.distributed.models import alone, assert_same, parameters, samples

LAMBDA, RATE, STEPS = 3.0, 0.05, 3
Loss = Callable[[nn.Module, Tensor], Tensor]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Something to learn that is not what was measured."""
    return (model(x) - 1).square().mean()


def _adamw(params: Any, **more: Any) -> Optimizer:
    return AdamW(params, lr=RATE, **more)


def _sgd(params: Any, **more: Any) -> Optimizer:
    return SGD(params, lr=RATE, momentum=0.9, **more)


# Way → (the optimizer, whether the step is the proximal one).
WAYS: dict[str, tuple[Callable[..., Optimizer], bool]] = {
    "in the loss": (_sgd, False),
    "added to the gradients": (_adamw, False),
    "attached": (_adamw, False),
    "attached, proximal": (_sgd, True),
    "proximal by hand": (_adamw, True),
    "fused SGD": (_sgd, False),
    "fused AdamW": (_adamw, False),
    "fused AdamW, proximal": (_adamw, True),
}


def by_hand(
    model: nn.Module,
    way: str,
    batches: list[Tensor],
    omega: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
) -> list[float]:
    """Trains a whole model on the mean of the ranks' losses; returns the penalties it saw."""
    make, proximal = WAYS[way]
    named = dict(model.named_parameters())
    optimizer = make(named.values())

    def penalty() -> Tensor:
        terms = [(omega[n] * (p - anchor[n]) ** 2).sum() for n, p in named.items()]
        return LAMBDA / 2 * torch.stack(terms).sum()

    seen = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = torch.stack([loss(model, x) for x in batches]).mean()
        (total if proximal else total + penalty()).backward()
        if not proximal:
            seen.append(penalty().item())
        optimizer.step()
        if proximal:
            with torch.no_grad():
                for name, p in named.items():
                    strength = RATE * LAMBDA * omega[name]
                    p.copy_((p + strength * anchor[name]) / (1 + strength))
            seen.append(penalty().item())
    return seen


def with_mas(model: nn.Module, mas: MAS, way: str, x: Tensor) -> list[float]:
    """The same with the package, on this rank's batch."""
    make, proximal = WAYS[way]
    if way.startswith("fused"):
        fused = mas_ext.optim.SGD if "SGD" in way else mas_ext.optim.AdamW
        more = {"momentum": 0.9} if "SGD" in way else {}
        mode = "proximal" if proximal else "gradient"
        optimizer = fused(model.parameters(), lr=RATE, mas=mas, mode=mode, **more)
    else:
        optimizer = make(model.parameters())
    handle = None
    if way.startswith("attached"):
        handle = mas.attach(optimizer, mode="proximal" if proximal else "gradient")
    seen = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = loss(model, x)
        if way == "in the loss":
            value = mas.penalty()
            total = total + value
        total.backward()
        if way == "added to the gradients":
            value = mas.add_penalty_grad_()
        optimizer.step()
        if way == "proximal by hand":
            value = mas.proximal_step_(RATE)
        if handle is not None:
            value = handle.last_penalty
        if way.startswith("fused"):
            value = optimizer.last_penalty
        assert type(value.detach()) is Tensor
        assert value.dim() == 0
        seen.append(value.item())
    return seen


def check_every_way(
    prepared: Callable[[nn.Module], nn.Module], fresh: Callable[[], nn.Module], rank: int, size: int
) -> None:
    """All ways of training, in float64, against the loop by hand.

    Args:
        prepared: shards or wraps a model, maybe in place.
        fresh: makes one; always the same.
        rank: of the data ranks, of which there are ``size``.
    """
    shares = list(samples(3 * size, torch.float64, seed=5).split(3))
    measured = list(samples(4 * size, torch.float64).split(4))
    for way in WAYS:
        reference = MAS(plain := fresh(), LAMBDA, process_group=alone())
        reference.consolidate(measured)
        omega = {n: o.clone() for n, o in reference.importance.items()}
        anchor = {n: a.clone() for n, a in reference.anchor.items()}
        expected = by_hand(plain, way, shares, omega, anchor)
        model = prepared(fresh())
        mas = MAS(model, LAMBDA)
        mas.consolidate([measured[rank]])
        seen = with_mas(model, mas, way, shares[rank])
        try:
            torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-12)
            assert_same(parameters(model), parameters(plain), 1e-9)
        except AssertionError as problem:
            raise AssertionError(f"{way}: {problem}") from None
