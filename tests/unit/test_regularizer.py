"""Class MAS against plain autograd, through the life of a model."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import mas_ext
from mas_ext import MAS
from tests.support.oracle import one_by_one
from tests.support.regularizers import (
    assert_refused,
    assert_states_equal,
    gradients,
    learned,
    move,
    penalty_by_hand,
    refusal,
)
from tests.support.zoo.small import assert_same, mlp, vectors

X = vectors()


def copies(tensors):
    return {name: t.detach().clone() for name, t in tensors.items()}


# -- Before, and after, a task ---------------------------------------------------------------------
def test_nothing_is_protected_before_the_first_task_ends():
    model = mlp()
    mas = MAS(model)
    for _ in range(2):
        assert dict(mas.importance) == dict(mas.anchor) == {}
        assert mas.penalty().item() == 0
        (model(X).sum() + mas.penalty()).backward()
        before = gradients(model)
        assert mas.add_penalty_grad_().item() == 0
        assert_states_equal(gradients(model), before)
        parameters = copy.deepcopy(model.state_dict())
        assert mas.proximal_step_(0.1).item() == 0
        assert_states_equal(model.state_dict(), parameters)
        mas.penalty().backward()
        mas.update_importance([X])  # which alone protects nothing


def test_consolidate_measures_and_anchors():
    model, mas = learned(moved=False)
    assert mas.num_tasks == 1
    assert_same(mas.importance, one_by_one(model, [X]))
    assert_same(mas.anchor, dict(model.named_parameters()), 0, 0)
    assert mas.penalty().item() == 0


def test_updates_weigh_by_samples():
    model = mlp()
    mas = MAS(model)
    mas.update_importance([X[:7]])
    mas.update_importance(iter([X[7:9]]))
    mas.consolidate([X[9:]])
    assert_same(mas.importance, one_by_one(model, [X]))


def test_importance_and_anchor_are_views():
    _model, mas = learned()
    before = mas.penalty()
    mas.importance["0.weight"].zero_()
    assert mas.penalty() < before
    with pytest.raises(TypeError):
        mas.importance["0.weight"] = torch.zeros(1)
    assert_same(copy.deepcopy(mas.importance), dict(mas.importance))


# -- The penalty -----------------------------------------------------------------------------------
def test_penalty_and_its_gradient_are_the_equations():
    """However it comes to the loss's: by autograd, or added to what is there."""
    model, mas = learned(3.0)
    expected = penalty_by_hand(mas, model)
    torch.testing.assert_close(mas.penalty(), expected)
    for task in (0.0, 1.0):  # with no gradient there, and with the loss's
        wanted = torch.autograd.grad(
            task * model(X).pow(2).mean() + penalty_by_hand(mas, model), list(model.parameters())
        )
        model.zero_grad()
        (task * model(X).pow(2).mean() + mas.penalty()).backward()
        torch.testing.assert_close(gradients(model), list(wanted), rtol=1e-12, atol=1e-15)
        model.zero_grad()
        if task:
            model(X).pow(2).mean().backward()
        torch.testing.assert_close(mas.add_penalty_grad_(), expected.detach())
        torch.testing.assert_close(gradients(model), list(wanted), rtol=1e-12, atol=1e-15)


def test_grad_scale_scales_the_gradient_and_not_the_value():
    model, mas = learned()
    value = mas.add_penalty_grad_()
    plain = gradients(model)
    model.zero_grad()
    assert mas.add_penalty_grad_(torch.tensor(8.0)) == value
    torch.testing.assert_close(gradients(model), [8 * g for g in plain])


def test_proximal_step_is_the_equation():
    model, mas = learned(3.0)
    c = {n: 0.5 * 3.0 * t for n, t in mas.importance.items()}
    expected = {
        n: (p.detach() + c[n] * mas.anchor[n]) / (1 + c[n]) for n, p in model.named_parameters()
    }
    value = mas.proximal_step_(0.5)
    assert_same(dict(model.named_parameters()), expected)
    torch.testing.assert_close(value, mas.penalty().detach())


