"""λ as one number, and as a mapping from name or glob to number."""

import math

import pytest
import torch
from torch import nn

from mas_ext import MAS
from tests.support.regularizers import (
    assert_refused,
    assert_states_equal,
    gradients,
    learned,
    penalty_by_hand,
    refusal,
    train,
)
from tests.support.zoo.small import mlp, vectors

X = vectors()
GROUPS = {"0.weight": 0.5, "0.*": 3.0, "*": 0.0}
# By parameter: the first that matches counts.
BY_NAME = {"0.weight": 0.5, "0.bias": 3.0, "2.weight": 0.0, "2.bias": 0.0}


def test_penalty_and_gradient_are_those_of_the_sum_over_groups():
    model, mas = learned(GROUPS)
    params = list(model.parameters())
    expected = penalty_by_hand(mas, model, BY_NAME.__getitem__)
    wanted = list(torch.autograd.grad(expected, params))
    penalty = mas.penalty()
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(list(torch.autograd.grad(penalty, params)), wanted)
    torch.testing.assert_close(mas.add_penalty_grad_(), expected.detach())
    torch.testing.assert_close(gradients(model), wanted)


def test_a_proximal_step_pulls_each_group_by_its_own():
    model, mas = learned(GROUPS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mas.proximal_step_(0.1)
    for name, p in model.named_parameters():
        c = 0.1 * BY_NAME[name] * mas.importance[name]
        expected = (before[name] + c * mas.anchor[name]) / (1 + c)
        torch.testing.assert_close(p.detach(), expected)
    assert torch.equal(model[2].weight, before["2.weight"])


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_fused_optimizers_do_what_attach_does(kind, mode):
    ends = []
    for is_ours in (False, True):
        model, mas = learned(GROUPS)
        last = train(model, mas, kind, mode, is_ours)
        ends.append([*model.parameters(), last])
    torch.testing.assert_close(*ends)


def test_lambda_survives_a_file(tmp_path):
    model, mas = learned(GROUPS)
    mas.save(tmp_path / "mas")
    other = MAS(model)
    other.load(tmp_path / "mas")
    assert other.lambda_reg == GROUPS
    assert_states_equal(other.state_dict(), mas.state_dict())
    assert torch.equal(other.penalty(), mas.penalty())


def test_lambda_can_be_changed_and_what_is_shown_is_a_copy():
    _, mas = learned(GROUPS)
    mas.lambda_reg["*"] = 7.0
    assert mas.lambda_reg == GROUPS
    mas.lambda_reg = {"*": 2.0}
    value = mas.penalty()
    mas.lambda_reg = 2
    assert torch.equal(mas.penalty(), value)
    assert mas.lambda_reg == mas.lambda_proximal == 2.0
    assert "lambda_reg=2" in repr(mas)


BAD = {
    "negative number": (-1.0, ValueError, "-1.0", "negative"),
    "not a number": (math.nan, ValueError, "nan", "finite"),
    "infinite": (math.inf, ValueError, "inf", "finite"),
    "text": ("strong", TypeError, "'strong'", "'auto'"),
    "unmatched": ({"0.*": 1.0}, ValueError, "'2.weight'", "'*'"),
    "matches nothing": ({"conv.*": 1.0, "*": 1.0}, ValueError, "'conv.*'", "no parameter"),
    "decides nothing": ({"*": 1.0, "0.*": 0.0}, ValueError, "'0.*'", "first"),
    "negative": ({"*": -1.0}, ValueError, "-1", "negative"),
    "empty": ({}, ValueError, "empty", "{'*': number}"),
    "key": ({0: 1.0}, TypeError, "0", "globs"),
    "value": ({"*": "1"}, TypeError, "'1'", "number"),
    "boolean": (True, TypeError, "True", "number"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_change_nothing(case):
    value, kind, *words = BAD[case]
    mas = MAS(mlp(), 2.0)
    for call in (lambda: MAS(mlp(), value), lambda: setattr(mas, "lambda_reg", value)):
        assert_refused(refusal(call, kind, "lambda_reg", *words), unchanged=(mas,))
    assert mas.lambda_reg == 2.0


def test_a_new_layer_without_a_lambda_is_refused_before_anything_changes():
    model = mlp()
    mas = MAS(model, {"0.*": 1.0, "2.*": 1.0})
    mas.consolidate([X])
    before = mas.state_dict()
    model.append(nn.Linear(4, 2).double())
    assert_refused(refusal(lambda: mas.consolidate([X]), ValueError, "'3.weight'", "'*'"))
    del model[3]
    assert_states_equal(mas.state_dict(), before)


def test_a_catch_all_may_have_nothing_left_to_catch():
    assert MAS(mlp(), {"*.weight": 1.0, "*.bias": 0.1, "*": 0.0}).num_tasks == 0


def test_parameters_that_are_not_selected_need_no_lambda():
    mas = MAS(mlp(), {"0.weight": 1.0}, params=["0.weight"])
    mas.consolidate([X])
    assert mas.penalty() == 0
