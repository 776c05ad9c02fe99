"""What cannot be measured raises an error that says what to do, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
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
ALL = ("per_sample", "batch", "local")


class Refusal(NamedTuple):
    """``words`` are what the message must hold: the name of what is wrong, and the remedy."""

    kind: type[Exception]
    words: tuple[str, ...]
    model: Callable[[], nn.Module] = mlp
    data: Callable[[], Any] = lambda: [X]
    options: Mapping[str, Any] = MappingProxyType({})
    estimators: tuple[str, ...] = ALL


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
    return Net(lambda m, x: m.layer(x) + m.layer(m.table), layer=nn.Linear(6, 2), table=(6,))


GRADIENTS = ("per_sample", "batch")
EXACT = ("per_sample",)
LOCAL = ("local",)

REFUSALS: dict[str, Refusal] = {
    # data
    "empty data": Refusal(ValueError, ("data", "no samples"), data=lambda: []),
    "an exhausted iterator": Refusal(ValueError, ("data", "no samples"), data=lambda: iter([])),
    "zero samples": Refusal(ValueError, ("data", "no samples"), data=lambda: [X[:0]]),
    "a tensor": Refusal(TypeError, ("data", "Tensor", "[batch]"), data=lambda: X),
    "a mapping": Refusal(TypeError, ("data", "dict", "[batch]"), data=lambda: {"x": X}),
    "a number": Refusal(TypeError, ("data", "int"), data=lambda: 3),
    "an unusual batch": Refusal(TypeError, ("data", "str", "forward="), data=lambda: ["text"]),
    "an empty batch": Refusal(TypeError, ("data", "empty tuple", "forward="), data=lambda: [()]),
    "no tensor": Refusal(TypeError, ("data", "forward="), data=lambda: [{"x": 3}]),
    "NaN inputs": Refusal(
        ValueError, ("'0.weight'", "NaN"), data=lambda: [with_nan_input()], estimators=GRADIENTS
    ),
    "NaN inputs, local": Refusal(
        ValueError, ("'0.weight'", "NaN"), data=lambda: [with_nan_input()], estimators=LOCAL
    ),
    # the model and its output
    "a NaN parameter": Refusal(
        ValueError, ("'2.weight'", "holds NaN"), with_nan_parameter, estimators=GRADIENTS
    ),
    "NaN gradients": Refusal(
        *(ValueError, ("'0.weight'", "NaN", "objective")),
        options={"objective": lambda y: (y - y.detach()).sum(1).sqrt()},
        estimators=GRADIENTS,
    ),
    "NaN of a layer": Refusal(
        *(ValueError, ("'layer.weight'", "NaN"), of_linear(lambda m, x: m.layer(x))),
        options={"forward": lambda m, x: m(x / 0)},
        estimators=LOCAL,
    ),
    "a scalar": Refusal(
        ValueError, ("sample dim", "forward="), of_linear(lambda m, x: m.layer(x).sum())
    ),
    "averaged samples": Refusal(
        ValueError, ("sample dim", "forward="), of_linear(lambda m, x: m.layer(x).mean(0))
    ),
    "integers": Refusal(
        TypeError, ("dtype", "floating"), options={"forward": lambda m, b: m(b).long()}
    ),
    "no tensor out": Refusal(TypeError, ("str", "forward="), options={"forward": lambda m, b: "y"}),
    "batch statistics": Refusal(ValueError, ("'1'", "track_running_stats=True"), batch_statistics),
    "reentrant checkpointing": Refusal(
        *(ValueError, ("use_reentrant=False",)),
        of_linear(lambda m, x: checkpoint(m.layer, x, use_reentrant=True)),
        estimators=GRADIENTS,
    ),
    "random numbers": Refusal(
        *(ValueError, ("random", "dropout"), of_linear(lambda m, x: F.dropout(m.layer(x), 0.5))),
        estimators=EXACT,
    ),
    "no parameters": Refusal(ValueError, ("parameter", "requires_grad"), frozen),
    "detached": Refusal(
        *(ValueError, ("objective", "detaches")),
        options={"objective": lambda y: y.detach().sum(1)},
        estimators=GRADIENTS,
    ),
    "no gradients": Refusal(
        *(ValueError, ("forward", "no_grad")),
        options={"forward": torch.no_grad()(lambda m, b: m(b))},
        estimators=GRADIENTS,
    ),
    # arguments
    "params, unknown": Refusal(ValueError, ("params", "head.*"), options={"params": ["head.*"]}),
    "params, a string": Refusal(TypeError, ("params", "list"), options={"params": "0.weight"}),
    "estimator": Refusal(
        ValueError, ("estimator", "'per_sample'"), options={"estimator": "fisher"}, estimators=EXACT
    ),
    "objective": Refusal(
        *(ValueError, ("objective", "'squared_l2'")),
        options={"objective": "l3"},
        estimators=GRADIENTS,
    ),
    "objective's shape": Refusal(
        ValueError, ("objective", "[10]"), options={"objective": lambda y: y}, estimators=GRADIENTS
    ),
    "objective's kind": Refusal(
        *(ValueError, ("objective", "float")),
        options={"objective": lambda y: 1.0},
        estimators=GRADIENTS,
    ),
    "max_samples": Refusal(ValueError, ("max_samples", "positive"), options={"max_samples": 0}),
    "max_samples, a float": Refusal(ValueError, ("max_samples",), options={"max_samples": 1.5}),
    "progress": Refusal(TypeError, ("progress", "True"), options={"progress": 3}),
    "weighting": Refusal(
        *(ValueError, ("weighting", "estimator='batch'")),
        options={"weighting": "batches"},
        estimators=("per_sample", "local"),
    ),
    "weighting, unknown": Refusal(
        ValueError, ("weighting", "'samples'"), options={"weighting": "tasks"}
    ),
    "training": Refusal(
        *(ValueError, ("training", "estimator='batch'")),
        options={"training": True},
        estimators=("per_sample", "local"),
    ),
    "training, a string": Refusal(TypeError, ("training", "True"), options={"training": "no"}),
    # the local estimator
    "objective, local": Refusal(
        *(ValueError, ("objective", "per_sample")), options={"objective": "l2"}, estimators=LOCAL
    ),
    "a callable, local": Refusal(
        *(ValueError, ("objective", "per_sample")),
        options={"objective": lambda y: y.sum(1)},
        estimators=LOCAL,
    ),
    "no layers": Refusal(
        ValueError, ("Linear", "per_sample"), lambda: nn.LayerNorm(6).double(), estimators=LOCAL
    ),
    "no layer measured": Refusal(
        *(ValueError, ("Linear", "per_sample")),
        lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)).double(),
        options={"params": ["1.*"]},
        estimators=LOCAL,
    ),
    "a layer not called": Refusal(
        *(ValueError, ("called", "per_sample")),
        of_linear(lambda m, x: x @ m.layer.weight.T),
        estimators=LOCAL,
    ),
    "rows that are not samples": Refusal(
        *(ValueError, ("'layer.weight'", "one sample")),
        of_linear(lambda m, x: m.layer(x.view(20, 3, 1).expand(20, 3, 2).flatten(1)).view(10, 4)),
        options={"forward": lambda m, x: m(x)},
        estimators=LOCAL,
    ),
    "a use without samples": Refusal(
        *(ValueError, ("'layer.weight'", "one sample"), lambda: table_too().double()),
        options={"forward": lambda m, x: m(x)},
        estimators=LOCAL,
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
    "name": (lambda: mas_ext.preset("ewc"), ("preset", "'ewc'", "'paper'")),
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
