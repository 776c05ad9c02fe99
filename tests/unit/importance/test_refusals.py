"""What cannot be measured raises an error that says what to do, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mas_ext
from mas_ext import MAS, estimate_importance
from tests.support.regularizers import assert_states_equal
from tests.support.unchanged import snapshot
from tests.support.zoo.layers import Net
from tests.support.zoo.small import mlp, vectors

X = vectors()
Y = torch.arange(10) % 4
ALL = ("per_sample", "batch", "local")
GRADIENTS, EXACT, LOCAL = ALL[:2], ALL[:1], ALL[2:]


class Refusal(NamedTuple):
    kind: type[Exception]
    words: tuple[str, ...]
    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    estimators: tuple[str, ...]
    options: dict[str, Any]


def refused(
    kind: type[Exception],
    *words: str,
    model: Callable[[], nn.Module] = mlp,
    data: Callable[[], Any] = lambda: [X],
    by: tuple[str, ...] = ALL,
    **options: Any,
) -> Refusal:
    """``words`` are what the message must hold: the name of what is wrong, and the remedy."""
    return Refusal(kind, words, model, data, by, options)


FISHERS = ("fisher", "exact_fisher", "empirical_fisher")


def of_linear(function: Callable[[Net, Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(function, layer=nn.Linear(6, 2)).double()


def with_nan_input() -> Tensor:
    x = X.clone()
    x[3, 0] = float("nan")
    return x


def with_nan_parameter() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    return model


def frozen() -> nn.Module:
    return mlp().requires_grad_(False)


def batch_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)).double()


def table_too() -> nn.Module:
    """The layer also works on a table that is no sample's."""
    parts = {"layer": nn.Linear(6, 2), "table": (6,)}
    return Net(lambda m, x: m.layer(x) + m.layer(m.table), **parts).double()


def standing(m: Net, x: Tensor) -> Tensor:
    """The layer's rows are no samples."""
    return m.layer(x.view(20, 3, 1).expand(20, 3, 2).flatten(1)).view(10, 4)


