"""attach(mode="proximal", every=k): one proximal step with the learning rates of k steps."""

import copy

import pytest
import torch

from mas_ext import MAS, DriftBudget
from mas_ext._penalty import attachment
from mas_ext._penalty.attachment import EVERY
from tests.support.hand_loop import Protection
from tests.support.regularizers import assert_bits, assert_states_equal, learned
from tests.support.zoo.small import mlp, vectors

X = vectors()


def groups_of(model):
    return [
        {"params": list(model[0].parameters()), "lr": 0.05},
        {"params": list(model[2].parameters()), "lr": 0.02},
    ]


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), 0.01),
    "groups": lambda model: torch.optim.SGD(groups_of(model), 0.05),
    "a learning rate in a tensor": lambda model: torch.optim.SGD(
        model.parameters(), torch.tensor(0.05, dtype=torch.float64)
    ),
}


def schedule_of(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)


def step(model, optimizer, schedule=None):
    optimizer.zero_grad()
    (model(X) - 3).pow(2).mean().backward()
    optimizer.step()
    if schedule is not None:
        schedule.step()


class ByHand:
    """The same training, with proximal steps from the equation."""

    def __init__(self, model, mas, optimizer):
        self.model, self.optimizer = model, optimizer
        self.protection = Protection.of(mas)
        self.schedule = schedule_of(optimizer)
        self.rates = {}

    def step(self):
        group_of = {id(p): g for g in self.optimizer.param_groups for p in g["params"]}
        for name, p in self.model.named_parameters():
            lr = float(group_of[id(p)]["lr"])
            self.rates[name] = self.rates.get(name, 0.0) + lr
        step(self.model, self.optimizer, self.schedule)

    @torch.no_grad()
    def follow(self):
        for name, p in self.model.named_parameters():
            p.copy_(self.protection.proximal(name, p, self.rates.pop(name, 0.0)))

    @property
    def penalty(self):
        return self.protection.penalty(dict(self.model.named_parameters()))


def both(kind, every):
    model, mas = learned()
    plain = copy.deepcopy(model)
    optimizer = OPTIMIZERS[kind](model)
    handle = mas.attach(optimizer, "proximal", every)
    return model, mas, optimizer, handle, ByHand(plain, mas, OPTIMIZERS[kind](plain))


def assert_same(model, plain):
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()))


@pytest.mark.parametrize("every", [1, 2, 5, None])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_k_steps_theta_is_pulled_by_the_sum_of_their_rates(kind, every):
    model, _, optimizer, handle, hand = both(kind, every)
    schedule = schedule_of(optimizer)
    for number in range(1, 11):
        step(model, optimizer, schedule)
        hand.step()
        if number % (every or 1) == 0:
            hand.follow()
            assert handle.last_penalty.item() == pytest.approx(hand.penalty)
        assert_same(model, hand.model)
    handle.remove()
    hand.follow()
    assert_same(model, hand.model)


def test_under_a_budget_ten_steps_by_default_and_before_each_measurement():
    model = mlp()
    mas = MAS(model, budget=DriftBudget(1e9, every=EVERY + 3))
    mas.consolidate([X])
    optimizer = OPTIMIZERS["SGD"](model)
    handle, pulled = mas.attach(optimizer, "proximal"), []
    for number in range(1, 60):
        before = handle.last_penalty
        step(model, optimizer)
        if handle.last_penalty is not before:
            pulled.append(number)
    measured = [record.step for record in mas.drift_trace]
    assert measured == [1, 2, 4, 8, 16, 29, 42, 55]
    assert pulled == [1, 2, 4, 8, 16, 26, 29, 39, 42, 52, 55]


def lower_lambda(mas, handle):
    mas.lambda_reg = 0.1


FOLLOWS = {
    "remove": lambda mas, handle: handle.remove(),
    "consolidate": lambda mas, handle: mas.consolidate([X]),
    "update_importance": lambda mas, handle: mas.update_importance([X]),
    "another lambda": lower_lambda,
}


@pytest.mark.parametrize("what", FOLLOWS)
def test_pending_steps_are_followed_before(what):
    model, mas, optimizer, handle, hand = both("groups", 100)
    schedule = schedule_of(optimizer)
    for _ in range(3):
        step(model, optimizer, schedule)
        hand.step()
    assert_same(model, hand.model)
    FOLLOWS[what](mas, handle)
    hand.follow()
    assert_same(model, hand.model)
    FOLLOWS[what](mas, handle)  # and only once
    assert_same(model, hand.model)