@pytest.mark.parametrize("lambda_reg", [1e2, 1e6, 1e30])
@pytest.mark.parametrize("every", [1, 8])
def test_proximal_training_is_stable_at_any_strength(lambda_reg, every):
    model, mas = learned(lambda_reg)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = mas.attach(optimizer, "proximal", every)
    for _ in range(20):
        optimizer.zero_grad()
        model(X).pow(2).mean().backward()
        optimizer.step()
    handle.remove()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert mas.penalty() < 1e3


# -- Parameters that come, go and grow -------------------------------------------------------------
def test_frozen_parameters_are_kept_and_skipped():
    model, mas = learned()
    everything, omega = mas.penalty(), mas.importance["0.weight"].clone()
    before = model[0].weight.detach().clone()
    model[0].weight.requires_grad_(False)
    assert mas.add_penalty_grad_() < everything
    mas.proximal_step_(0.1)
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, before)
    move(model)
    mas.consolidate([X])
    assert torch.equal(mas.importance["0.weight"], omega)
    assert_same(mas.anchor, dict(model.named_parameters()), 0, 0)
    model[0].weight.requires_grad_(True)
    move(model)
    torch.testing.assert_close(mas.penalty(), penalty_by_hand(mas, model))


def test_parameters_may_become_trainable_between_tasks():
    model = mlp()
    model[0].requires_grad_(False)
    mas = MAS(model)
    mas.consolidate([X])
    assert set(mas.importance) == {"2.weight", "2.bias"}
    model[0].requires_grad_(True)
    move(model)
    mas.add_penalty_grad_()
    assert model[0].weight.grad is None, "not measured yet"
    before = mas.importance["2.weight"].clone()
    mas.consolidate([X])
    new = one_by_one(model, [X])
    torch.testing.assert_close(mas.importance["0.weight"], new["0.weight"])
    torch.testing.assert_close(mas.importance["2.weight"], before + new["2.weight"])


def test_a_head_may_grow_between_tasks():
    model, mas = learned()
    old_omega, old_anchor = copies(mas.importance)["2.weight"], copies(mas.anchor)["2.weight"]
    head = nn.Linear(8, 6).double()
    with torch.no_grad():
        head.weight[:4] = model[2].weight
        head.bias[:4] = model[2].bias
    before = mas.penalty()
    model[2] = head
    torch.testing.assert_close(mas.penalty(), before)
    assert torch.equal(mas.importance["2.weight"][:4], old_omega)
    assert not mas.importance["2.weight"][4:].any()
    assert torch.equal(mas.anchor["2.weight"][:4], old_anchor)
    assert torch.equal(mas.anchor["2.weight"][4:], head.weight[4:])
    mas.consolidate([X])
    torch.testing.assert_close(
        mas.importance["2.weight"][4:], one_by_one(model, [X])["2.weight"][4:]
    )


def test_a_head_may_grow_inside_an_open_task():
    model = mlp()
    mas = MAS(model)
    mas.update_importance([X])
    model[2] = nn.Linear(8, 6).double()
    mas.consolidate([X])
    assert mas.importance["2.weight"].shape == (6, 8)


def test_tied_parameters_are_penalised_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    mas = MAS(model)
    mas.consolidate([torch.randn(5, 4)])
    move(model)
    assert list(mas.importance) == ["0.weight"]
    torch.testing.assert_close(mas.penalty(), penalty_by_hand(mas, model))


