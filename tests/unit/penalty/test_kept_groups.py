"""Groups that are kept from step to step: every change is seen in the next one."""

import copy

import pytest
import torch
from torch import nn

from mas_ext import MAS
from tests.support.regularizers import assert_bits, assert_states_equal, learned
from tests.support.zoo.small import mlp, vectors

X = vectors()


def freeze(model, mas):
    model[0].weight.requires_grad_(False)


def thaw(model, mas):
    model[0].weight.requires_grad_(True)


def replace_a_parameter(model, mas):
    model[2].weight = nn.Parameter(model[2].weight.detach() + 0.01)


def replace_a_module(model, mas):
    model[2] = copy.deepcopy(model[2])


def move_the_memory(model, mas):
    model[0].weight.data = model[0].weight.detach().clone()


def change_the_dtype(model, mas):
    model.float()


def grow(model, mas):
    weight = model[2].weight.detach()
    model[2] = nn.Linear(weight.shape[1], weight.shape[0] + 2).double()
    with torch.no_grad():
        model[2].weight[: len(weight)] = weight


def change_lambda(model, mas):
    mas.lambda_reg = {"0.*": 3.0, "*": 0.5}


def load(model, mas):
    _, other = learned(9.0)
    mas.load_state_dict(other.state_dict())


def end_a_task(model, mas):
    mas.consolidate([X.to(model[0].weight.dtype)])


def rename(model, mas):
    """The same parameter under another name is not the one that was measured."""
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())


CHANGES = (
    *(freeze, thaw, replace_a_parameter, replace_a_module, move_the_memory, change_the_dtype),
    *(grow, change_lambda, load, end_a_task, rename),
)


class Trained:
    """A model with a penalty, stepped in one of three ways."""

    def __init__(self, way):
        self.model, self.mas = learned()
        self.way = way

    def step(self):
        params = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(params, 0.1)
        handle = None if self.way == "called" else self.mas.attach(optimizer, self.way, every=1)
        self.model(X.to(params[0].dtype)).square().mean().backward()
        if handle is None:
            self.mas.add_penalty_grad_()
        optimizer.step()
        if handle is not None:
            handle.remove()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:parameter .* was measured")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("way", ["gradient", "proximal", "called"])
def test_a_change_is_seen_as_by_one_that_keeps_nothing(way, change):
    kept, forgetful = Trained(way), Trained(way)
    if change is thaw:
        for each in (kept, forgetful):
            freeze(each.model, each.mas)
    for changes in (None, change, None):
        for each in (kept, forgetful):
            if changes is not None:
                torch.manual_seed(0)
                changes(each.model, each.mas)
            if each is forgetful:
                each.mas.protected.forget_groups()
            each.step()
        assert_bits(kept.model, forgetful.model)
    assert_states_equal(kept.mas.state_dict(), forgetful.mas.state_dict())


def test_groups_are_kept_and_found_anew_only_after_a_change(monkeypatch):
    model, mas = learned()
    found = []
    find = mas.protected.find
    monkeypatch.setattr(mas.protected, "find", lambda *args: found.append(1) or find(*args))
    for _ in range(3):
        mas.proximal_step_(0.1)
    assert len(found) == 1
    model[0].weight.requires_grad_(False)
    for _ in range(3):
        mas.proximal_step_(0.1)
    assert len(found) == 2


def test_what_a_state_held_is_let_go_with_it():
    _, mas = learned()
    mas.proximal_step_(0.1)
    kept = mas.protected._kept._kept
    assert kept
    mas.load_state_dict(mas.state_dict())
    assert not mas.protected._kept._kept


def test_a_copy_keeps_nothing_of_the_original():
    model, mas = learned()
    mas.proximal_step_(0.1)
    again = copy.deepcopy(mas)
    before = copy.deepcopy(model)
    again.proximal_step_(0.5)
    assert_bits(model, before)


def test_many_optimizers_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("mas_ext._penalty.kept_groups._MOST", 3)
    model = mlp()
    mas = MAS(model)
    mas.consolidate([X])
    for p in model.parameters():
        mas.protected.proximal_step_(0.1, [p])
    assert len(mas.protected._kept._kept) <= 3
