"""attach(optimizer): whose parameters it touches, what it leaves behind, what it refuses.

That training is right is in ``tests/integration/test_loops.py``.
"""

import copy

import pytest
import torch
from torch import nn

import mas_ext
from mas_ext import MAS
from tests.support.regularizers import (
    assert_bits,
    assert_refused,
    gradients,
    learned,
    refusal,
)
from tests.support.zoo.small import mlp, vectors

X = vectors(dtype=torch.float32)


def task_loss(model):
    return (model(X) - 3).pow(2).mean()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), 0.05, **options)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        task_loss(model).backward()
        optimizer.step()


def test_only_the_optimizers_own_parameters_are_touched():
    model, mas = learned(dtype=torch.float32)
    head = torch.optim.SGD(model[2].parameters(), 0.1)
    mas.attach(head)
    task_loss(model).backward()
    before = gradients(model)
    head.step()
    changed = [not torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)]
    assert changed == [False, False, True, True]


@pytest.mark.parametrize("kind", ["attached", "momentum", "AdamW"])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_the_head_of_another_task_stays_until_it_has_a_gradient(mode, kind):
    """Weight decay and momentum would move it, if it were given a gradient of zero."""
    model = nn.ModuleDict({"body": nn.Linear(6, 4), "old": nn.Linear(4, 2), "new": nn.Linear(4, 2)})
    mas = MAS(model, 5.0)
    mas.consolidate([X], forward=lambda m, x: m["old"](m["body"](x)))
    if kind == "attached":
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
        mas.attach(optimizer, mode)
    else:
        with torch.no_grad():
            model["old"].weight.add_(0.1)
        name, more = ("SGD", {"momentum": 0.9}) if kind == "momentum" else (kind, {})
        fused = getattr(mas_ext.optim, name)
        optimizer = fused(model.parameters(), 0.1, mas=mas, mode=mode, weight_decay=0.5, **more)
    old = copy.deepcopy(model["old"])
    for _ in range(3):
        optimizer.zero_grad()
        model["new"](model["body"](X)).pow(2).mean().backward()
        optimizer.step()
    assert_bits(model["old"], old)
    assert all(p not in optimizer.state for p in model["old"].parameters())
    model["old"](model["body"](X)).pow(2).mean().backward()
    optimizer.step()
    assert not torch.equal(model["old"].weight, old.weight)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_remove_restores_the_optimizer(mode):
    plain, _ = learned(dtype=torch.float32)
    train(plain, sgd(plain))
    model, mas = learned(dtype=torch.float32)
    optimizer = sgd(model)
    handle = mas.attach(optimizer, mode)
    assert handle.last_penalty is None
    handle.remove()
    handle.remove()
    train(model, optimizer)
    assert_bits(model, plain)
    mas.attach(optimizer, mode).remove()


def test_before_the_first_task_training_is_untouched():
    plain, model = mlp(torch.float32), mlp(torch.float32)
    train(plain, torch.optim.Adam(plain.parameters(), 0.01))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    MAS(model).attach(optimizer)
    train(model, optimizer)
    assert_bits(model, plain)


def attached_twice(model, mas):
    optimizer = sgd(model)
    mas.attach(optimizer)
    mas.attach(optimizer, "proximal")


def attached_to_ours(model, mas):
    optimizer = mas_ext.optim.SGD(model.parameters(), mas=mas)
    MAS(model).attach(optimizer)  # another one may be
    mas.attach(optimizer)


REFUSALS = {
    "mode": refusal(
        lambda model, mas: mas.attach(sgd(model), "newton"), ValueError, "mode", "newton"
    ),
    "another model's": refusal(
        lambda model, mas: mas.attach(sgd(copy.deepcopy(model))), ValueError, "optimizer", "none"
    ),
    "maximizes": refusal(
        lambda model, mas: mas.attach(sgd(model, maximize=True)), ValueError, "maximize", "negative"
    ),
    "twice": refusal(attached_twice, ValueError, "attached", "remove()"),
    "in the step already": refusal(attached_to_ours, ValueError, "twice", "attach()"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    model, mas = learned(dtype=torch.float32)
    assert_refused(REFUSALS[case], model, mas, unchanged=(model, mas))
