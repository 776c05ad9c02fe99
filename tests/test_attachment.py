"""attach(optimizer) against the loop written by hand, bit for bit."""

import copy

import pytest
import torch
from torch import nn

from mas_ext import MAS
from tests.models import mlp, vectors

X = vectors(dtype=torch.float32)
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, foreach=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "groups": lambda p: torch.optim.SGD([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}], 0.01),
}


def learned(lambda_reg=5.0):
    model = mlp(torch.float32)
    mas = MAS(model, lambda_reg)
    mas.consolidate([X])
    return model, mas


def task_loss(model):
    return (model(X) - 3).pow(2).mean()


def train(model, optimizer, before_step, after_step, steps=6):
    for _ in range(steps):
        optimizer.zero_grad()
        task_loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before_step()
        optimizer.step()
        after_step()


def nothing():
    pass


def assert_bits(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def assert_moved(model):
    assert not torch.equal(model[0].weight, mlp(torch.float32)[0].weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradient_mode_is_the_loop_by_hand(name):
    by_hand, hand_mas = learned()
    optimizer = OPTIMIZERS[name](list(by_hand.parameters()))
    values = []
    train(by_hand, optimizer, lambda: values.append(hand_mas.add_penalty_grad_()), nothing)

    attached, mas = learned()
    optimizer = OPTIMIZERS[name](list(attached.parameters()))
    handle = mas.attach(optimizer)
    assert handle.last_penalty is None
    train(attached, optimizer, nothing, nothing)
    assert_bits(attached, by_hand)
    assert_moved(attached)
    assert handle.last_penalty == values[-1] > 0


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "groups"])
def test_proximal_mode_is_the_loop_by_hand(name):
    by_hand, hand_mas = learned(100.0)
    optimizer = OPTIMIZERS[name](list(by_hand.parameters()))
    lr = optimizer.param_groups[0]["lr"]
    values = []
    train(by_hand, optimizer, nothing, lambda: values.append(hand_mas.proximal_step_(lr)))

    attached, mas = learned(100.0)
    optimizer = OPTIMIZERS[name](list(attached.parameters()))
    handle = mas.attach(optimizer, mode="proximal")
    train(attached, optimizer, nothing, nothing)
    assert_bits(attached, by_hand)
    assert_moved(attached)
    assert handle.last_penalty == values[-1] > 0


def test_proximal_mode_uses_each_groups_learning_rate():
    model, mas = learned(100.0)
    optimizer = OPTIMIZERS["groups"](list(model.parameters()))
    mas.attach(optimizer, mode="proximal")
    train(model, optimizer, nothing, nothing, steps=1)

    expected, other = learned(100.0)
    optimizer = OPTIMIZERS["groups"](list(expected.parameters()))
    train(expected, optimizer, nothing, nothing, steps=1)
    rates = {"0.weight": 0.1, "0.bias": 0.1, "2.weight": 0.01, "2.bias": 0.01}
    for name, p in expected.named_parameters():
        c = rates[name] * 100.0 * other.importance[name]
        wanted = (p + c * other.anchor[name]) / (1 + c)
        torch.testing.assert_close(dict(model.named_parameters())[name], wanted)


def test_a_closure_that_is_called_many_times_gets_the_penalty_each_time():
    """LBFGS minimises loss + penalty: the same as with a closure that adds it itself."""
    results = []
    for attached in (True, False):
        model, mas = learned()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
        if attached:
            mas.attach(optimizer)

        def closure(model=model, mas=mas, optimizer=optimizer, attached=attached):
            optimizer.zero_grad()
            loss = task_loss(model)
            if not attached:
                loss = loss + mas.penalty()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        results.append(model)
    for p, q in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert_moved(results[0])


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_closure_given_to_a_first_order_optimizer(as_keyword):
    by_hand, hand_mas = learned()
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.05)
    train(by_hand, optimizer, hand_mas.add_penalty_grad_, nothing)

    model, mas = learned()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    mas.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = task_loss(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    for _ in range(6):
        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
    assert_bits(model, by_hand)
    assert loss > 0


def test_grad_scaler_gives_the_same_training():
    by_hand, hand_mas = learned()
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.05)
    for _ in range(4):
        optimizer.zero_grad()
        task_loss(by_hand).backward()
        hand_mas.add_penalty_grad_()
        optimizer.step()
    for fused in (False, True):
        model, mas = learned()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, fused=fused)
        mas.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(task_loss(model)).backward()
            scaler.step(optimizer)
            scaler.update()
        for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_only_the_optimizers_own_parameters_are_touched():
    model, mas = learned()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    head = torch.optim.SGD(model[2].parameters(), 0.1)
    mas.attach(head)
    task_loss(model).backward()
    before = [p.grad.clone() for p in model.parameters()]
    head.step()
    changed = [not torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)]
    assert changed == [False, False, True, True]


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_the_head_of_another_task_stays_where_the_optimizer_leaves_it(mode):
    model = nn.ModuleDict({"body": nn.Linear(6, 4), "old": nn.Linear(4, 2), "new": nn.Linear(4, 2)})
    mas = MAS(model, 5.0)
    mas.consolidate([X], forward=lambda m, x: m["old"](m["body"](x)))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
    mas.attach(optimizer, mode)
    old = [p.detach().clone() for p in model["old"].parameters()]
    for _ in range(5):
        optimizer.zero_grad()
        model["new"](model["body"](X)).pow(2).mean().backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model["old"].parameters(), old, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_step_that_the_grad_scaler_skips_moves_nothing(mode, fused):
    model, mas = learned(100.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, fused=fused)
    mas.attach(optimizer, mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(task_loss(model) * float("inf")).backward()
    scaler.step(optimizer)
    assert_bits(model, before)


def test_remove_restores_the_optimizer():
    plain = mlp(torch.float32)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05)
    train(plain, optimizer, nothing, nothing)
    for mode in ("gradient", "proximal"):
        model, mas = learned()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        handle = mas.attach(optimizer, mode)
        handle.remove()
        handle.remove()
        train(model, optimizer, nothing, nothing)
        assert_bits(model, plain)
        mas.attach(optimizer, mode).remove()


def test_before_the_first_task_training_is_untouched():
    plain = mlp(torch.float32)
    train(plain, torch.optim.Adam(plain.parameters(), 0.01), nothing, nothing)
    model = mlp(torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    MAS(model).attach(optimizer)
    train(model, optimizer, nothing, nothing)
    assert_bits(model, plain)


def test_bad_attachments_are_refused():
    model, mas = learned()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="mode: 'newton' is unknown"):
        mas.attach(optimizer, "newton")
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), 0.1)
    with pytest.raises(ValueError, match="holds none of this model's parameters"):
        mas.attach(other)
    climbing = torch.optim.SGD(model.parameters(), 0.1, maximize=True)
    with pytest.raises(ValueError, match="it maximizes"):
        mas.attach(climbing)
    mas.attach(optimizer)
    with pytest.raises(ValueError, match=r"attached already; remove\(\)"):
        mas.attach(optimizer, "proximal")
