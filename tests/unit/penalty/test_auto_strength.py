"""λ that is found: ``lambda_reg="auto"`` and ``drift``, against the equation and by hand."""

import math

import pytest
import torch
from torch import nn

import mas_ext
from mas_ext import MAS, estimate_importance
from mas_ext._strength.auto import COHERENCE, LASTING
from tests.support.regularizers import (
    MERGES,
    assert_refused,
    assert_states_equal,
    learned,
    move,
    penalty_by_hand,
    plain_state,
    refusal,
    train,
)
from tests.support.zoo.small import mlp, vectors

X = vectors()


def auto(model, data=(X,), **options):
    mas = MAS(model, "auto", **options)
    mas.consolidate(data)
    return mas


def energy(model, x=X):
    with torch.no_grad():
        return float(model(x).square().sum(1).mean())


def close(value, tolerance=1e-12):
    return pytest.approx(value, rel=tolerance)


# -- The equation ----------------------------------------------------------------------------------
def by_equation(numel, importance, drift, e):
    """λ for what is pushed by gradients, and by steps of one size."""
    scale = COHERENCE / (drift * e)
    return scale * LASTING * importance / (2 * math.sqrt(e)), scale * numel


def test_lambda_is_that_of_the_equation():
    model = mlp()
    mas = auto(model, drift=0.4)
    total = sum(float(o.sum()) for o in mas.importance.values())
    found = mas.lambda_reg, mas.lambda_proximal
    assert found == close(by_equation(92, total, 0.4, energy(model)))


def test_nothing_is_found_before_a_task_ends():
    mas = MAS(mlp(), "auto")
    for _ in range(2):
        assert mas.lambda_reg == mas.lambda_proximal == "auto"
        assert mas.drift == 0.2
        assert mas.penalty() == 0
        mas.update_importance([X])


@pytest.mark.parametrize("estimator", ["per_sample", "batch", "local"])
@pytest.mark.parametrize("sizes", [[10], [1] * 10, [3, 3, 4]])
def test_the_energy_is_of_the_samples_that_count_however_they_are_cut(estimator, sizes):
    model = mlp()
    whole = estimate_importance(model, X.split(sizes), estimator=estimator)
    assert whole.energy == close(energy(model))
    some = estimate_importance(model, X.split(4), max_samples=6, estimator=estimator)
    assert some.energy == close(energy(model, X[:6]))


def test_batches_weigh_alike_in_the_importance_and_samples_in_the_energy():
    model = mlp()
    found = estimate_importance(model, X.split(4), estimator="batch", weighting="batches")
    assert found.energy == close(energy(model))


def test_local_of_a_model_whose_rows_are_not_samples():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4).double()

        def forward(self, x):
            return self.layer(x.view(-1, 3)).view(len(x), -1)

    model = Rows()
    assert estimate_importance(model, [X], estimator="local").energy == close(energy(model))


def test_the_energy_is_the_objectives():
    model = mlp()
    norm = estimate_importance(model, [X], objective="l2").energy
    assert norm == close(float(model(X).detach().norm(dim=1).mean()))


def test_a_task_in_parts_is_a_task():
    whole, mas = auto(mlp()), MAS(mlp(), "auto")
    mas.update_importance([X[:3]])
    mas.consolidate([X[3:]])
    assert mas.lambda_proximal == close(whole.lambda_proximal)
    assert mas.lambda_reg == close(whole.lambda_reg)


@pytest.mark.parametrize("merge", MERGES, ids=str)
@pytest.mark.parametrize("state_dtype", ["float32", "uint8"])
def test_the_same_task_again_changes_nothing_whatever_the_merge(merge, state_dtype):
    mas = auto(mlp(torch.float32), [X.float()], merge=merge, state_dtype=state_dtype)
    first = auto(mlp()).lambda_reg, auto(mlp()).lambda_proximal
    for _ in range(3):
        mas.consolidate([X.float()])
    assert mas.lambda_proximal == close(first[1], 1e-6)
    assert mas.lambda_reg == close(first[0], 0.02 if state_dtype == "uint8" else 1e-5)


