"""Presets against what the implementations they are named after compute, by hand."""

import dataclasses
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import nn

import mas_ext
from mas_ext import MAS

# F(x) = (3wᵀx, 4wᵀx) with w = (1, 1), (2, 2), (3, 3) after three tasks on the same three samples,
# in batches of two. At w = (1, 1) the samples' wᵀx are 3, −1, 1. The gradients of their squares are
# (6, 12), (−4, 6), (2, 0); they grow with w. Those of their absolute values are (1, 2), (−2, 3),
# (1, 0), whatever w. ‖F‖² has 25 times the former, ‖F‖ 5 times the latter.
SAMPLES = torch.tensor([[1.0, 2.0], [2.0, -3.0], [1.0, 0.0]])
DISPLACED = torch.tensor([[3.1, 2.8]])  # δ² = (0.01, 0.04)


class ByHand(NamedTuple):
    """Ω after the first task and after the third, and the penalty at λ = 0.5, by the factor."""

    first: tuple[float, float]
    third: tuple[float, float]
    penalty: float
    factor: float = 25.0
    training: bool = False


BY_HAND = {
    "paper": ByHand((12 / 3, 18 / 3), (24.0, 36.0), 0.5 * (0.24 + 1.44)),
    "official": ByHand((1.5, 4.5), (9.0, 27.0), 0.5 * (0.09 + 1.08)),
    "avalanche": ByHand(
        (1.5, 4.5), (2.25 * 1.5, 2.25 * 4.5), 0.5 * (0.03375 + 0.405), training=True
    ),
    "facil": ByHand((0.25, 1.25), (0.4375, 2.1875), 0.25 * (0.004375 + 0.0875), 5.0, True),
    "capymoa": ByHand(
        (0.75, 2.25), (2.125 * 1.5, 2.125 * 4.5), 0.25 * (0.031875 + 0.3825), training=True
    ),
    "seed": ByHand((1.5, 4.5), (7 * 1.5, 7 * 4.5), 0.25 * (0.105 + 1.26)),
}


def learn(theirs):
    """Ω after the first task, after the third, the penalty, and the modes that it measures in."""
    model, omegas, modes = nn.Linear(2, 1, bias=False), [], set()
    mas = theirs.mas(model, lambda_reg=0.5)

    def forward(model, x):
        modes.add(model.training)
        return model(x) * torch.tensor([3.0, 4.0])

    # It leaves a short last batch out, as its notes say.
    batches = SAMPLES.split(2)[:1] if theirs.name == "facil" else SAMPLES.split(2)
    for task in (1.0, 2.0, 3.0):
        nn.init.constant_(model.weight, task)
        mas.consolidate(batches, forward=forward, **theirs.importance)
        omegas.append(mas.importance["weight"].flatten().clone())
    with torch.no_grad():
        model.weight.copy_(DISPLACED)
    return torch.cat([omegas[0], omegas[2], mas.penalty().detach()[None]]), modes


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    row = BY_HAND[name]
    expected = row.factor * torch.tensor([*row.first, *row.third, row.penalty])
    values, modes = learn(mas_ext.preset(name))
    torch.testing.assert_close(values, expected)
    assert modes == {row.training}


CHANGES = {
    "estimator": {"estimator": "per_sample", "weighting": "samples", "training": False},
    "objective": {"objective": "l1"},
    "weighting": {"weighting": "samples"},
    "training": {"training": False},
    "merge": {"merge": "max"},
    "lambda_scale": {"lambda_scale": 3.0},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", BY_HAND)
def test_every_setting_matters(name, change):
    """Else agreement would not tell which formula was used."""
    theirs = mas_ext.preset(name)
    changed = dataclasses.replace(theirs, **CHANGES[change])
    if changed != theirs:
        (values, modes), (others, other_modes) = learn(theirs), learn(changed)
        assert modes != other_modes or not torch.allclose(values, others, rtol=1e-3)


def test_alpha_may_be_chosen():
    assert mas_ext.preset("avalanche", alpha=0.8).merge == ("ema", 0.8)
    assert mas_ext.preset("capymoa", alpha=0).merge == ("ema_from_zero", 0.0)
    assert mas_ext.preset("avalanche").merge == ("ema", 0.5)


def test_options_win_over_the_presets():
    model = nn.Linear(2, 1)
    mas = mas_ext.preset("paper").mas(model, 3.0, merge="max", params=["weight"])
    assert repr(mas) == repr(MAS(model, 6.0, merge="max"))
    mas.consolidate([SAMPLES])
    assert list(mas.importance) == ["weight"]


@pytest.mark.parametrize("name", BY_HAND)
def test_a_preset_is_a_value_that_says_what_it_is(name):
    chosen = mas_ext.preset(name)
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert bool(chosen.deviations) == (name != "paper")
    for deviation in chosen.deviations:
        assert f"{deviation.what}: {deviation.cost}" in str(chosen)
    assert chosen.importance is not chosen.importance, "a copy, which may be changed"
