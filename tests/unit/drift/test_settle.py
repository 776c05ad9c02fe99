"""settle(): the limit is kept, by the least change that its formula allows; or nothing changes."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from mas_ext import MAS, DriftBudget
from tests.support.regularizers import assert_bits, assert_refused, move, refusal
from tests.support.zoo.small import assert_same, convnet, images, mlp, vectors

X = vectors(40)


def drifted(limit=0.01, by=0.3, model=None, x=X, lambda_reg=1.0, metric="kl", **options):
    """A model that has drifted beyond the limit, and its MAS."""
    model = mlp() if model is None else model
    mas = MAS(model, lambda_reg, budget=DriftBudget(limit, metric), **options)
    mas.consolidate(x.split(16))
    move(model, by)
    return model, mas


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("weights", ["importance", "uniform"])
@pytest.mark.parametrize("metric", ["kl", "relative"])
@pytest.mark.parametrize("limit", [1e-4, 0.003, 0.1, 1.0])
def test_the_limit_is_kept_and_nearly_used(limit, metric, weights):
    for seed in range(6):
        torch.manual_seed(seed)
        widths = torch.randint(2, 40, (2,)).tolist()
        net = nn.Sequential(nn.Linear(6, widths[0]), nn.ReLU(), nn.Linear(*widths), nn.Tanh())
        net.append(nn.Linear(widths[1], 4))
        _, mas = drifted(limit, 10 ** (seed / 3 - 1), net.double(), metric=metric)
        before = mas.drift_measured()
        settled = mas.settle(weights=weights)
        assert settled.before == before
        assert settled.after == mas.drift_measured() <= limit
        assert (settled.c > 0) == (before > limit)
        assert settled.after > 0.9 * limit or before <= limit
        assert mas.settle().c == 0.0


def test_within_the_limit_nothing_moves():
    model, mas = drifted(limit=1e3)
    before = copy.deepcopy(model)
    settled = mas.settle()
    assert (settled.c, settled.before) == (0.0, settled.after)
    assert_bits(model, before)
    assert mas.settle(settled.before).c == 0.0
    assert mas.settle(settled.before / 2).c > 0.0


@pytest.mark.parametrize("is_settled", [False, True])
def test_a_task_that_ends_beyond_the_limit_is_warned_of(is_settled):
    _, mas = drifted()
    if is_settled:
        mas.settle()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mas.consolidate([X])
    assert any("settle" in str(one.message) for one in caught) != is_settled


@pytest.mark.parametrize("state_dtype", ["float32", "uint8"])
def test_c_is_that_of_the_formula(state_dtype):
    model, mas = drifted(state_dtype=state_dtype)
    end = values(model)
    c = mas.settle().c
    omega, anchor = mas.importance, mas.anchor
    expected = {
        n: (p + c * omega[n] * anchor[n]) / (1 + c * omega[n].to(p.dtype)) for n, p in end.items()
    }
    assert_same(values(model), expected, 1e-6 if state_dtype == "uint8" else 1e-12)


def test_uniform_weights_are_a_straight_line():
    model, mas = drifted()
    end = values(model)
    c = mas.settle(weights="uniform").c
    expected = {n: (p + c * mas.anchor[n]) / (1 + c) for n, p in end.items()}
    assert_same(values(model), expected)


@pytest.mark.parametrize("weights", ["importance", "uniform"])
def test_lambdas_keep_their_proportions_and_0_is_free(weights):
    patterns = {"0.bias": 0, "2.*": 100.0, "*": 300.0}
    model, mas = drifted(lambda_reg=patterns)
    end = values(model)
    c = mas.settle(weights=weights).c
    parts = {"0.weight": 1.0, "2.weight": 1 / 3, "2.bias": 1 / 3, "0.bias": 0.0}
    if weights == "uniform":
        weighted = {n: torch.full_like(p, float(parts[n] > 0)) for n, p in end.items()}
    else:
        weighted = {n: parts[n] * omega for n, omega in mas.importance.items()}
    expected = {
        n: (p + c * weighted[n] * mas.anchor[n]) / (1 + c * weighted[n]) for n, p in end.items()
    }
    assert_same(values(model), expected)
    assert torch.equal(model[0].bias, end["0.bias"])


# What is not protected, or not any more, stays where it is.
@pytest.mark.parametrize(
    "how", [{"params": lambda name, p: name != "0.bias"}, "frozen"], ids=["left out", "frozen"]
)
def test_other_parameters_stay(how):
    model, mas = drifted(0.05, **({} if how == "frozen" else how))
    if how == "frozen":
        model[0].bias.requires_grad_(False)
    bias = model[0].bias.detach().clone()
    assert mas.settle().c > 0
    assert torch.equal(model[0].bias, bias)
    assert model[0].bias.requires_grad == (how != "frozen")


def test_running_statistics_move_along():
    """They keep the part of their change that the parameters keep of theirs."""
    model = convnet().eval()
    model, mas = drifted(1e-3, model=model, x=images(40))
    begun = {n: b.clone() for n, b in model.named_buffers()}
    model[1].running_mean.add_(0.2)
    model[1].running_var.mul_(1.5)
    model[1].num_batches_tracked += 7
    end = {n: b.clone() for n, b in model.named_buffers()}
    way = {n: p - mas.anchor[n] for n, p in values(model).items()}
    assert mas.settle().c > 0
    left = {n: p - mas.anchor[n] for n, p in values(model).items()}
    norms = [math.sqrt(sum(float(v.square().sum()) for v in each.values())) for each in (left, way)]
    kept = norms[0] / norms[1]
    assert 0 < kept < 1
    for name in ("1.running_mean", "1.running_var"):
        expected = begun[name] + kept * (end[name] - begun[name])
        torch.testing.assert_close(dict(model.named_buffers())[name], expected)
    assert model[1].num_batches_tracked == end["1.num_batches_tracked"]


def test_statistics_that_alone_have_changed_are_put_back():
    """No parameter has changed."""
    model = convnet().eval()
    model, mas = drifted(1e-3, 0.0, model=model, x=images(40))
    model[1].running_mean.add_(2.0)
    assert mas.drift_measured() > 1e-3
    assert mas.settle().after <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "uint8"])
def test_every_dtype_settles(dtype, state_dtype):
    model, mas = drifted(0.01, 0.3, mlp(dtype), X.to(dtype), state_dtype=state_dtype)
    settled = mas.settle()
    assert settled.before > 0.01 >= settled.after == mas.drift_measured()
    assert settled.after > 0.005
    assert all(p.dtype == dtype for p in model.parameters())


def test_importance_that_cannot_reach_the_limit_gives_way_to_uniform_weights():
    """A dead unit had Ω = 0; now it lives."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        model[0].bias[0], model[0].weight[0] = -50.0, 0.1
    model, mas = drifted(0.01, 0.0, model, floor=0.0)
    with torch.no_grad():
        model[0].bias[0] = 50.0
    end = values(model)
    settled = mas.settle()
    assert settled.before > 0.01 >= settled.after
    expected = {n: (p + settled.c * mas.anchor[n]) / (1 + settled.c) for n, p in end.items()}
    assert_same(values(model), expected)