def test_an_optimizer_that_comes_later_has_steps_of_its_own():
    model, mas = learned()
    plain, by_hand = learned()
    mas.attach(mode="proximal", every=2)
    for lr in (0.05, 0.02):
        optimizers = [torch.optim.SGD(m.parameters(), lr) for m in (model, plain)]
        for number in range(1, 4):
            for m, optimizer in zip((model, plain), optimizers, strict=True):
                step(m, optimizer)
            if number == 2:
                by_hand.proximal_step_(2 * lr)
    by_hand.proximal_step_(0.05)
    by_hand.proximal_step_(0.02)
    mas.protected.follow_steps()
    assert_same(model, plain)


def saved_to_a_file(mas, path):
    mas.save(path / "mas")
    return lambda other: other.load(path / "mas")


def saved_as_a_dictionary(mas, path):
    state = mas.state_dict()
    return lambda other: other.load_state_dict(state)


@pytest.mark.parametrize("save", [saved_to_a_file, saved_as_a_dictionary])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_training_that_is_resumed_goes_on_to_the_same_bits(kind, save, tmp_path):
    model, mas = learned()
    optimizer = OPTIMIZERS[kind](model)
    mas.attach(optimizer, "proximal", 3)
    for _ in range(5):
        step(model, optimizer)
    load = save(mas, tmp_path)
    again = mlp()
    again.load_state_dict(model.state_dict())
    resumed = OPTIMIZERS[kind](again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other = MAS(again)
    other.attach(resumed, "proximal", 3)
    load(other)
    assert_states_equal(other.state_dict(), mas.state_dict())
    for _ in range(5):
        step(model, optimizer)
        step(again, resumed)
    assert_bits(again, model)
    for each in (mas, other):
        each.protected.follow_steps()
    assert_bits(again, model)


def test_what_a_loaded_state_has_pending_does_not_go_into_a_graph(monkeypatch):
    model, mas = learned()
    optimizer = OPTIMIZERS["SGD"](model)
    mas.attach(optimizer, "proximal", 10)
    for _ in range(3):
        step(model, optimizer)
    mas.load_state_dict(mas.state_dict())
    pending = mas.state_dict()
    monkeypatch.setattr(attachment, "_counts_once", lambda: True)
    step(model, optimizer)
    assert_states_equal(mas.state_dict(), pending)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_task_can_end_where_no_optimizer_comes_after_loading(kind):
    model, mas = learned()
    optimizer = OPTIMIZERS[kind](model)
    mas.attach(optimizer, "proximal", 3)
    for _ in range(5):
        step(model, optimizer)
    again = copy.deepcopy(model)
    other = MAS(again)
    other.load_state_dict(mas.state_dict())
    for each in (mas, other):
        each.consolidate([X])
    assert_bits(again, model)
    assert_states_equal(other.state_dict(), mas.state_dict())


def test_that_needs_one_learning_rate():
    model, mas = learned()
    optimizer = OPTIMIZERS["groups"](model)
    mas.attach(optimizer, "proximal", 3)
    step(model, optimizer)
    again = copy.deepcopy(model)
    other = MAS(again)
    other.load_state_dict(mas.state_dict())
    with pytest.warns(UserWarning, match="pending"):
        other.consolidate([X])
    assert_bits(again, model)


def test_loading_another_state_drops_what_was_pending_under_the_old_one():
    model, mas = learned()
    clean = mas.state_dict()
    optimizer = OPTIMIZERS["SGD"](model)
    mas.attach(optimizer, "proximal", 3)
    step(model, optimizer)
    before = copy.deepcopy(model)
    mas.load_state_dict(clean)
    mas.protected.follow_steps()
    assert_bits(model, before)


def test_steps_before_the_first_task_ended_are_not_counted():
    model = mlp()
    mas, optimizer = MAS(model, 5.0), OPTIMIZERS["SGD"](model)
    mas.attach(optimizer, "proximal", 100)
    step(model, optimizer)
    mas.consolidate([X])
    before = copy.deepcopy(model)
    mas.protected.follow_steps()
    assert_bits(model, before)


def test_a_step_in_a_graph_is_followed_by_itself(monkeypatch):
    """Steps that were pending when it was captured are not followed in each replay."""
    model, mas, optimizer, handle, hand = both("SGD", 10)
    schedule = schedule_of(optimizer)
    for _ in range(3):
        step(model, optimizer, schedule)
        hand.step()
    before = hand.rates
    monkeypatch.setattr(attachment, "_counts_once", lambda: True)
    for _ in range(2):
        step(model, optimizer, schedule)
        hand.rates = {}
        hand.step()
        hand.follow()
        assert handle.last_penalty.item() == pytest.approx(hand.penalty)
        assert_same(model, hand.model)
    hand.rates = before
    hand.follow()
    mas.protected.follow_steps()
    assert_same(model, hand.model)
