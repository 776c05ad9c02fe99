"""Class MAS against plain autograd, through the life of a model."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import mas_ext
from mas_ext import MAS
from mas_ext._state import checkpoint
from mas_ext._state.distributed_checkpoint import is_packed, unpacked
from tests.models import assert_same, mlp, oracle, vectors

X = vectors()


def learned(lambda_reg=2.0, **options):
    """A model whose parameters have moved since its only task ended."""
    model = mlp()
    mas = MAS(model, lambda_reg, **options)
    mas.consolidate([X])
    move(model)
    return model, mas


def move(model, by=0.1):
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


def by_hand(mas, model, lambda_reg):
    """λ/2 Σ Ω(θ−θ*)² as anyone would write it."""
    named = dict(model.named_parameters())
    return (
        lambda_reg
        / 2
        * sum((mas.importance[n] * (named[n] - mas.anchor[n]) ** 2).sum() for n in mas.anchor)
    )


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_grads(model, expected):
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-15)


# -- before, and after, a task -------------------------------------------------------------------


def test_nothing_is_protected_before_the_first_task():
    model = mlp()
    mas = MAS(model)
    assert dict(mas.importance) == dict(mas.anchor) == {}
    assert mas.penalty().item() == 0
    (model(X).sum() + mas.penalty()).backward()
    before = grads(model)
    assert mas.add_penalty_grad_().item() == 0
    assert_grads(model, before)
    parameters = copy.deepcopy(model.state_dict())
    assert mas.proximal_step_(0.1).item() == 0
    assert_same(model.state_dict(), parameters, 0, 0)
    mas.penalty().backward()


def test_update_importance_alone_protects_nothing():
    mas = MAS(mlp())
    mas.update_importance([X])
    assert mas.penalty().item() == 0
    assert not mas.anchor


def test_consolidate_measures_and_anchors():
    model = mlp()
    mas = MAS(model)
    mas.consolidate([X])
    assert mas.num_tasks == 1
    assert_same(mas.importance, oracle(model, X))
    assert_same(mas.anchor, dict(model.named_parameters()), 0, 0)
    assert mas.penalty().item() == 0


def test_updates_weigh_by_samples():
    model = mlp()
    mas = MAS(model)
    mas.update_importance([X[:7]])
    mas.update_importance(iter([X[7:9]]))
    mas.consolidate([X[9:]])
    assert_same(mas.importance, oracle(model, X))


def test_batches_and_samples_are_not_mixed_in_a_task():
    mas = MAS(mlp())
    mas.update_importance([X[:7]], estimator="batch", weighting="batches")
    before = mas.state_dict()
    for call in (mas.update_importance, mas.consolidate):
        with pytest.raises(ValueError, match=r"weighting: .* with 'batches' so far.*consolidate"):
            call([X[7:]])
        assert_states_equal(mas.state_dict(), before)
    with pytest.raises(ValueError, match=r"weighting: 'tasks' is unknown"):
        mas.update_importance([X], estimator="batch", weighting="tasks")
    mas.consolidate()
    mas.update_importance([X])


def test_consolidate_without_anything_measured_is_refused():
    mas = MAS(mlp())
    with pytest.raises(RuntimeError, match=r"pass data, or call update_importance"):
        mas.consolidate()
    mas.update_importance([X])
    mas.consolidate()
    with pytest.raises(RuntimeError, match="pass data"):
        mas.consolidate()


def test_importance_and_anchor_are_views():
    _model, mas = learned()
    before = mas.penalty()
    mas.importance["0.weight"].zero_()
    assert mas.penalty() < before
    with pytest.raises(TypeError):
        mas.importance["0.weight"] = torch.zeros(1)


def test_tasks_merge():
    for merge in ("sum", "mean", "max", ("ema", 0.3), ("ema_from_zero", 0.3), "sum_of_sums"):
        model = mlp()
        mas = MAS(model, merge=merge)
        mas.consolidate([X])
        first = {name: t.clone() for name, t in mas.importance.items()}
        move(model)
        mas.consolidate([X])
        second = oracle(model, X)
        expected = {
            "sum": lambda a, b: a + b,
            "mean": lambda a, b: (a + b) / 2,
            "max": torch.maximum,
            ("ema", 0.3): lambda a, b: 0.3 * a + 0.7 * b,
            ("ema_from_zero", 0.3): lambda a, b: 0.3 * a + 0.7 * b,  # a: 0.7 of the first
            "sum_of_sums": lambda a, b: a + b,
        }[merge]
        assert_same(mas.importance, {n: expected(first[n], second[n]) for n in first})
        assert_same(mas.anchor, dict(model.named_parameters()), 0, 0)


# -- the penalty ---------------------------------------------------------------------------------


def test_penalty_is_the_equation_and_its_gradient_is_autograds():
    model, mas = learned(3.0)
    expected = by_hand(mas, model, 3.0)
    (model(X).pow(2).mean() + expected).backward()
    wanted = grads(model)
    model.zero_grad()
    value = mas.penalty()
    torch.testing.assert_close(value, expected)
    (model(X).pow(2).mean() + value).backward()
    assert_grads(model, wanted)


def test_add_penalty_grad_is_what_autograd_gives():
    model, mas = learned(3.0)
    (model(X).pow(2).mean() + by_hand(mas, model, 3.0)).backward()
    wanted = grads(model)
    model.zero_grad()
    model(X).pow(2).mean().backward()
    torch.testing.assert_close(mas.add_penalty_grad_(), by_hand(mas, model, 3.0).detach())
    assert_grads(model, wanted)


def test_a_gradient_that_is_none_counts_as_zero():
    model, mas = learned()
    mas.add_penalty_grad_()
    by_addition = grads(model)
    model.zero_grad()
    mas.penalty().backward()
    assert_grads(model, by_addition)


def test_grad_scale_scales_the_gradient_and_not_the_value():
    model, mas = learned()
    value = mas.add_penalty_grad_()
    plain = grads(model)
    model.zero_grad()
    assert mas.add_penalty_grad_(torch.tensor(8.0)) == value
    assert_grads(model, [8 * g for g in plain])


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
def test_proximal_training_is_stable_at_any_strength(lambda_reg):
    model, mas = learned(lambda_reg)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mas.attach(optimizer, "proximal")
    for _ in range(20):
        optimizer.zero_grad()
        model(X).pow(2).mean().backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert mas.penalty() < 1e3


def test_lambda_may_change():
    _model, mas = learned(1.0)
    before = mas.penalty()
    mas.lambda_reg = 4.0
    torch.testing.assert_close(mas.penalty(), 4 * before)


# -- parameters that come, go and grow -----------------------------------------------------------


def test_frozen_parameters_are_kept_and_skipped():
    model, mas = learned()
    model[0].weight.requires_grad_(False)
    omega = mas.importance["0.weight"].clone()
    before = model[0].weight.detach().clone()
    everything = by_hand(mas, model, 2.0)
    assert mas.add_penalty_grad_() < everything
    mas.proximal_step_(0.1)
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, before)
    mas.consolidate([X])
    assert torch.equal(mas.importance["0.weight"], omega)
    model[0].weight.requires_grad_(True)
    move(model)
    torch.testing.assert_close(mas.penalty(), by_hand(mas, model, 2.0))


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
    new = oracle(model, X)
    torch.testing.assert_close(mas.importance["0.weight"], new["0.weight"])
    torch.testing.assert_close(mas.importance["2.weight"], before + new["2.weight"])


def test_a_head_may_grow_between_tasks():
    model, mas = learned()
    old_omega, old_anchor = mas.importance["2.weight"].clone(), mas.anchor["2.weight"].clone()
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
    torch.testing.assert_close(mas.importance["2.weight"][4:], oracle(model, X)["2.weight"][4:])


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
    torch.testing.assert_close(mas.penalty(), by_hand(mas, model, 1.0))


def test_the_model_may_change_its_dtype():
    model, mas = learned()
    value = mas.penalty()
    model.float()
    torch.testing.assert_close(mas.penalty(), value.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_models(dtype):
    model = mlp(dtype)
    mas = MAS(model, 2.0)
    mas.consolidate([vectors(dtype=dtype)])
    move(model)
    assert {t.dtype for t in mas.importance.values()} == {torch.float32}
    assert {t.dtype for t in mas.anchor.values()} == {dtype}
    assert mas.add_penalty_grad_() > 0
    assert {p.grad.dtype for p in model.parameters()} == {dtype}


def test_compiled_and_wrapped_models_share_names():
    mas = MAS(nn.DataParallel(mlp()))
    mas.consolidate([X])
    assert set(mas.importance) == set(oracle(mlp(), X))


def test_a_parameter_that_was_renamed_is_warned_of_once():
    model, mas = learned()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.warns(UserWarning, match=r"'0.weight' \(1 in all\) was measured and is no longer"):
        mas.penalty()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mas.penalty()


def test_params_may_be_an_iterator():
    mas = MAS(mlp(), params=iter(["0.*"]))
    mas.consolidate([X])
    mas.consolidate([X])
    assert set(mas.importance) == {"0.weight", "0.bias"}


def test_a_task_may_end_inside_inference_mode():
    model = mlp()
    mas = MAS(model)
    with torch.inference_mode():
        mas.consolidate([X])
        move_in_place(model)
        mas.add_penalty_grad_()
    (model(X).sum() + mas.penalty()).backward()
    assert mas.penalty() > 0


def move_in_place(model):
    for p in model.parameters():
        p.data.add_(0.1)


def test_copies_and_pickles():
    model, mas = learned()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mas.attach(optimizer)
    for other in (copy.deepcopy(mas), pickle.loads(pickle.dumps(mas))):
        assert_states_equal(other.state_dict(), mas.state_dict())
        torch.testing.assert_close(other.penalty(), mas.penalty())
    assert_same(copy.deepcopy(mas.importance), dict(mas.importance))


def test_a_parameter_that_shrank_inside_an_open_task_is_refused_before_anything_is_written():
    model, mas = learned()
    mas.update_importance([X])
    before = mas.state_dict()
    model[2] = nn.Linear(8, 2).double()
    for call in (mas.consolidate, lambda: mas.update_importance([X])):
        with pytest.raises(ValueError, match=r"'2.weight' had shape \[4, 8\] and now has \[2, 8\]"):
            call()
        assert_states_equal(mas.state_dict(), before)


# -- bad input -----------------------------------------------------------------------------------

BAD_ARGUMENTS = {
    "negative lambda": ({"lambda_reg": -1.0}, ValueError, "lambda_reg is -1.0"),
    "NaN lambda": ({"lambda_reg": float("nan")}, ValueError, "lambda_reg is nan"),
    "infinite lambda": ({"lambda_reg": float("inf")}, ValueError, "lambda_reg is inf"),
    "lambda a string": ({"lambda_reg": "strong"}, TypeError, "lambda_reg is 'strong'"),
    "merge": ({"merge": "median"}, ValueError, "merge: 'median' is unknown; use 'sum'"),
    "alpha": ({"merge": ("ema", 1.5)}, ValueError, r"alpha .* is 1.5; it must be in \[0, 1\)"),
    "state_dtype": ({"state_dtype": "int4"}, ValueError, "state_dtype: 'int4'.*'float32'"),
    "params": ({"params": ["nothing"]}, ValueError, "'nothing' matches no parameter"),
    "none selected": ({"params": lambda n, p: False}, ValueError, "no parameter is selected"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case):
    options, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        MAS(mlp(), **options)


def test_a_model_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"model is a dict; pass a torch.nn.Module"):
        MAS({})
    with pytest.raises(ValueError, match="no parameter is selected"):
        MAS(nn.Tanh())


def test_setting_a_bad_lambda_keeps_the_old_one():
    mas = MAS(mlp(), 2.0)
    with pytest.raises(ValueError, match="lambda_reg is -3"):
        mas.lambda_reg = -3
    assert mas.lambda_reg == 2.0


def half(data):
    yield data[:5]
    raise OSError("the disk is gone")


@pytest.mark.parametrize("measure", ["update_importance", "consolidate"])
@pytest.mark.parametrize(
    ("data", "error"),
    [
        (lambda: half(X), OSError),
        (lambda: [X * float("nan")], ValueError),
        (lambda: [], ValueError),
    ],
    ids=["fails half-way", "NaN", "empty"],
)
def test_a_failed_measurement_changes_nothing(measure, data, error):
    _model, mas = learned()
    mas.update_importance([X[:3]])
    before = mas.state_dict()
    with pytest.raises(error):
        getattr(mas, measure)(data())
    assert_states_equal(mas.state_dict(), before)


def assert_states_equal(a, b):
    a, b = (unpacked(state) if is_packed(state) else state for state in (a, b))
    assert a.keys() == b.keys()
    for key, value in a.items():
        if key in checkpoint.TENSORS:
            assert_same(value, b[key], 0, 0)
        else:
            assert value == b[key], key


def test_errors_of_operators_name_the_parameter():
    model, mas = learned()
    model(X).sum().backward()
    model[2].weight.grad = model[2].weight.grad.to_sparse()
    others = [p.grad.clone() for p in model.parameters() if not p.grad.is_sparse]
    with pytest.raises(RuntimeError, match=r"\('2.weight'\) is not a dense .* to_dense"):
        mas.add_penalty_grad_()
    after = [p.grad for p in model.parameters() if not p.grad.is_sparse]
    assert all(torch.equal(a, b) for a, b in zip(after, others, strict=True))


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf")])
def test_a_bad_learning_rate_moves_nothing(lr):
    model, mas = learned()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="lr is"):
        mas.proximal_step_(lr)
    assert_same(model.state_dict(), before, 0, 0)


def test_public_names():
    assert set(mas_ext.__all__) >= {"MAS", "Importance", "estimate_importance", "build_info"}
