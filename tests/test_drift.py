"""λ that is found: ``lambda_reg="auto"`` and ``drift``, against the equation and by hand."""

import math

import pytest
import torch
from torch import nn

import mas_ext
from mas_ext import MAS, estimate_importance
from mas_ext._penalty.auto_strength import COHERENCE, LASTING, takes_equal_steps
from mas_ext._state import checkpoint
from mas_ext._state.distributed_checkpoint import unpacked
from tests.models import mlp, vectors
from tests.test_regularizer import assert_states_equal, by_hand, move

X = vectors()
MERGES = ["sum", "mean", "max", ("ema", 0.3), ("ema_from_zero", 0.3), "sum_of_sums"]


def auto(model, data=(X,), **options):
    mas = MAS(model, "auto", **options)
    mas.consolidate(data)
    return mas


def energy(model, x=X):
    with torch.no_grad():
        return float(model(x).square().sum(1).mean())


def close(a, b, tolerance=1e-12):
    return math.isclose(a, b, rel_tol=tolerance)


# -- the equation ----------------------------------------------------------------------------------


def test_lambda_is_that_of_the_equation():
    model = mlp()
    mas = auto(model, drift=0.4)
    numel, total = 92, sum(float(o.sum()) for o in mas.importance.values())
    e = energy(model)
    assert close(mas.lambda_proximal, COHERENCE * numel / (0.4 * e))
    push = LASTING * total / (2 * math.sqrt(e))
    assert close(mas.lambda_reg, COHERENCE * push / (0.4 * e))


def test_nothing_is_found_before_there_is_data():
    model = mlp()
    mas = MAS(model, "auto")
    assert mas.lambda_reg == mas.lambda_proximal == "auto"
    assert mas.drift == 0.2
    assert mas.penalty() == 0
    mas.update_importance([X])
    assert mas.lambda_reg == "auto", "it is found when the task ends"


def test_a_number_is_both():
    mas = MAS(mlp(), 3.0)
    mas.consolidate([X])
    assert mas.lambda_reg == mas.lambda_proximal == 3.0


@pytest.mark.parametrize("estimator", ["per_sample", "batch", "local"])
@pytest.mark.parametrize("sizes", [[10], [1] * 10, [3, 3, 4]])
def test_the_energy_is_of_samples_however_they_are_cut(estimator, sizes):
    model = mlp()
    omega = estimate_importance(model, X.split(sizes), estimator=estimator)
    assert close(omega.energy, energy(model))


def test_the_energy_is_of_the_samples_that_count():
    model = mlp()
    for estimator in ("per_sample", "batch", "local"):
        some = estimate_importance(model, X.split(4), max_samples=6, estimator=estimator)
        assert close(some.energy, energy(model, X[:6])), estimator
    batches = estimate_importance(model, X.split(4), estimator="batch", weighting="batches")
    assert close(batches.energy, energy(model)), "batches weigh alike in Ω, samples in E"


def test_local_of_a_model_whose_rows_are_not_samples():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4).double()

        def forward(self, x):
            return self.layer(x.view(-1, 3)).view(len(x), -1)

    model = Rows()
    assert close(estimate_importance(model, [X], estimator="local").energy, energy(model))


def test_the_energy_is_the_objectives():
    model = mlp()
    norm = estimate_importance(model, [X], objective="l2").energy
    assert close(norm, float(model(X).detach().norm(dim=1).mean()))


def test_a_task_in_parts_is_a_task():
    model, whole = mlp(), auto(mlp())
    mas = MAS(model, "auto")
    mas.update_importance([X[:3]])
    mas.consolidate([X[3:]])
    assert close(mas.lambda_proximal, whole.lambda_proximal)
    assert close(mas.lambda_reg, whole.lambda_reg)


@pytest.mark.parametrize("merge", MERGES, ids=str)
@pytest.mark.parametrize("state_dtype", ["float32", "uint8"])
def test_the_same_task_again_changes_nothing(merge, state_dtype):
    mas = auto(mlp(torch.float32), [X.float()], merge=merge, state_dtype=state_dtype)
    first = mas.lambda_reg, mas.lambda_proximal
    for _ in range(3):
        mas.consolidate([X.float()])
    assert close(mas.lambda_proximal, first[1], 1e-6)
    assert close(mas.lambda_reg, first[0], 0.02 if state_dtype == "uint8" else 1e-5)