# -- drifts that do not fall smoothly --------------------------------------------------------------
def waves(before, now):
    """Rises and falls on the way, and is large only far away."""
    way = (now - before).abs().amax(1)
    return way * (1 + 0.9 * torch.sin(40 * way))


def steps(before, now):
    """Below 1 only at θ*, which is c = Inf."""
    return (5 * (now - before)).abs().amax(1).ceil()


@pytest.mark.parametrize("weights", ["importance", "uniform"])
@pytest.mark.parametrize(("metric", "limit"), [(waves, 0.05), (steps, 1.5), (steps, 0.7)])
def test_the_limit_is_kept_where_the_drift_is_not_monotone(metric, limit, weights):
    for by in (0.1, 0.3, 1.0, 3.0):
        _, mas = drifted(limit, by, metric=metric)
        assert mas.settle(weights=weights).after == mas.drift_measured() <= limit


def test_a_drift_that_falls_at_the_first_move_settles():
    """However small c is."""
    model, end = mlp(), []

    def metric(before, now):
        return torch.full((len(now),), float(end == [model[0].weight[0, 0].item()]))

    _, mas = drifted(0.5, model=model, metric=metric)
    end.append(model[0].weight[0, 0].item())
    before = copy.deepcopy(model)
    assert mas.drift_measured() > 0.5
    settled = mas.settle()
    assert settled.after <= 0.5 < settled.before
    assert_same(values(model), values(before), 1e-3, 1e-3)


