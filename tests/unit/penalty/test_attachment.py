"""attach(optimizer): whose parameters it touches, what it leaves behind, what it refuses.

That training is right is in ``tests/integration/test_loops.py``.
"""

import copy
import gc
import weakref

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

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


def without_lr(model):
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = None  # Adafactor has none
    return optimizer


def maximizing_later(model, mas):
    optimizer = sgd(model[0])
    mas.attach(optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters()), "maximize": True})
    optimizer.step()


def attached_after_one(model, mas):
    optimizer = sgd(model)
    mas.attach(optimizer)
    mas.attach()


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
    "no optimizer": refusal(
        lambda model, mas: mas.attach(object()), TypeError, "optimizer", "add_penalty_grad_()"
    ),
    "sparse only": refusal(
        lambda model, mas: mas.attach(torch.optim.SparseAdam(list(model.parameters()))),
        *(ValueError, "SparseAdam", "proximal"),
    ),
    "everywhere, and once more": refusal(
        lambda model, mas: (mas.attach(), mas.attach(sgd(model))), ValueError, "remove()"
    ),
    "everywhere, after one": refusal(attached_after_one, ValueError, "attached", "remove()"),
    "no learning rate": refusal(
        lambda model, mas: mas.attach(without_lr(model), "proximal"),
        *(ValueError, "learning rate", "gradient"),
    ),
    "a group that maximizes, later": refusal(maximizing_later, ValueError, "maximize"),
    "twice": refusal(attached_twice, ValueError, "attached", "remove()"),
    "every=0": refusal(
        lambda model, mas: mas.attach(sgd(model), "proximal", 0), ValueError, "every", "positive"
    ),
    "the gradient of several steps": refusal(
        lambda model, mas: mas.attach(sgd(model), every=2), ValueError, "every", "proximal"
    ),
    "in the step already": refusal(attached_to_ours, ValueError, "twice", "attach()"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    model, mas = learned(dtype=torch.float32)
    assert_refused(REFUSALS[case], model, mas, unchanged=(model, mas))


# -- optimizers that come and go, and that wrap others ---------------------------------------------
def twin():
    """A model with a task behind it, and its copy that nothing is attached to."""
    (model, mas), (plain, by_hand) = learned(dtype=torch.float32), learned(dtype=torch.float32)
    return model, mas, plain, by_hand


def train_by_hand(model, mas, optimizer, mode, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        task_loss(model).backward()
        if mode == "gradient":
            mas.add_penalty_grad_()
        optimizer.step()
        if mode == "proximal":
            mas.proximal_step_(optimizer.param_groups[0]["lr"])


@pytest.mark.filterwarnings("error::UserWarning:tests")
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_attach_without_an_optimizer_holds_for_all_that_come(mode):
    model, mas, plain, by_hand = twin()
    handle = mas.attach(mode=mode, every=1)
    other = mlp(torch.float32)
    untouched = copy.deepcopy(other)
    for lr in (0.05, 0.02):
        train(model, torch.optim.SGD(model.parameters(), lr))
        train_by_hand(plain, by_hand, torch.optim.SGD(plain.parameters(), lr), mode)
        assert_bits(model, plain)
        for m in (mas, by_hand):
            m.consolidate([X])
    assert handle.last_penalty > 0
    train(other, sgd(other))
    train(untouched, sgd(untouched))
    assert_bits(other, untouched)
    ours = mas_ext.optim.SGD(model.parameters(), 0.05, mas=mas, mode=mode)
    train(model, ours)  # includes the penalty itself, and only once
    train(plain, mas_ext.optim.SGD(plain.parameters(), 0.05, mas=by_hand, mode=mode))
    assert_bits(model, plain)
    handle.remove()
    plain.load_state_dict(model.state_dict())
    train(model, sgd(model))
    train(plain, sgd(plain))
    assert_bits(model, plain)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_attach_without_an_optimizer_ends_with_the_mas_and_keeps_nothing_alive(mode):
    """At once, and not when Python happens to look for cycles."""
    plain, (model, mas) = mlp(torch.float32), learned(dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    hooks = _global_optimizer_pre_hooks, _global_optimizer_post_hooks
    gc.collect()
    before = [set(each) for each in hooks]
    gc.disable()
    try:
        handle = mas.attach(mode=mode)
        assert [set(each) for each in hooks] != before
        gone = weakref.ref(mas.protected)
        del mas
        assert gone() is None
        assert [set(each) for each in hooks] == before
        train(model, sgd(model))
        train(plain, sgd(plain))
        assert_bits(model, plain)
        handle.remove()
    finally:
        gc.enable()


class Calls(torch.optim.SGD):
    """Its step is torch's, through super(): torch then calls the hooks of both."""

    def step(self, closure=None):
        return super().step(closure)


class DecaysAfterwards(torch.optim.SGD):
    """Its step goes on after torch's, where there are gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.mul_(0.9)


@pytest.mark.parametrize("everywhere", [False, True], ids=["attached", "everywhere"])
def test_a_step_that_a_scaler_skips_is_skipped_to_its_end(everywhere):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)  # torch puts hooks into its step
    model, mas = learned(1e38, dtype=torch.float32)
    with torch.no_grad():
        model[0].weight.add_(1e4)  # the penalty's gradient overflows
    optimizer, before = DecaysAfterwards(model.parameters(), 0.05), copy.deepcopy(model)
    mas.attach(None if everywhere else optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scale = scaler.get_scale()
    scaler.scale(task_loss(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < scale
    assert_bits(model, before)
    assert all(p.grad is not None for p in model.parameters())


WRAPPERS = {
    "SAM": lambda params: pytorch_optimizer.SAM(params, torch.optim.SGD, lr=0.05),
    "Lookahead": lambda params: pytorch_optimizer.Lookahead(torch.optim.SGD(params, 0.05), k=2),
    "schedule-free": lambda params: pytorch_optimizer.ScheduleFreeWrapper(
        torch.optim.SGD(params, 0.05), momentum=0.5
    ),
    "super().step()": lambda params: Calls(params, 0.05),
}


def wrapped_step(optimizer, model, extra=lambda: None):
    """One step; ``extra`` adds the penalty's gradient just before the inner optimizer's."""
    inner = getattr(optimizer, "base_optimizer", getattr(optimizer, "optimizer", optimizer))
    inner_step = inner.step
    optimizer.zero_grad()
    task_loss(model).backward()
    if hasattr(optimizer, "first_step"):
        optimizer.first_step(zero_grad=True)
        task_loss(model).backward()
    inner.step = lambda *args: (extra(), inner_step(*args))[1]
    optimizer.second_step() if hasattr(optimizer, "second_step") else optimizer.step()
    inner.step = inner_step


@pytest.mark.filterwarnings("error::UserWarning:tests")
@pytest.mark.parametrize("everywhere", [False, True], ids=["attached", "everywhere"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_optimizers_inside_others_take_the_penalty_once(kind, everywhere):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)  # torch puts hooks into its step
    model, mas, plain, by_hand = twin()
    optimizer = WRAPPERS[kind](list(model.parameters()))
    mas.attach(None if everywhere else optimizer)
    other = WRAPPERS[kind](list(plain.parameters()))
    for one in (optimizer, other):
        getattr(one, "train", lambda: None)()
    for _ in range(4):
        wrapped_step(optimizer, model)
        wrapped_step(other, plain, by_hand.add_penalty_grad_)
        assert_bits(model, plain)
    mas.consolidate([X])


class WithAuxiliary(torch.optim.Optimizer):
    """Steps its own parameters, and those of another optimizer that it holds."""

    def __init__(self, params, others):
        super().__init__(params, {"lr": 0.05})
        self.auxiliary = torch.optim.SGD(others, 0.05)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])
        self.auxiliary.step()


def test_an_optimizer_that_holds_one_of_other_parameters_is_no_wrapper():
    model, mas, plain, by_hand = twin()
    mas.attach()
    optimizer = WithAuxiliary(list(model[0].parameters()), list(model[2].parameters()))
    for _ in range(3):
        for p in model.parameters():
            p.grad = None
        task_loss(model).backward()
        optimizer.step()
    train_by_hand(plain, by_hand, sgd(plain), "gradient")
    assert_bits(model, plain)


def test_optimizers_that_know_each_other_end_the_search():
    model, mas = learned(dtype=torch.float32)
    inner, outer = sgd(model), sgd(model)
    inner.outer, outer.inner = outer, inner
    mas.attach(outer)


def test_an_optimizer_of_unprotected_parameters_may_maximize():
    model = mlp(torch.float32)
    mas = MAS(model, params="0.*")
    mas.consolidate([X])
    mas.attach()
    train(model, torch.optim.SGD(model[2].parameters(), 0.01, maximize=True))


# -- attachments that never act --------------------------------------------------------------------
def a_new_optimizer(model, mas):
    mas.attach(sgd(model))
    return model, mas, sgd(model)


def a_copy(model, mas):
    mas.attach(sgd(model))
    model, mas = copy.deepcopy((model, mas))
    return model, mas, sgd(model)


def another_group(model, mas):
    mas.attach(sgd(model[2]))
    return model, mas, sgd(model[0])


def another_task(model, mas):
    """It acted in the task before."""
    optimizer = sgd(model)
    mas.attach(optimizer)
    train(model, optimizer)
    mas.consolidate([X])
    return model, mas, sgd(model)


IDLE = {
    "another task": another_task,
    "a new optimizer": a_new_optimizer,
    "a copy": a_copy,
    "another's parameters": another_group,
}


@pytest.mark.parametrize("case", IDLE)
def test_an_attachment_that_never_acts_is_reported_when_the_task_ends(case):
    model, mas, optimizer = IDLE[case](*learned(dtype=torch.float32))
    train(model, optimizer)
    tasks = mas.num_tasks
    with pytest.warns(UserWarning, match=r"attach\(\).*without an optimizer"):
        mas.consolidate([X])
    assert mas.num_tasks == tasks + 1


def acts(model, mas):
    optimizer = sgd(model)
    mas.attach(optimizer)
    train(model, optimizer)


def acts_by_hand(model, mas):
    mas.attach(sgd(model))
    train_by_hand(model, mas, sgd(model), "gradient")


def is_removed(model, mas):
    mas.attach(sgd(model)).remove()
    train(model, sgd(model))


def does_not_move(model, mas):
    mas.consolidate([X])
    mas.attach(sgd(model))


def was_loaded(model, mas):
    """It may have acted before the state was saved."""
    mas.attach(sgd(model))
    train(model, sgd(model))
    mas.load_state_dict(mas.state_dict())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", [acts, acts_by_hand, is_removed, does_not_move, was_loaded])
def test_nothing_is_reported_where_nothing_is_amiss(case):
    model, mas = learned(dtype=torch.float32)
    case(model, mas)
    mas.consolidate([X])


class WithArguments(torch.optim.Optimizer):
    """Its step takes more than a closure."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None, scale=1.0):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p -= scale * p.grad
        return loss


@pytest.mark.parametrize("arguments", [(), (0.1,), {"scale": 0.1}])
def test_other_arguments_of_step_arrive(arguments):
    positional, keywords = ((), arguments) if isinstance(arguments, dict) else (arguments, {})
    model, mas, plain, by_hand = twin()
    optimizer, other = WithArguments(model.parameters()), WithArguments(plain.parameters())
    mas.attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = task_loss(model)
        loss.backward()
        return loss

    def closure_by_hand():
        other.zero_grad()
        loss = task_loss(plain)
        loss.backward()
        return loss.detach() + by_hand.add_penalty_grad_()

    loss = optimizer.step(closure, *positional, **keywords)
    assert loss == other.step(closure_by_hand, *positional, **keywords)
    assert_bits(model, plain)