REFUSALS = {
    # data
    "empty data": refused(ValueError, "data", "no samples", data=lambda: []),
    "an exhausted iterator": refused(ValueError, "data", "no samples", data=lambda: iter([])),
    "zero samples": refused(ValueError, "data", "no samples", data=lambda: [X[:0]]),
    "a tensor": refused(TypeError, "data", "Tensor", "[batch]", data=lambda: X),
    "a mapping": refused(TypeError, "data", "dict", "[batch]", data=lambda: {"x": X}),
    "a number": refused(TypeError, "data", "int", data=lambda: 3),
    "an unusual batch": refused(TypeError, "data", "str", "forward=", data=lambda: ["text"]),
    "an empty batch": refused(TypeError, "data", "empty tuple", "forward=", data=lambda: [()]),
    "no tensor": refused(TypeError, "data", "forward=", data=lambda: [{"x": 3}]),
    "NaN inputs": refused(ValueError, "'0.weight'", "NaN", data=lambda: [with_nan_input()]),
    # the model and its output
    "a NaN parameter": refused(
        ValueError, "'2.weight'", "holds NaN", model=with_nan_parameter, by=GRADIENTS
    ),
    "NaN gradients": refused(
        *(ValueError, "'0.weight'", "NaN", "objective"),
        objective=lambda y: (y - y.detach()).sum(1).sqrt(),
        by=GRADIENTS,
    ),
    "NaN of a layer": refused(
        *(ValueError, "'layer.weight'", "NaN"),
        model=of_linear(lambda m, x: m.layer(x)),
        forward=lambda m, x: m(x / 0),
        by=LOCAL,
    ),
    "a scalar": refused(
        ValueError, "sample dim", "forward=", model=of_linear(lambda m, x: m.layer(x).sum())
    ),
    "averaged samples": refused(
        ValueError, "sample dim", "forward=", model=of_linear(lambda m, x: m.layer(x).mean(0))
    ),
    "integers": refused(TypeError, "dtype", "floating", forward=lambda m, b: m(b).long()),
    "no tensor out": refused(TypeError, "str", "forward=", forward=lambda m, b: "y"),
    "batch statistics": refused(
        ValueError, "'1'", "track_running_stats=True", model=batch_statistics
    ),
    "reentrant checkpointing": refused(
        *(ValueError, "use_reentrant=False"),
        model=of_linear(lambda m, x: checkpoint(m.layer, x, use_reentrant=True)),
        by=GRADIENTS,
    ),
    "random numbers": refused(
        *(ValueError, "random", "dropout"),
        model=of_linear(lambda m, x: F.dropout(m.layer(x), 0.5)),
        by=EXACT,
    ),
    "no parameters": refused(ValueError, "parameter", "requires_grad", model=frozen),
    "detached": refused(
        ValueError, "objective", "detaches", objective=lambda y: y.detach().sum(1), by=GRADIENTS
    ),
    "no gradients": refused(
        ValueError, "forward", "no_grad", forward=torch.no_grad()(lambda m, b: m(b)), by=GRADIENTS
    ),
    # arguments
    "forward": refused(TypeError, "forward", "callable", forward=3),
    "params, unknown": refused(ValueError, "params", "head.*", params=["head.*"]),
    "params, a number": refused(TypeError, "params", "globs", params=[3]),
    "on meta": refused(
        ValueError, "'weight'", "to_empty()", model=lambda: nn.Linear(6, 3, device="meta")
    ),
    "estimator": refused(ValueError, "estimator", "'per_sample'", by=("fisher",)),
    "objective": refused(ValueError, "objective", "'squared_l2'", objective="l3", by=GRADIENTS),
    "objective's shape": refused(
        ValueError, "objective", "[10]", objective=lambda y: y, by=GRADIENTS
    ),
    "objective's kind": refused(
        ValueError, "objective", "float", objective=lambda y: 1.0, by=GRADIENTS
    ),
    "objective, a list": refused(ValueError, "objective", "'l1'", objective=[], by=GRADIENTS),
    "one probability": refused(
        *(ValueError, "objective", "[10, 1]"),
        model=lambda: nn.Linear(6, 1).double(),
        objective="probabilities",
        by=GRADIENTS,
    ),
    **{
        f"reduction {value}": refused(ValueError, "reduction", "'square'", reduction=value)
        for value in ("cube", 2, [], True)
    },
    **{
        f"criterion {value}": refused(
            ValueError, "criterion", "'exact_fisher'", criterion=value, by=GRADIENTS
        )
        for value in ("ewc", None, [], 3)
    },
    **{
        f"draws {value}": refused(
            ValueError, "draws", criterion="fisher", draws=value, by=GRADIENTS
        )
        for value in (0, -1, 1.5, True, "2", None)
    },
    **{f"seed {value}": refused(ValueError, "seed", seed=value) for value in (-1, 0.5, True, None)},
    **{
        f"draws of {criterion}": refused(
            ValueError, "draws", "'fisher'", criterion=criterion, draws=2, by=GRADIENTS
        )
        for criterion in ("mas", "empirical_fisher", "exact_fisher")
    },
    "draws of a callable": refused(
        ValueError, "draws", criterion=lambda y, batch: y.sum(1), draws=2, by=GRADIENTS
    ),
    "objective of a Fisher": refused(
        ValueError, "objective", "'mas'", criterion="fisher", objective="l1", by=GRADIENTS
    ),
    "criterion's shape": refused(
        ValueError, "criterion", "[10]", criterion=lambda y, batch: y, by=GRADIENTS
    ),
    "criterion's kind": refused(
        ValueError, "criterion", "float", criterion=lambda y, batch: 1.0, by=GRADIENTS
    ),
    "criterion, detached": refused(
        ValueError, "criterion", criterion=lambda y, batch: y.detach().sum(1), by=GRADIENTS
    ),
    **{
        f"a criterion, {estimator}": refused(
            ValueError, "criterion", "per_sample", criterion=criterion, by=LOCAL
        )
        for estimator, criterion in (("local", "fisher"), ("local too", lambda y, batch: y.sum(1)))
    },
    # what a criterion needs
    **{
        f"one class, {criterion}": refused(
            *(ValueError, "criterion", "[10, 1]", "gauss_newton"),
            model=lambda: nn.Linear(6, 1).double(),
            data=lambda: [(X, Y)],
            criterion=criterion,
            by=GRADIENTS,
        )
        for criterion in FISHERS
    },
    **{
        f"two outputs, {criterion}": refused(
            *(ValueError, "criterion", "output[1]", "forward="),
            model=of_linear(lambda m, x: (m.layer(x), m.layer(x))),
            data=lambda: [(X, Y % 2)],
            criterion=criterion,
            by=GRADIENTS,
        )
        for criterion in FISHERS
    },
    **{
        f"NaN, {criterion}": refused(
            *(ValueError, "'0.weight'", "NaN"),
            data=lambda: [(X, Y), (with_nan_input(), Y)],
            criterion=criterion,
            by=GRADIENTS,
        )
        for criterion in (*FISHERS, "gauss_newton")
    },
    "classes of several predictions": refused(
        *(ValueError, "exact_fisher", "'fisher'", "[5, 2, 4]"),
        model=lambda: nn.Linear(6, 4).double(),
        data=lambda: [X.view(5, 2, 6)],
        criterion="exact_fisher",
        by=GRADIENTS,
    ),
    "classes before positions": refused(
        *(ValueError, "[B, C, T]", "transpose(1, 2)"),
        model=lambda: nn.Conv1d(6, 4, 1).double(),
        data=lambda: [(X.view(5, 2, 6).mT, Y.view(5, 2))],
        criterion="fisher",
        by=GRADIENTS,
    ),
    **{
        f"labels: {name}": refused(
            *(ValueError, "empirical_fisher", *words),
            data=lambda batch=batch: [batch],
            criterion="empirical_fisher",
            by=GRADIENTS,
        )
        for name, batch, *words in (
            ("none", X, "labels", "[10, 4]"),
            ("none in a mapping", {"input": X}, "labels"),
            ("none in a tuple", (X,), "labels"),
            ("a column", (X, Y[:, None]), "labels"),
            ("too few", (X, Y[:9]), "labels"),
            ("one hot numbers", (X, F.one_hot(Y, 4)), "labels"),
            ("numbers with a point", (X, Y.double()), "labels"),
            ("as many as classes", (X[:4], torch.rand(4)), "labels"),
            ("complex", (X, torch.zeros(10, 4, dtype=torch.complex64)), "labels"),
            ("other classes", (X, torch.rand(10, 3)), "labels"),
            ("text", (X, ["a"] * 10), "labels"),
            ("one of three items", (X, Y, torch.zeros_like(Y)), "3 items"),
            ("of a regression", (X, X[:, :4]), "probabilities", "gauss_newton"),
            ("too large", (X, Y + 1), "label 4", "4 classes"),
            ("negative", {"input": X, "labels": Y - 1}, "label -1"),
        )
    },
    "max_samples": refused(ValueError, "max_samples", "positive", max_samples=0),
    "max_samples, a float": refused(ValueError, "max_samples", max_samples=1.5),
    "progress": refused(TypeError, "progress", "True", progress=3),
    "weighting": refused(
        *(ValueError, "weighting", "estimator='batch'"), weighting="batches", by=EXACT + LOCAL
    ),
    "weighting, unknown": refused(ValueError, "weighting", "'samples'", weighting="tasks"),
    "training": refused(
        *(ValueError, "training", "estimator='batch'"), training=True, by=EXACT + LOCAL
    ),
    "training, a string": refused(TypeError, "training", "True", training="no"),
    # the local estimator
    "objective, local": refused(ValueError, "objective", "per_sample", objective="l2", by=LOCAL),
    "a callable, local": refused(
        ValueError, "objective", "per_sample", objective=lambda y: y.sum(1), by=LOCAL
    ),
    "no layers": refused(
        ValueError, "Linear", "per_sample", model=lambda: nn.LayerNorm(6).double(), by=LOCAL
    ),
    "no layer measured": refused(
        *(ValueError, "Linear", "per_sample"),
        model=lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)).double(),
        params=["1.*"],
        by=LOCAL,
    ),
    "a layer not called": refused(
        *(ValueError, "called", "per_sample"),
        model=of_linear(lambda m, x: x @ m.layer.weight.T),
        by=LOCAL,
    ),
    "rows that are not samples": refused(
        *(ValueError, "'layer.weight'", "one sample"),
        model=of_linear(standing),
        forward=lambda m, x: m(x),
        by=LOCAL,
    ),
    "a use without samples": refused(
        *(ValueError, "'layer.weight'", "one sample"),
        model=table_too,
        forward=lambda m, x: m(x),
        by=LOCAL,
    ),
}