def bounded():
    """A metric for searches that might not end."""
    calls = []

    def metric(before, now):
        calls.append(len(now))
        if len(calls) > 1000:
            raise RuntimeError("the search does not end")
        return (now - before).square().sum(1)

    return metric


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_parameters_that_diverged_return(value):
    """By c = Inf, which is θ* itself."""
    model, mas = drifted(metric=bounded())
    with torch.no_grad():
        model[0].weight[0, 0] = value
    assert mas.settle().after <= 0.01
    assert mas.drift_measured() <= 0.01


def test_a_limit_below_the_rounding_of_what_is_kept_is_refused():
    """log p in float16 has a drift of its own, of some 1e-8 nats."""
    model, mas = drifted(1e-9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="budget"):
        mas.settle()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- refusals --------------------------------------------------------------------------------------
def other_head():
    """Its head is not protected, and has changed."""
    return drifted(0.01, 1.0, params="0.*", metric=bounded())


def with_inf():
    """Not even Inf to NaN."""
    model, mas = other_head()
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    return model, mas


def raising(model, batch):
    raise RuntimeError("broken")


REFUSALS = {
    "not protected": (other_head, {}, ValueError, "budget", "protect"),
    "λ is 0": (lambda: drifted(lambda_reg=0.0), {}, ValueError, "budget"),
    "not protected, Inf": (with_inf, {}, ValueError, "budget"),
    "budget 0": (drifted, {"budget": 0}, ValueError, "budget"),
    "budget -1": (drifted, {"budget": -1.0}, ValueError, "budget"),
    "budget NaN": (drifted, {"budget": math.nan}, ValueError, "budget"),
    "budget Inf": (drifted, {"budget": math.inf}, ValueError, "budget"),
    "budget x": (drifted, {"budget": "x"}, TypeError, "budget"),
    "budget True": (drifted, {"budget": True}, TypeError, "budget"),
    "weights": (drifted, {"weights": "fisher"}, ValueError, "weights"),
    "data alone": (drifted, {"data": [X]}, ValueError, "loss"),
    "loss alone": (drifted, {"loss": raising}, ValueError, "data"),
    "no data": (drifted, {"data": [], "loss": raising}, ValueError, "data"),
    "loss raises": (drifted, {"data": [X], "loss": raising}, RuntimeError, "broken"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_change_nothing(case):
    make, options, *expected = REFUSALS[case]
    model, mas = make()
    with torch.no_grad():
        model[0].bias[1] = -0.0
    assert_refused(refusal(lambda: mas.settle(**options), *expected), unchanged=(model, mas))


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_an_error_in_the_middle_changes_nothing(fails_at):
    calls = []

    def metric(before, now):
        calls.append(len(now))
        if len(calls) == 3 * fails_at + 1:
            raise KeyboardInterrupt
        return (now - before).square().sum(1)

    model, mas = drifted(0.01, metric=metric)
    before = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        mas.settle()
    assert_bits(model, before)


def test_before_the_first_task_there_is_nothing_to_settle():
    model = mlp()
    mas, before = MAS(model, budget=0.1), copy.deepcopy(model)
    assert mas.drift_measured() == 0.0
    assert (mas.settle().before, mas.settle().c) == (0.0, 0.0)
    assert_bits(model, before)


def test_what_settling_costs_is_told():
    model, mas = drifted()
    batches = [(X[:10], 1.0), (X[10:], 2.0)]

    def loss(m, batch):
        assert not m.training
        return (m(batch[0]) - batch[1]).square().mean()

    def mean():
        return sum(float(loss(model.eval(), batch).detach()) for batch in batches) / 2

    before = mean()
    model.train()
    settled = mas.settle(data=iter(batches), loss=loss)
    assert model.training
    assert (settled.loss_before, settled.loss_after) == pytest.approx((before, mean()), rel=1e-12)
    assert settled.loss_after != settled.loss_before
