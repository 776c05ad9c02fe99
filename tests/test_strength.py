"""λ as one number, and as a mapping from name or glob to number."""

import pytest
import torch
from torch import nn

import mas_ext
from mas_ext import MAS
from mas_ext._penalty.strength import Strength
from tests.models import mlp, vectors
from tests.test_regularizer import assert_states_equal, move

X = vectors()
GROUPS = {"0.weight": 0.5, "0.*": 3.0, "*": 0.0}


def remembered(lambda_reg=GROUPS, **options):
    """A model that has left its anchors, and its MAS."""
    model = mlp()
    mas = MAS(model, lambda_reg, **options)
    mas.consolidate([X])
    move(model)
    return model, mas


def energies(model, mas):
    """λΩδ²/2 of each parameter, in float64."""
    strength = Strength(mas.lambda_reg)
    return {
        name: strength.of(name) / 2 * (mas.importance[name] * (p - mas.anchor[name]) ** 2).sum()
        for name, p in model.named_parameters()
    }


def test_the_first_that_matches_counts():
    strength = Strength(GROUPS)
    assert strength.of("0.weight") == 0.5
    assert strength.of("0.bias") == 3.0
    assert strength.of("2.weight") == 0.0
    assert Strength(2).of("anything") == 2.0


def test_penalty_and_gradient_are_those_of_the_sum_over_groups():
    model, mas = remembered()
    params = dict(model.named_parameters())
    expected = sum(energies(model, mas).values())
    grads = torch.autograd.grad(expected, list(params.values()), allow_unused=True)
    penalty = mas.penalty()
    torch.testing.assert_close(penalty, expected)
    by_autograd = torch.autograd.grad(penalty, list(params.values()))
    torch.testing.assert_close(mas.add_penalty_grad_(), expected.detach())
    for (name, p), g, h in zip(params.items(), by_autograd, grads, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(p) if h is None else h, msg=name)
        torch.testing.assert_close(p.grad, g)


def test_a_proximal_step_pulls_each_group_by_its_own():
    model, mas = remembered()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mas.proximal_step_(0.1)
    strength = Strength(GROUPS)
    for name, p in model.named_parameters():
        c = 0.1 * strength.of(name) * mas.importance[name]
        expected = (before[name] + c * mas.anchor[name]) / (1 + c)
        torch.testing.assert_close(p.detach(), expected)
    assert torch.equal(dict(model.named_parameters())["2.weight"], before["2.weight"])


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_fused_optimizers_do_what_attach_does(kind, mode):
    ends = []
    for is_fused in (False, True):
        torch.manual_seed(0)
        model, mas = remembered()
        if is_fused:
            fused = getattr(mas_ext.optim, kind)
            optimizer = fused(model.parameters(), lr=0.01, mas=mas, mode=mode)
        else:
            optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
            handle = mas.attach(optimizer, mode)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
        last = optimizer.last_penalty if is_fused else handle.last_penalty
        ends.append([*model.parameters(), last])
    torch.testing.assert_close(*ends)


def test_lambda_survives_a_file(tmp_path):
    model, mas = remembered()
    mas.save(tmp_path / "mas")
    other = MAS(model)
    other.load(tmp_path / "mas")
    assert other.lambda_reg == GROUPS
    assert_states_equal(other.state_dict(), mas.state_dict())
    assert torch.equal(other.penalty(), mas.penalty())


def test_lambda_can_be_changed_and_what_is_shown_is_a_copy():
    _, mas = remembered()
    mas.lambda_reg["*"] = 7.0
    assert mas.lambda_reg == GROUPS
    mas.lambda_reg = {"*": 2.0}
    value = mas.penalty()
    mas.lambda_reg = 2.0
    assert torch.equal(mas.penalty(), value)
    assert "lambda_reg=2" in repr(mas)


BAD = {
    "unmatched": ({"0.*": 1.0}, ValueError, r"matches parameter '2.weight'; add '\*'"),
    "matches nothing": ({"conv.*": 1.0, "*": 1.0}, ValueError, "'conv.*' matches no parameter"),
    "negative": ({"*": -1.0}, ValueError, "lambda_reg is -1"),
    "empty": ({}, ValueError, "empty mapping"),
    "key": ({0: 1.0}, TypeError, "the key 0; pass names or globs"),
    "value": ({"*": "1"}, TypeError, "lambda_reg is '1'"),
    "boolean": (True, TypeError, "lambda_reg is True"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_lambda_is_refused_and_changes_nothing(case):
    value, error, message = BAD[case]
    mas = MAS(mlp(), 2.0)
    with pytest.raises(error, match=message):
        MAS(mlp(), value)
    with pytest.raises(error, match=message):
        mas.lambda_reg = value
    assert mas.lambda_reg == 2.0


def test_a_new_layer_without_a_lambda_is_refused_before_anything_changes():
    model = mlp()
    mas = MAS(model, {"0.*": 1.0, "2.*": 1.0})
    mas.consolidate([X])
    before = mas.state_dict()
    model.append(nn.Linear(4, 2).double())
    with pytest.raises(ValueError, match=r"matches parameter '3.weight'"):
        mas.consolidate([X])
    assert_states_equal(mas.state_dict(), before)


def test_parameters_that_are_not_selected_need_no_lambda():
    mas = MAS(mlp(), {"0.weight": 1.0}, params=["0.weight"])
    mas.consolidate([X])
    assert mas.penalty() == 0