CASES = [(name, estimator) for name, row in REFUSALS.items() for estimator in row.estimators]


@pytest.mark.parametrize(("name", "estimator"), CASES)
def test_refusals_name_the_remedy_and_change_nothing(name, estimator):
    row = REFUSALS[name]
    model, options = row.model(), {"estimator": estimator, **row.options}
    before = snapshot(model)
    with pytest.raises(row.kind) as raised:
        estimate_importance(model, row.data(), **options)
    missing = [word for word in row.words if word not in str(raised.value)]
    assert not missing, str(raised.value)
    assert_states_equal(snapshot(model), before)
    if "params" not in options and any(p.requires_grad for p in model.parameters()):
        mas = MAS(model)
        state = mas.state_dict()
        with pytest.raises(row.kind):
            mas.update_importance(row.data(), **options)
        assert_states_equal(mas.state_dict(), state)


# -- Errors half-way -------------------------------------------------------------------------------
OVERFLOWS = {  # at 4e4 the output still fits into float16, and twice its value does not
    "output": 1e5,
    "gradient": 4e4,
}


@pytest.mark.parametrize("scale", OVERFLOWS.values(), ids=OVERFLOWS)
@pytest.mark.parametrize("first", [1.0, None], ids=["second batch", "first batch"])
def test_overflow_in_float16_is_an_error_that_changes_nothing(scale, first):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    for p in model.parameters():
        nn.init.ones_(p)
    mas = MAS(model)
    mas.update_importance([torch.ones(3, 2)])
    before = mas.state_dict()
    batches = [torch.full((4, 2), s / 4) for s in (first, scale) if s is not None]
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=r"'[01]\.weight'"):
        mas.update_importance(batches)
    assert_states_equal(mas.state_dict(), before)


PRESETS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "name": (lambda: mas_ext.preset("si"), ("preset", "'si'", "'paper'")),
    "alpha of a sum": (lambda: mas_ext.preset("paper", alpha=0.5), ("alpha", "'paper'", "leave")),
    "alpha": (lambda: mas_ext.preset("facil", alpha=-1), ("alpha", "[0, 1)")),
    "lambda_reg": (lambda: mas_ext.preset("paper").regularizer(-1.0), ("lambda_reg", "-1.0")),
}


@pytest.mark.parametrize("case", PRESETS)
def test_presets_refuse(case):
    call, words = PRESETS[case]
    with pytest.raises(ValueError, match=words[0]) as raised:
        call()
    assert all(word in str(raised.value) for word in words)