def test_the_energy_is_the_mean_over_tasks():
    model = mlp()
    mas = auto(model)
    first = energy(model)
    move(model)
    mas.consolidate([2 * X])
    mean = (first + energy(model, 2 * X)) / 2
    assert mas.lambda_proximal == close(COHERENCE * 92 / (0.2 * mean))


def test_a_louder_network_is_held_as_firmly():
    """Ω and E grow by the same factor, and what is held is λΩ."""
    quiet, loud = mlp(), mlp()
    with torch.no_grad():
        loud[2].weight.mul_(10)
        loud[2].bias.mul_(10)
    held = [m.lambda_proximal * m.importance["0.weight"] for m in (auto(quiet), auto(loud))]
    torch.testing.assert_close(held[1], held[0])


# -- Where it is used ------------------------------------------------------------------------------
def test_the_penalty_is_of_lambda_reg_and_a_proximal_step_of_lambda_proximal():
    (model, mas), (other, fixed) = learned("auto"), learned(1.0)
    expected = penalty_by_hand(mas, model).detach()
    torch.testing.assert_close(mas.penalty().detach(), expected)
    torch.testing.assert_close(mas.add_penalty_grad_(), expected)
    fixed.lambda_reg = mas.lambda_proximal
    assert torch.equal(mas.proximal_step_(0.1), fixed.proximal_step_(0.1))
    assert_states_equal(model.state_dict(), other.state_dict())


EQUAL_STEPS = {
    "SGD": False,
    "ASGD": False,
    "Adam": True,
    "AdamW": True,
    "RMSprop": True,
    "Adagrad": True,
}


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("kind", EQUAL_STEPS)
@pytest.mark.parametrize("is_ours", [False, True])
def test_what_pushes_decides(kind, mode, is_ours):
    """A proximal step after an optimizer whose steps have one size has another λ."""
    if is_ours and not hasattr(mas_ext.optim, kind):
        return
    ends = []
    for is_auto in (True, False):
        model, mas = learned("auto", moved=False)
        if not is_auto:
            by_steps = mode == "proximal" and EQUAL_STEPS[kind]
            mas.lambda_reg = mas.lambda_proximal if by_steps else mas.lambda_reg
        train(model, mas, kind, mode, is_ours)
        ends.append(model.state_dict())
    assert_states_equal(*ends)


# -- Groups, and changes ---------------------------------------------------------------------------
def test_each_group_has_its_own():
    model = mlp()
    by_glob = {"0.*": "auto", "2.weight": "auto", "*": 0.5}
    mas = MAS(model, by_glob, drift={"0.*": 0.1, "2.weight": 1})
    assert mas.lambda_reg == by_glob
    mas.consolidate([X])
    e = energy(model)
    total = sum(float(o.sum()) for n, o in mas.importance.items() if n.startswith("0."))
    gradient, step = by_equation(56, total, 0.1, e)
    assert mas.lambda_reg["0.*"] == close(gradient)
    assert mas.lambda_proximal["0.*"] == close(step)
    assert mas.lambda_proximal["2.weight"] == close(COHERENCE * 32 / e)
    assert mas.lambda_proximal["*"] == mas.lambda_reg["*"] == 0.5
    assert mas.drift == {"0.*": 0.1, "2.weight": 1.0}


def test_drift_and_lambda_may_be_changed_at_any_time():
    mas = auto(mlp())
    before = mas.lambda_reg, mas.lambda_proximal
    mas.drift = 0.1
    assert mas.lambda_reg == close(2 * before[0])
    assert mas.lambda_proximal == close(2 * before[1])
    mas.lambda_reg = 7
    assert mas.lambda_reg == mas.lambda_proximal == 7.0
    mas.lambda_reg = "auto"
    assert mas.lambda_reg == close(2 * before[0]), "with the drift of before"


