"""Presets against the formulas of those they are named after: by hand, and in plain autograd."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import mas_ext
from mas_ext import MAS
from tests.support.other_implementations import IMPLEMENTATIONS, is_body
from tests.support.zoo.small import assert_same

NAMES = list(IMPLEMENTATIONS)

# -- by hand ---------------------------------------------------------------------------------------
# F(x) = wᵀx with w = (1, 1), (2, 2), (3, 3) after three tasks on the same three samples, in batches
# of two. At w = (1, 1) the samples' outputs are 3, −1, 1 and the gradients 2yx of y² are
# (6, 12), (−4, 6), (2, 0); they grow with w. Those of |y| are (1, 2), (−2, 3), (1, 0), whatever w.
SAMPLES = torch.tensor([[1.0, 2.0], [2.0, -3.0], [1.0, 0.0]])
DISPLACED = torch.tensor([[3.1, 2.8]])  # δ² = (0.01, 0.04)
BY_HAND = {  # Ω after the first task, after the third, and the penalty at λ = 0.5
    "paper": ((12 / 3, 18 / 3), (24.0, 36.0), 0.5 * (0.24 + 1.44)),
    "official": ((1.5, 4.5), (9.0, 27.0), 0.5 * (0.09 + 1.08)),
    "avalanche": ((1.5, 4.5), (2.25 * 1.5, 2.25 * 4.5), 0.5 * (0.03375 + 0.405)),
    "facil": ((0.25, 1.25), (0.4375, 2.1875), 0.25 * (0.004375 + 0.0875)),
    "capymoa": ((0.75, 2.25), (2.125 * 1.5, 2.125 * 4.5), 0.25 * (0.031875 + 0.3825)),
    "seed": ((1.5, 4.5), (7 * 1.5, 7 * 4.5), 0.25 * (0.105 + 1.26)),
}


@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name):
    model = nn.Linear(2, 1, bias=False)
    theirs = mas_ext.preset(name)
    mas = theirs.mas(model, lambda_reg=0.5)
    batches = SAMPLES.split(2)[:1] if name == "facil" else SAMPLES.split(2)
    first, third, penalty = BY_HAND[name]
    for task in (1.0, 2.0, 3.0):
        nn.init.constant_(model.weight, task)
        mas.consolidate(batches, **theirs.importance)
        if task == 1:
            torch.testing.assert_close(mas.importance["weight"], torch.tensor([first]))
    torch.testing.assert_close(mas.importance["weight"], torch.tensor([third]))
    with torch.no_grad():
        model.weight.copy_(DISPLACED)
    assert mas.penalty().item() == pytest.approx(penalty, rel=1e-5)


# -- against their formulas ------------------------------------------------------------------------


class Heads(nn.Module):
    """Dropout and batch normalisation, so that the mode matters; two heads if asked."""

    def __init__(self, heads):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Linear(6, 8, bias=False),
            nn.BatchNorm1d(8),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Linear(8, 5),
        )
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(heads))
        self.double()

    def forward(self, x):
        outputs = [head(self.body(x)) for head in self.heads]
        return outputs if len(outputs) > 1 else outputs[0]


def joined(model, batch):
    return torch.cat(model(batch), dim=1)


class Both:
    """The same three tasks, learned by their formulas and by ours."""

    def __init__(self, name, heads=1, **changed):
        settings = dataclasses.replace(mas_ext.preset(name), **changed)
        self.model = Heads(heads)
        self.their_model = copy.deepcopy(self.model)
        self.theirs = IMPLEMENTATIONS[name]()
        selection = (lambda n, p: is_body(n)) if name == "facil" else None
        self.mas = settings.mas(self.model, lambda_reg=0.7, params=selection)
        self.omegas = []  # theirs and ours after every task
        for task in range(3):
            batches = torch.randn(11, 6, dtype=torch.float64).split(4)  # the last is short
            torch.manual_seed(task)  # the same dropout for both
            self.theirs.end_task(self.their_model, batches)
            torch.manual_seed(task)
            self.mas.consolidate(
                batches[:2] if name == "facil" else batches,
                forward=joined if heads > 1 else None,
                **settings.importance,
            )
            ours = {n: t.clone() for n, t in self.mas.importance.items()}
            self.omegas.append((ours, self.theirs.omega))
            self.move(0.1 + task)

    @torch.no_grad()
    def move(self, by):
        for mine, theirs in zip(
            self.model.parameters(), self.their_model.parameters(), strict=True
        ):
            step = by * torch.randn_like(mine)
            mine.add_(step)
            theirs.add_(step)


def grads(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_importance_merged_importance_and_penalty_are_theirs(name):
    both = Both(name)
    for ours, theirs in both.omegas:
        assert_same(ours, theirs, rtol=1e-9)
    assert_same(both.mas.anchor, both.theirs.anchor, 0, 0)
    expected = both.theirs.penalty(both.their_model, 0.7)
    torch.testing.assert_close(both.mas.penalty(), expected, rtol=1e-9, atol=0)
    expected.backward()
    both.mas.penalty().backward()
    assert_same(grads(both.model), grads(both.their_model), rtol=1e-9)


CHANGES = {
    "estimator": {"estimator": "per_sample", "weighting": "samples", "training": False},
    "objective": {"objective": "l1"},
    "weighting": {"weighting": "samples"},
    "training": {"training": False},
    "merge": {"merge": "max"},
}


def is_changed(name, change):
    return any(getattr(mas_ext.preset(name), key) != value for key, value in change.items())


@pytest.mark.parametrize(
    ("name", "change"), [(n, c) for n in NAMES for c in CHANGES if is_changed(n, CHANGES[c])]
)
def test_every_setting_matters(name, change):
    """Else agreement would not tell which formula was used."""
    ours, theirs = Both(name, **CHANGES[change]).omegas[-1]
    for parameter, omega in theirs.items():
        assert not torch.allclose(ours[parameter], omega, rtol=1e-3)


def test_facil_joins_the_heads_outputs():
    both = Both("facil", heads=2)
    for ours, theirs in both.omegas:
        assert_same(ours, theirs, rtol=1e-9)
    assert all(name.startswith("body") for name in both.mas.importance)


def test_the_officials_optimizer_adds_what_attach_adds():
    both = Both("official")
    optimizer = torch.optim.SGD(both.model.parameters(), lr=1.0)
    both.mas.attach(optimizer)
    for p in both.model.parameters():
        p.grad = torch.zeros_like(p)
    before = {n: p.detach().clone() for n, p in both.model.named_parameters()}
    optimizer.step()
    stepped = {n: before[n] - p.detach() for n, p in both.model.named_parameters()}
    assert_same(stepped, both.theirs.gradient(both.their_model, 0.7), rtol=1e-9)


# -- the interface ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_value_that_says_what_it_is(name):
    chosen = mas_ext.preset(name)
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert bool(chosen.deviations) == (name != "paper")
    for deviation in chosen.deviations:
        assert f"{deviation.what}: {deviation.cost}" in str(chosen)
    assert chosen.importance is not chosen.importance, "a copy, which may be changed"
