"""torch.compile around a step, or a part of it: the loop by hand in float64, compiled once."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

import mas_ext
from mas_ext import MAS
from tests.hand_loop import Memory, Sgd, assert_trained, by_hand
from tests.models import mlp, vectors

X = vectors()
STRENGTHS = [5.0, 2.0, 9.0, 0.0, 7.0]


# Dynamo does the same for every backend, and inductor takes long.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiles_nothing() -> AbstractContextManager:
    """An error where something is compiled again. (A first time it may be.)"""
    return torch.compiler.set_stance("fail_on_recompile")


def learned() -> tuple[nn.Module, MAS]:
    model = mlp()
    mas = MAS(model)
    mas.consolidate([X])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    return model, mas


def task_loss(model: nn.Module) -> Tensor:
    return (model(X) - 1).pow(2).mean()


def expected_of(model: nn.Module, mas: MAS, strengths=STRENGTHS, **how) -> dict[str, Tensor]:
    """A step with each of these λ in turn."""
    rule, theta, hand = Sgd(0.05, 0.9), None, copy.deepcopy(model)
    for strength in strengths:
        memory = Memory.of(mas)._replace(strength=strength)
        theta = by_hand(hand, memory, rule, [[task_loss]], **how)
        hand.load_state_dict(theta, strict=False)
    return theta


# ================================================================================================
# Ways to write a compiled step; each returns a function that takes one
# ================================================================================================
def penalty_in_the_loss(model, mas, optimizer, backend):
    loss = torch.compile(lambda: task_loss(model) + mas.penalty(), backend=backend, fullgraph=True)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def gradient_by_hand(model, mas, optimizer, backend):
    add = torch.compile(lambda: mas.add_penalty_grad_(), backend=backend, fullgraph=True)

    def step():
        optimizer.zero_grad()
        task_loss(model).backward()
        add()
        optimizer.step()

    return step


def attached(model, mas, optimizer, backend):
    """In a compiled step of the optimizer's, which torch itself breaks in two."""
    mas.attach(optimizer)
    take = torch.compile(optimizer.step, backend=backend)

    def step():
        optimizer.zero_grad()
        task_loss(model).backward()
        take()

    return step


def all_of_it(model, mas, optimizer, backend):
    mas.attach(optimizer)

    @torch.compile(backend=backend)
    def step():
        optimizer.zero_grad()
        task_loss(model).backward()
        optimizer.step()

    return step


def beside_a_compiled_model(model, mas, optimizer, backend):
    mas.attach(optimizer)
    model.compile(backend=backend)

    def step():
        optimizer.zero_grad()
        task_loss(model).backward()
        optimizer.step()

    return step


WAYS = [penalty_in_the_loss, gradient_by_hand, attached, all_of_it, beside_a_compiled_model]


def train(mas: MAS, step) -> None:
    """The second step may compile: it finds a momentum, and gradients, where there were none."""
    for number, strength in enumerate(STRENGTHS):
        mas.lambda_reg = strength
        with compiles_nothing() if number > 1 else nullcontext():
            step()


def assert_is_the_loop_by_hand(way, backend) -> None:
    model, mas = learned()
    start, expected = copy.deepcopy(model), expected_of(model, mas)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    train(mas, way(model, mas, optimizer, backend))
    assert_trained(model, expected, start, 1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_step_is_the_loop_by_hand_and_a_new_strength_compiles_nothing(way):
    assert_is_the_loop_by_hand(way, BACKEND)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_same_with_inductor(way):
    assert_is_the_loop_by_hand(way, "inductor")


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_an_optimizer_of_ours_is_compiled_whole(mode):
    model, mas = learned()
    start, expected = copy.deepcopy(model), expected_of(model, mas, proximal=mode == "proximal")
    optimizer = mas_ext.optim.SGD(model.parameters(), 0.05, momentum=0.9, mas=mas, mode=mode)
    take = torch.compile(optimizer.step, backend=BACKEND, fullgraph=True)

    def step():
        optimizer.zero_grad()
        task_loss(model).backward()
        take()

    train(mas, step)
    assert_trained(model, expected, start, 1e-10)


def test_a_compiled_proximal_step():
    model, mas = learned()
    start, expected = copy.deepcopy(model), expected_of(model, mas, proximal=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pull = torch.compile(mas.proximal_step_, backend=BACKEND, fullgraph=True)

    def step():
        optimizer.zero_grad()
        task_loss(model).backward()
        optimizer.step()
        pull(0.05)

    train(mas, step)
    assert_trained(model, expected, start, 1e-10)


def test_the_next_task_compiles_nothing():
    """Neither a new Ω nor a new θ*."""
    model, mas = learned()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    step = penalty_in_the_loss(model, mas, optimizer, BACKEND)
    step()
    mas.consolidate([X])
    start = copy.deepcopy(model)
    expected = by_hand(model, Memory.of(mas), Sgd(0.05), [[task_loss]] * 3)
    with compiles_nothing():
        for _ in range(3):
            step()
    assert_trained(model, expected, start, 1e-10)


@pytest.mark.parametrize("function", ["penalty", "proximal_step_"])
def test_a_number_that_changes_is_taken_in_a_whole_graph(function):
    """It becomes symbolic at the second, and checks must hold for that."""
    model, mas = learned()
    kept = list(mas.anchor.values()), list(mas.importance.values())
    more = (0.1,) if function == "proximal_step_" else ()

    def call(strength):
        params = [p.detach().clone() for p in model.parameters()]
        return getattr(mas_ext.functional, function)(params, *kept, strength, *more)

    compiled = torch.compile(call, backend=BACKEND, fullgraph=True)
    for strength in STRENGTHS:
        torch.testing.assert_close(compiled(strength), call(strength))


def test_a_compiled_model_is_measured_and_held_under_its_own_names():
    model = mlp()
    plain = MAS(copy.deepcopy(model))
    plain.consolidate([X])
    mas = MAS(torch.compile(model, backend=BACKEND))
    mas.consolidate([X])
    assert set(mas.importance) == set(plain.importance)
    for name, omega in plain.importance.items():
        torch.testing.assert_close(mas.importance[name], omega)