def test_the_model_may_change_its_dtype():
    model, mas = learned()
    value = mas.penalty()
    model.float()
    torch.testing.assert_close(mas.penalty(), value.float())
    assert {t.dtype for t in mas.anchor.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_models(dtype):
    model, mas = learned(dtype=dtype)
    assert {t.dtype for t in mas.importance.values()} == {torch.float32}
    assert {t.dtype for t in mas.anchor.values()} == {dtype}
    assert mas.add_penalty_grad_() > 0
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


def test_wrapped_models_and_iterators_of_names():
    mas = MAS(nn.DataParallel(mlp()), params=iter(["0.*"]))
    for _ in range(2):
        mas.consolidate([X])
        assert set(mas.importance) == {"0.weight", "0.bias"}


def test_a_parameter_that_was_renamed_is_warned_of_once():
    model, mas = learned()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.warns(UserWarning, match=r"'0.weight' .*measured.*consolidate\(\)"):
        mas.penalty()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mas.penalty()


def test_a_task_may_end_inside_inference_mode():
    model = mlp()
    mas = MAS(model)
    with torch.inference_mode():
        mas.consolidate([X])
        for p in model.parameters():
            p.data.add_(0.1)
        mas.lambda_reg = 3.0
        mas.add_penalty_grad_()
    (model(X).sum() + mas.penalty()).backward()
    assert mas.penalty() > 0


def test_copies_and_pickles():
    model, mas = learned()
    mas.attach(torch.optim.SGD(model.parameters(), 0.1))
    for other in (copy.deepcopy(mas), pickle.loads(pickle.dumps(mas))):
        assert_states_equal(other.state_dict(), mas.state_dict())
        torch.testing.assert_close(other.penalty(), mas.penalty())


# -- Refusals: of a model that has learned a task, and is measured for the next --------------------
def half(data):
    yield data[:5]
    raise OSError("the disk is gone")


def consolidating_nothing(model, mas):
    mas = MAS(model)
    mas.update_importance([X])
    mas.consolidate()
    mas.consolidate()


def shrunk_in_the_first_task(model, mas):
    mas = MAS(model)
    mas.update_importance([X])
    before = mas.state_dict()["open"]
    model[2] = nn.Linear(8, 2).double()
    try:
        mas.consolidate()
    finally:
        assert_same(mas.state_dict()["open"], before, 0, 0)
        assert not mas.anchor


def shrunk(measure):
    def call(model, mas):
        model[2] = nn.Linear(8, 2).double()
        getattr(mas, measure)(*([[X]] if measure == "update_importance" else []))

    return call


UNMEASURABLE = {
    "complex": (lambda: complex_linear(), "'weight'", "view_as_real"),
    "lazy": (lambda: nn.LazyLinear(3), "'weight'", "one batch"),
}


def complex_linear():
    return nn.Linear(6, 2, dtype=torch.complex64)


@pytest.mark.parametrize("case", UNMEASURABLE)
@pytest.mark.parametrize("call", [MAS, lambda m: mas_ext.estimate_importance(m, [X])])
def test_parameters_without_importance_are_refused_by_name(case, call):
    make, *words = UNMEASURABLE[case]
    with pytest.raises(ValueError, match=words[0]) as raised:
        call(make())
    assert words[1] in str(raised.value)
    if case == "complex":
        model = nn.ModuleDict({"complex": make(), "real": nn.Linear(6, 2)})
        assert MAS(model, params="real.*").lambda_reg == 1


@pytest.mark.parametrize("optimizer", ["SGD", "SparseAdam"])
def test_sparse_gradients_and_the_dense_one_of_the_penalty(optimizer):
    """As (loss + penalty).backward() has it: their sum is dense."""
    torch.manual_seed(0)
    model, plain = (nn.Embedding(7, 3, sparse=True).double() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 2], [2, 5]])
    trained = []
    for m in (model, plain):
        mas = MAS(m, 2.0)
        mas.consolidate([ids + 1])
        sgd = getattr(torch.optim, optimizer)(m.parameters(), 0.1)
        mode = "gradient" if optimizer == "SGD" else "proximal"
        if m is model:
            mas.attach(sgd, mode, every=1)
        for _ in range(3):
            sgd.zero_grad()
            loss = (m(ids) - 1).square().sum()
            (loss + mas.penalty() if m is plain and mode == "gradient" else loss).backward()
            sgd.step()
            if m is plain and mode == "proximal":
                mas.proximal_step_(0.1)
        trained.append(m.weight.detach())
    torch.testing.assert_close(*trained)


