"""Canonical names, selection, and noticing that a model has changed."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mas_ext._parameters import ParameterIndex, select
from tests.support.zoo.small import mlp


def names(model):
    return list(ParameterIndex(model).named())


def test_names_are_those_of_named_parameters():
    model = mlp()
    assert names(model) == [name for name, _ in model.named_parameters()]


def wrapped_inside():
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 4))
    return nn.DataParallel(torch.compile(model))


def test_wrappers_leave_no_trace_in_names():
    plain = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert names(torch.compile(mlp())) == plain
    assert names(nn.DataParallel(mlp())) == plain
    assert names(wrapped_inside()) == plain


def test_a_module_that_is_really_called_module_keeps_its_name():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert names(model) == ["module.weight", "module.bias"]


def test_tied_parameters_appear_once_under_their_first_name():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert names(model) == ["0.weight"]


def replace_parameter(model):
    model[2].weight = nn.Parameter(torch.zeros(4, 8))


def replace_module(model):
    model[2] = nn.Linear(8, 9)


def add_module(model):
    model.append(nn.Linear(4, 4))


def add_parameter(model):
    model[0].extra = nn.Parameter(torch.zeros(1))


def remove_module(model):
    del model[2]


@pytest.mark.parametrize(
    "change", [replace_parameter, replace_module, add_module, add_parameter, remove_module]
)
def test_changes_of_the_model_are_noticed(change):
    model = mlp()
    index = ParameterIndex(model)
    before = index.named()
    assert index.named() is before, "an unchanged model is not walked again"
    change(model)
    found = index.named()
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert all(found[name] is p for name, p in model.named_parameters())


def test_select_leaves_out_what_is_frozen():
    named = ParameterIndex(mlp()).named()
    named["0.weight"].requires_grad_(False)
    assert set(select(named, None)) == {"0.bias", "2.weight", "2.bias"}
    assert set(select(named, ["0.*"])) == {"0.bias"}
    assert set(select(named, lambda name, p: "weight" in name)) == {"2.weight"}