def test_the_energy_is_the_mean_over_tasks():
    model = mlp()
    mas = auto(model)
    first = energy(model)
    move(model)
    mas.consolidate([2 * X])
    mean = (first + energy(model, 2 * X)) / 2
    assert close(mas.lambda_proximal, COHERENCE * 92 / (0.2 * mean))


def test_a_louder_network_is_held_as_firmly():
    """Ω and E grow by the same factor, and what is held is λΩ."""
    quiet, loud = mlp(), mlp()
    with torch.no_grad():
        loud[2].weight.mul_(10)
        loud[2].bias.mul_(10)
    a, b = auto(quiet), auto(loud)
    held = [m.lambda_proximal * m.importance["0.weight"] for m in (a, b)]
    torch.testing.assert_close(held[1], held[0])


# -- where it is used ------------------------------------------------------------------------------


def test_the_penalty_and_its_gradient_are_of_lambda_reg():
    model = mlp()
    mas = auto(model)
    move(model)
    expected = by_hand(mas, model, mas.lambda_reg).detach()
    torch.testing.assert_close(mas.penalty().detach(), expected)
    torch.testing.assert_close(mas.add_penalty_grad_(), expected)


def test_a_proximal_step_by_hand_is_of_lambda_proximal():
    model, other = mlp(), mlp()
    mas, fixed = auto(model), MAS(other, 1.0)
    fixed.consolidate([X])
    fixed.lambda_reg = mas.lambda_proximal
    for m in (model, other):
        move(m)
    assert torch.equal(mas.proximal_step_(0.1), fixed.proximal_step_(0.1))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("is_fused", [False, True])
def test_what_pushes_decides(kind, mode, is_fused):
    ends = []
    for is_auto in (True, False):
        torch.manual_seed(0)
        model = mlp()
        mas = auto(model)
        if not is_auto:
            by_steps = (kind, mode) == ("AdamW", "proximal")
            mas.lambda_reg = mas.lambda_proximal if by_steps else mas.lambda_reg
        if is_fused:
            fused = getattr(mas_ext.optim, kind)
            optimizer = fused(model.parameters(), lr=0.01, mas=mas, mode=mode)
        else:
            optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
            mas.attach(optimizer, mode)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).sum().backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_which_optimizers_take_equal_steps():
    params = [nn.Parameter(torch.zeros(1))]
    for kind, expected in {
        torch.optim.SGD: False,
        torch.optim.ASGD: False,
        mas_ext.optim.SGD: False,
        torch.optim.Adam: True,
        torch.optim.AdamW: True,
        torch.optim.RMSprop: True,
        torch.optim.Adagrad: True,
    }.items():
        extra = {"mas": MAS(nn.Linear(1, 1))} if "mas_ext" in kind.__module__ else {}
        if extra:
            params = list(extra["mas"]._index.model.parameters())
        assert takes_equal_steps(kind(params, lr=0.1, **extra)) is expected, kind


# -- groups, and changes ---------------------------------------------------------------------------


def test_every_group_has_a_budget_of_its_own():
    model = mlp()
    mas = MAS(
        model, {"0.*": "auto", "2.weight": "auto", "*": 0.5}, drift={"0.*": 0.1, "2.weight": 1}
    )
    assert mas.lambda_reg == {"0.*": "auto", "2.weight": "auto", "*": 0.5}
    mas.consolidate([X])
    e = energy(model)
    found = mas.lambda_proximal
    assert close(found["0.*"], COHERENCE * 56 / (0.1 * e))
    assert close(found["2.weight"], COHERENCE * 32 / e)
    assert found["*"] == mas.lambda_reg["*"] == 0.5
    assert mas.drift == {"0.*": 0.1, "2.weight": 1.0}
    total = sum(float(o.sum()) for n, o in mas.importance.items() if n.startswith("0."))
    push = LASTING * total / (2 * math.sqrt(e))
    assert close(mas.lambda_reg["0.*"], COHERENCE * push / (0.1 * e))