def test_drift_by_pattern_outlives_a_new_lambda_with_the_same_patterns():
    drift = {"0.*": 0.1, "2.*": 0.3}
    mas = MAS(mlp(), dict.fromkeys(drift, "auto"), drift=drift)
    mas.lambda_reg = dict.fromkeys(drift, "auto")
    assert mas.drift == drift
    mas.lambda_reg = 3.0
    assert isinstance(mas.drift, float)


def test_a_name_may_look_like_a_glob():
    model = nn.ParameterDict(
        {"w[0]": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}
    )
    assert MAS(model, {"w[0]": 2.0, "*": 1.0}, params="w[0]").lambda_reg == {"w[0]": 2.0, "*": 1.0}


def by_batches(mas, measure, weighting="batches"):
    getattr(mas, measure)([X], estimator="batch", weighting=weighting)


REFUSALS = {
    "model": (lambda *_: MAS({}), TypeError, "model", "torch.nn.Module"),
    "no parameters": (lambda *_: MAS(nn.Tanh()), ValueError, "no parameter", "selected"),
    "params": (lambda *_: MAS(mlp(), params=["nothing"]), ValueError, "'nothing'", "parameter"),
    "none": (lambda *_: MAS(mlp(), params=lambda n, p: False), ValueError, "no parameter"),
    "state_dtype": (
        lambda *_: MAS(mlp(), state_dtype="int4"),
        ValueError,
        "state_dtype",
        "'uint8'",
    ),
    "nothing measured": (lambda m, _: MAS(m).consolidate(), RuntimeError, "data"),
    "nothing since": (consolidating_nothing, RuntimeError, "data", "update_importance"),
    "shrunk": (shrunk("consolidate"), ValueError, "'2.weight'", "[4, 8]", "params="),
    "shrunk in the first task": (shrunk_in_the_first_task, ValueError, "'2.weight'", "params="),
    "shrunk open": (shrunk("update_importance"), ValueError, "'2.weight'", "[2, 8]", "params="),
    **{
        f"{measure}: {why}": (lambda m, mas, f=measure, d=data: getattr(mas, f)(d()), kind, word)
        for measure in ("update_importance", "consolidate")
        for why, data, kind, word in (
            ("fails half-way", lambda: half(X), OSError, "disk"),
            ("NaN", lambda: [X * float("nan")], ValueError, "finite"),
            ("empty", lambda: [], ValueError, "samples"),
        )
    },
    **{
        f"{measure} by batches": (
            lambda m, mas, f=measure: by_batches(mas, f),
            ValueError,
            "weighting",
            "consolidate()",
        )
        for measure in ("update_importance", "consolidate")
    },
    "weighting": (
        lambda m, mas: by_batches(mas, "update_importance", "tasks"),
        ValueError,
        "weighting",
        "'batches'",
    ),
    **{
        f"lr {lr}": (lambda m, mas, lr=lr: mas.proximal_step_(lr), ValueError, "lr")
        for lr in (-0.1, float("nan"), float("inf"))
    },
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_change_nothing(case):
    model, mas = learned()
    mas.update_importance([X[:3]])
    before, parameters = mas.state_dict(), copies(model[0].state_dict())
    assert_refused(refusal(*REFUSALS[case]), model, mas)
    assert_states_equal(mas.state_dict(), before)
    assert_same(model[0].state_dict(), parameters, 0, 0)


def test_after_a_task_by_batches_comes_one_by_samples():
    model, how = mlp(), {"estimator": "batch", "weighting": "batches"}
    mas = MAS(model)
    mas.update_importance(X[:6].split(4), **how)
    mas.consolidate([X[6:]], **how)
    by_hand = mas_ext.estimate_importance(model, [X[:4], X[4:6], X[6:]], **how)
    assert_same(mas.importance, by_hand)
    mas.update_importance([X])


def test_public_names():
    assert set(mas_ext.__all__) >= {"MAS", "Importance", "estimate_importance", "build_info"}
