"""EWC and L2-SP: what differs from MAS, which is how Ω is measured."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mas_ext import EWC, L2SP, MAS, DriftBudget, estimate_importance
from mas_ext.quadratic import QuadraticRegularizer
from tests.support.oracle import assert_exact, one_by_one
from tests.support.regularizers import (
    assert_bits,
    assert_refused,
    assert_states_equal,
    move,
    penalty_by_hand,
    plain_state,
    refusal,
    train,
)
from tests.support.zoo.small import assert_same, mlp, vectors

X = vectors()
Y = torch.arange(10) % 4
PAIRS = [(X[:4], Y[:4]), (X[4:], Y[4:])]
METHODS = {"MAS": MAS, "EWC": EWC, "L2SP": L2SP}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def learned(method: type, *arguments: Any, **options: Any) -> tuple[nn.Module, Any]:
    """After a task; parameters have moved since."""
    model = mlp()
    regularizer = method(model, *arguments, **options)
    regularizer.consolidate(PAIRS)
    move(model)
    return model, regularizer


# -- What they measure -----------------------------------------------------------------------------
OPTIONS: dict[str, dict[str, Any]] = {
    "fisher": {"criterion": "fisher", "seed": 4, "draws": 3},
    "exact": {"criterion": "exact_fisher"},
    "empirical": {"criterion": "empirical_fisher"},
    "of a callable": {"criterion": lambda output, batch: output[:, 0]},
    "abs": {"reduction": "abs"},
    "batch": {"estimator": "batch", "weighting": "batches"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_ewc_measures_a_fisher_information_and_takes_all_options(case):
    model = mlp()
    ewc, options = EWC(model), {"criterion": "fisher", "reduction": "square", **OPTIONS[case]}
    ewc.consolidate(PAIRS, **OPTIONS[case])
    assert_same(ewc.importance, dict(estimate_importance(model, PAIRS, **options)), 0, 0)
    assert_same(ewc.anchor, dict(model.named_parameters()), 0, 0)


def test_ewc_sums_the_information_of_tasks():
    model = mlp()
    ewc, expected = EWC(model, 3.0), []
    for data in ([(X, Y)], [(2 * X, Y)]):
        log_p = {"forward": lambda m, b: m(b[0]), "criterion": likelihood}
        expected.append(one_by_one(model, data, reduction="square", **log_p))
        ewc.consolidate(data, criterion="empirical_fisher")
        move(model)
    assert_exact(ewc.importance, {n: expected[0][n] + expected[1][n] for n in expected[0]})
    torch.testing.assert_close(ewc.penalty(), penalty_by_hand(ewc, model, 3.0))


def likelihood(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1], reduction="none")


def test_l2sp_has_importance_1():
    model, l2sp = learned(L2SP, 3.0)
    moved = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        assert_same(l2sp.importance, {n: torch.ones_like(p) for n, p in moved.items()})
        distance = sum((p - l2sp.anchor[n]).square().sum() for n, p in model.named_parameters())
        torch.testing.assert_close(l2sp.penalty(), 1.5 * distance)
        l2sp.consolidate()
        assert l2sp.penalty() == 0
        move(model)
    assert l2sp.num_tasks == 4


@EACH
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_the_fused_optimizers_take_each_method(method: type, kind: str, mode: str) -> None:
    ends = []
    for is_ours in (False, True):
        model, regularizer = learned(method, 3.0)
        last = train(model, regularizer, kind, mode, is_ours)
        ends.append([*model.parameters(), last])
    torch.testing.assert_close(*ends)


def never() -> Iterator[Any]:
    raise AssertionError("the data was read")
    yield


def test_l2sp_reads_data_only_under_a_budget():
    L2SP(mlp()).consolidate(never())
    with pytest.raises(AssertionError, match="was read"):
        L2SP(mlp(), budget=0.1).consolidate(never())
    read: list[int] = []

    def counted() -> Iterator[Tensor]:
        for x in X.split(2):
            read.append(len(x))
            yield x

    l2sp = L2SP(mlp(), budget=0.1)
    l2sp.consolidate(counted(), max_samples=5)
    assert sum(read) == 6
    assert l2sp.drift_measured() == pytest.approx(0, abs=1e-6)


def test_l2sp_follows_parameters_that_rest_and_grow():
    model = mlp()
    model[0].requires_grad_(False)
    l2sp = L2SP(model)
    l2sp.consolidate()
    assert set(l2sp.importance) == {"2.weight", "2.bias"}
    model[0].requires_grad_(True)
    head = nn.Linear(8, 6).double()
    with torch.no_grad():
        head.weight[:4], head.bias[:4] = model[2].weight, model[2].bias
    model[2] = head
    assert l2sp.penalty() == 0
    assert not l2sp.importance["2.weight"][4:].any()
    l2sp.consolidate()
    assert all((omega == 1).all() for omega in l2sp.importance.values())
    assert len(l2sp.importance) == 4


# -- States ----------------------------------------------------------------------------------------
def by_file(one: QuadraticRegularizer, other: QuadraticRegularizer, folder: Any) -> None:
    one.save(folder / "state")
    other.load(folder / "state")


def by_state_dict(one: QuadraticRegularizer, other: QuadraticRegularizer, folder: Any) -> None:
    torch.save(one.state_dict(), folder / "state.pt")
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))


@EACH
@pytest.mark.parametrize("load", [by_file, by_state_dict])
@pytest.mark.parametrize("budget", [None, 0.05])
@pytest.mark.filterwarnings("ignore:budget:UserWarning")
def test_a_saved_state_goes_on_to_the_same_bits(tmp_path, method, load, budget):
    model, first = learned(method, budget=budget)
    first.update_importance(PAIRS)
    other = copy.deepcopy(model)
    second = method(other, budget=budget)
    load(first, second, tmp_path)
    for trained, regularizer in ((model, first), (other, second)):
        regularizer.update_importance(PAIRS)
        regularizer.consolidate()
        move(trained)
        regularizer.consolidate(PAIRS)
        regularizer.add_penalty_grad_()
    assert_states_equal(plain_state(second), plain_state(first))
    assert second.lambda_reg == first.lambda_reg
    assert_bits(other, model)


@EACH
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_and_pickles(method, copied):
    model, regularizer = learned(method, budget=0.05)
    _, its = copied((model, regularizer))
    assert type(its) is method
    assert repr(its).startswith(method.__name__)
    assert_states_equal(its.state_dict(), regularizer.state_dict())
    torch.testing.assert_close(its.penalty(), regularizer.penalty())
    its.consolidate(PAIRS)
    assert (its.num_tasks, regularizer.num_tasks) == (2, 1)


# -- Refusals --------------------------------------------------------------------------------------
BAD = [(X, Y), (X * float("nan"), Y)]
OTHER_KEYS = ("estimator", "criterion", "objective", "reduction", "seed", "checkpoint", "progress")
REFUSALS: dict[str, tuple[Any, ...]] = {
    **{
        f"{name} measured otherwise": (method, lambda r, o=o: r.update_importance([X], **o), *words)
        for name, method, o, *words in (
            ("EWC", EWC, {"reduction": "abs"}, ValueError, "reduction", "'square'", "'abs'"),
            ("MAS", MAS, {"criterion": "fisher"}, ValueError, "reduction", "'square'", "'abs'"),
            ("MAS again", MAS, {"reduction": "square"}, ValueError, "reduction"),
        )
    },
    **{
        f"{name}: NaN": (method, lambda r: r.consolidate(BAD), ValueError, "'0.weight'")
        for name, method in METHODS.items()
        if method is not L2SP
    },
    "EWC: labels": (
        EWC,
        lambda r: r.consolidate([X], criterion="empirical_fisher"),
        *(ValueError, "labels"),
    ),
    "EWC: auto later": (
        EWC,
        lambda r: setattr(r, "lambda_reg", "auto"),
        *(ValueError, "auto", "budget"),
    ),
    "L2SP: auto later": (
        L2SP,
        lambda r: setattr(r, "lambda_reg", {"0.*": "auto", "*": 1.0}),
        *(ValueError, "auto", "budget"),
    ),
    "EWC: a keyword": (EWC, lambda r: r.consolidate(PAIRS, sed=3), TypeError, "'sed'", "seed"),
    "L2SP: a tensor": (L2SP, lambda r: r.consolidate(X), TypeError, "data"),
    "L2SP: max_samples": (
        L2SP,
        lambda r: r.consolidate(PAIRS, max_samples=0),
        *(ValueError, "max_samples"),
    ),
    "L2SP: forward": (L2SP, lambda r: r.consolidate(PAIRS, forward=3), TypeError, "forward"),
    **{
        f"L2SP: {key}": (
            L2SP,
            lambda r, key=key: r.consolidate(PAIRS, **{key: None}),
            *(TypeError, repr(key), "max_samples"),
        )
        for key in OTHER_KEYS
    },
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_change_nothing(case):
    method, call, *expected = REFUSALS[case]
    model, regularizer = learned(method)
    regularizer.update_importance(PAIRS[:1])
    before = copy.deepcopy(model), regularizer.lambda_reg
    assert_refused(refusal(call, *expected), regularizer, unchanged=(regularizer,))
    assert_bits(model, before[0])
    assert regularizer.lambda_reg == before[1]
    regularizer.consolidate(PAIRS)


@pytest.mark.parametrize("method", [EWC, L2SP])
@pytest.mark.parametrize("strength", ["auto", {"0.*": "auto", "*": 1.0}], ids=["all", "a pattern"])
def test_auto_without_a_budget_is_refused(method, strength):
    case = refusal(lambda: method(mlp(), strength), ValueError, "auto", "budget", method.__name__)
    assert_refused(case)
    method(mlp(), strength, budget=0.1).consolidate(PAIRS)


def test_auto_does_not_go_with_squares():
    mas = MAS(mlp(), "auto")
    case = refusal(
        lambda: mas.consolidate(PAIRS, criterion="fisher"), ValueError, "auto", "reduction='square'"
    )
    assert_refused(case, unchanged=(mas,))


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(METHODS, 2)])
def test_another_method_does_not_go_on(first, second):
    _, regularizer = learned(METHODS[first])
    other = METHODS[second](mlp())
    state = regularizer.state_dict()
    case = refusal(other.load_state_dict, ValueError, METHODS[first].__name__)
    assert_refused(case, state, unchanged=(other,))


def test_a_measurement_that_failed_does_not_say_how_the_next_one_counts():
    mas = MAS(mlp())
    with pytest.raises(ValueError, match="finite"):
        mas.update_importance([X * float("nan")], reduction="square")
    mas.consolidate([X])
    assert_exact(mas.importance, one_by_one(mlp(), [X]))


def test_mas_may_square_and_go_on_squaring():
    model = mlp()
    mas = MAS(model)
    mas.update_importance([X[:4]], reduction="square")
    mas.consolidate([X[4:]], reduction="square")
    assert_exact(mas.importance, one_by_one(model, [X], reduction="square"))


# -- Budgets ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", ["importance", "uniform"])
def test_l2sp_settles_on_the_straight_line(weights):
    model, l2sp = learned(L2SP, budget=DriftBudget(1e-3))
    end = {name: p.detach().clone() for name, p in model.named_parameters()}
    settled = l2sp.settle(weights=weights)
    assert settled.after <= 1e-3 < settled.before
    part = settled.c / (1 + settled.c)
    expected = {n: torch.lerp(p, l2sp.anchor[n].to(p), part) for n, p in end.items()}
    assert_same(dict(model.named_parameters()), expected)


def test_ewc_settles_by_its_importance():
    model, ewc = learned(EWC, budget=DriftBudget(1e-3))
    end = {name: p.detach().clone() for name, p in model.named_parameters()}
    settled, omega = ewc.settle(), ewc.importance
    assert settled.after <= 1e-3 < settled.before
    expected = {
        n: (p + settled.c * omega[n] * ewc.anchor[n]) / (1 + settled.c * omega[n])
        for n, p in end.items()
    }
    assert_same(dict(model.named_parameters()), expected)