def test_drift_and_lambda_may_be_changed_at_any_time():
    mas = auto(mlp())
    before = mas.lambda_reg, mas.lambda_proximal
    mas.drift = 0.1
    assert close(mas.lambda_reg, 2 * before[0])
    assert close(mas.lambda_proximal, 2 * before[1])
    mas.lambda_reg = 7
    assert mas.lambda_reg == mas.lambda_proximal == 7.0
    mas.lambda_reg = "auto"
    assert close(mas.lambda_reg, 2 * before[0]), "with the drift of before"


BAD = {
    "another word": ({"lambda_reg": "automatic"}, TypeError, "lambda_reg is 'automatic'.*'auto'"),
    "zero": ({"drift": 0}, ValueError, "drift is 0; pass a finite number above 0"),
    "negative": ({"drift": -1.0}, ValueError, r"drift is -1\.0"),
    "infinite": ({"drift": math.inf}, ValueError, "drift is inf"),
    "not a number": ({"drift": math.nan}, ValueError, "drift is nan"),
    "text": ({"drift": "0.2"}, TypeError, "drift is '0.2'; pass a number"),
    "true": ({"drift": True}, TypeError, "drift is True"),
    "other globs": (
        {"lambda_reg": {"0.*": "auto", "*": 1.0}, "drift": {"*": 0.2}},
        ValueError,
        r"drift is for \['\*'\], and lambda_reg is 'auto' for \['0\.\*'\]",
    ),
    "a key": ({"drift": {3: 0.2}}, TypeError, "drift has the key 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        MAS(mlp(), **{"lambda_reg": "auto", **options})


def test_a_bad_change_changes_nothing():
    mas = auto(mlp())
    before = mas.state_dict()
    for name, value in {"drift": -1, "lambda_reg": "strong"}.items():
        with pytest.raises((TypeError, ValueError)):
            setattr(mas, name, value)
    assert_states_equal(mas.state_dict(), before)


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_a_task_without_energy_is_refused_and_changes_nothing(sign):
    model = mlp()
    mas = MAS(model, "auto")
    mas.update_importance([X])
    before = mas.state_dict()
    with pytest.raises(ValueError, match=r"lambda_reg='auto': the objective's mean is -"):
        mas.consolidate([X], objective=lambda f: sign - 10 * f.square().sum(1))
    assert_states_equal(mas.state_dict(), before)
    fixed = MAS(model, 1.0)
    fixed.consolidate([X], objective=lambda f: -f.square().sum(1))  # needs none
    before = fixed.state_dict()
    with pytest.raises(ValueError, match="the objective's mean is -"):
        fixed.lambda_reg = "auto"
    assert_states_equal(fixed.state_dict(), before)


def test_presets_and_callbacks_take_it():
    plugin = mas_ext.preset("avalanche").mas(mlp(), "auto", drift=0.4)
    assert (plugin.lambda_reg, plugin.drift) == ("auto", 0.4)
    assert mas_ext.preset("official").regularizer("auto")["lambda_reg"] == "auto"


# -- kept ------------------------------------------------------------------------------------------


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


def test_a_state_of_before_has_no_energy(tmp_path):
    model = mlp()
    mas = MAS(model, 2.0)
    mas.consolidate([X])
    state = unpacked(mas.state_dict())
    old = {k: v for k, v in state.items() if k not in ("drift", "energy", "seen")}
    mas.load_state_dict({**old, "version": 3})
    with pytest.raises(ValueError, match=r"an earlier mas_ext.*'auto' after the next"):
        mas.lambda_reg = "auto"
    assert mas.lambda_reg == 2.0
    mas.consolidate([X])
    mas.lambda_reg = "auto"
    assert close(mas.lambda_proximal, auto(mlp()).lambda_proximal)


def test_a_damaged_energy_is_refused():
    mas = auto(mlp())
    state = unpacked(mas.state_dict())
    before = mas.state_dict()
    for damaged in ({"energy": {"mean": 0.0, "tasks": 0}}, {"energy": 3}, {"drift": "x"}):
        with pytest.raises(ValueError, match=r"damaged|lambda_reg='auto'"):
            mas.load_state_dict({**state, **damaged})
        assert_states_equal(mas.state_dict(), before)


def test_the_format_says_so():
    assert checkpoint.VERSION == 4