BAD = {
    "zero": ({"drift": 0}, ValueError, "drift", "above 0"),
    "negative": ({"drift": -1.0}, ValueError, "drift", "above 0"),
    "infinite": ({"drift": math.inf}, ValueError, "drift", "finite"),
    "not a number": ({"drift": math.nan}, ValueError, "drift", "finite"),
    "text": ({"drift": "0.2"}, TypeError, "drift", "number"),
    "true": ({"drift": True}, TypeError, "drift", "number"),
    "a key": ({"drift": {3: 0.2}}, TypeError, "drift", "globs"),
    "other globs": (
        {"lambda_reg": {"0.*": "auto", "*": 1.0}, "drift": {"*": 0.2}},
        ValueError,
        "drift",
        "lambda_reg",
        "['0.*']",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case):
    options, kind, *words = BAD[case]
    mas = auto(mlp())

    def create():
        MAS(mlp(), **{"lambda_reg": "auto", **options})

    assert_refused(refusal(create, kind, *words))
    if "lambda_reg" not in options:
        change = refusal(lambda: setattr(mas, "drift", options["drift"]), kind, *words)
        assert_refused(change, unchanged=(mas,))


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_a_task_without_energy_is_refused_and_changes_nothing(sign):
    model = mlp()
    mas = MAS(model, "auto")
    mas.update_importance([X])

    def consolidate(one):
        one.consolidate([X], objective=lambda f: sign - 10 * f.square().sum(1))

    words = ValueError, "lambda_reg='auto'", "positive"
    assert_refused(refusal(consolidate, *words), mas, unchanged=(mas,))
    fixed = MAS(model, 1.0)
    consolidate(fixed)  # needs none
    case = refusal(lambda: setattr(fixed, "lambda_reg", "auto"), *words)
    assert_refused(case, unchanged=(fixed,))


def test_presets_and_callbacks_take_it():
    plugin = mas_ext.preset("avalanche").mas(mlp(), "auto", drift=0.4)
    assert (plugin.lambda_reg, plugin.drift) == ("auto", 0.4)
    assert mas_ext.preset("official").regularizer("auto")["lambda_reg"] == "auto"


# -- In a state ------------------------------------------------------------------------------------
def test_a_state_tells_what_is_found(tmp_path):
    model = mlp()
    mas = auto(model, drift=0.3)
    move(model)
    mas.update_importance([X])
    mas.save(tmp_path / "mas")
    for load in (lambda m: m.load(tmp_path / "mas"), lambda m: m.load_state_dict(mas.state_dict())):
        other = MAS(model, 1.0)
        load(other)
        assert_states_equal(other.state_dict(), mas.state_dict())
        assert (other.lambda_reg, other.lambda_proximal) == (mas.lambda_reg, mas.lambda_proximal)
    mas.consolidate()
    other.consolidate()
    assert (other.lambda_reg, other.lambda_proximal) == (mas.lambda_reg, mas.lambda_proximal)


def test_a_state_of_before_has_no_energy():
    mas = MAS(mlp(), 2.0)
    mas.consolidate([X])
    state = plain_state(mas)
    old = {k: v for k, v in state.items() if k not in ("drift", "energy", "seen")}
    mas.load_state_dict({**old, "version": 3})
    case = refusal(lambda: setattr(mas, "lambda_reg", "auto"), ValueError, "lambda_reg='auto'")
    assert_refused(case, unchanged=(mas,))
    mas.consolidate([X])
    mas.lambda_reg = "auto"
    assert mas.lambda_proximal == close(auto(mlp()).lambda_proximal)


@pytest.mark.parametrize(
    "damage", [{"energy": {"mean": 0.0, "tasks": 0}}, {"energy": 3}, {"drift": "x"}], ids=str
)
def test_a_damaged_energy_is_refused(damage):
    mas = auto(mlp())
    damaged = {**plain_state(mas), **damage}
    case = refusal(lambda: mas.load_state_dict(damaged), ValueError)
    assert_refused(case, unchanged=(mas,))
