"""Rules that a user registers, against batch size 1 in float64."""

from __future__ import annotations

import copy
import warnings
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from mas_ext import estimate_importance
from mas_ext.importance import MatrixProduct, register_rule
from mas_ext.importance.per_sample import rules
from tests.support.oracle import REDUCTIONS, assert_exact, by_reduction
from tests.support.zoo.layers import Net

NODE = "ProjectionBackward"
WEIGHT = "weight"


class Projection(torch.autograd.Function):
    """y = x·W: a product that the graph shows as an operation of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2)


def as_tensor(op, input):
    x, _ = op.saved_tensors
    return torch.einsum("bti,bto->bio", x, op.grad)


def as_product(op, input):
    x, _ = op.saved_tensors
    return MatrixProduct(x, op.grad)


@pytest.fixture(autouse=True)
def _rules_as_they_were():
    """What a test registers is gone after it."""
    with mock.patch.dict(rules.RULES):
        yield


@pytest.fixture
def network() -> Net:
    torch.manual_seed(0)
    parts = {"first": nn.Linear(5, 4), "weight": (4, 3)}
    return Net(lambda m, x: Projection.apply(m.first(x).tanh(), m.weight), **parts).double()


@pytest.fixture
def data() -> Tensor:
    return torch.randn(6, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check(model: nn.Module, data: Tensor, path: str) -> None:
    means = by_reduction(model, [data])
    for reduction in REDUCTIONS:
        omega = estimate_importance(model, data.split([4, 2]), reduction=reduction)
        assert omega.coverage[WEIGHT] == path
        assert_exact(omega, means[reduction])


@pytest.mark.parametrize("rule", [as_tensor, as_product])
def test_a_rule_makes_the_path_direct_and_the_result_stays_exact(network, data, rule):
    check(network, data, "generic")
    assert register_rule(NODE)(rule) is rule
    # The same model: the plan that was made without the rule must not be used again.
    check(network, data, "direct")


def test_the_rule_is_called_once_per_batch_with_the_operation(network, data):
    calls = []

    @register_rule(NODE)
    def rule(op, input):
        calls.append((input, op.shape, tuple(op.grad.shape), tuple(op.split(op.grad).shape)))
        return as_tensor(op, input)

    estimate_importance(network, [data])
    calls.clear()
    estimate_importance(network, [data])
    # On one batch whose plan is known.
    assert calls == [(1, (4, 3), (6, 7, 3), (6, 1, 1, 7, 3))]


WRONG = {
    "a factor": lambda op, input: 2 * as_tensor(op, input),
    "the sum over samples": lambda op, input: as_tensor(op, input).sum(0, keepdim=True),
    "absolute values too early": lambda op, input: torch.einsum(
        "bti,bto->bio", op.saved_tensors[0].abs(), op.grad.abs()
    ),
    "another shape": lambda op, input: as_tensor(op, input).transpose(1, 2),
    "None": lambda op, input: None,
    "an error": lambda op, input: op.saved("no such tensor"),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_rule_is_found_and_the_result_is_exact(network, data, kind, reduction):
    """Whichever reduction its plan is checked with."""
    register_rule(NODE)(WRONG[kind])
    with pytest.warns(UserWarning, match=WEIGHT):
        estimate_importance(network, [data], reduction=reduction)
    with pytest.warns(UserWarning, match=WEIGHT):
        check(network, data, "one sample at a time")


def test_a_case_that_the_rule_leaves_out_is_generic(network, data):
    @register_rule(NODE)
    def rule(op, input):
        raise rules.NoRule("not covered")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(network, data, "generic")


def test_a_rule_that_is_replaced_is_checked_again(network, data):
    register_rule(NODE)(as_tensor)
    check(network, data, "direct")
    register_rule(NODE, override=True)(WRONG["a factor"])
    with pytest.warns(UserWarning, match=WEIGHT):
        check(network, data, "one sample at a time")


def test_a_built_in_rule_is_replaced_only_on_request(network, data):
    built_in = rules.RULES["AddmmBackward"]
    with pytest.raises(ValueError, match=r"AddmmBackward.*override"):
        register_rule("AddmmBackward")(as_tensor)
    assert rules.RULES["AddmmBackward"] is built_in
    calls = []

    @register_rule("AddmmBackward", override=True)
    def counted(op, input):
        calls.append(input)
        return built_in(op, input)

    check(copy.deepcopy(network), data, "generic")
    assert set(calls) == {0, 2}


BAD = [(None, TypeError), (Projection, TypeError)]
BAD += [(name, ValueError) for name in ("", "AddBackward0", " ScaleBackward")]


@pytest.mark.parametrize(("name", "error"), BAD)
def test_bad_names_are_refused(name, error):
    before = dict(rules.RULES)
    with pytest.raises(error, match="node_name"):
        register_rule(name)(as_tensor)
    assert before == rules.RULES


@pytest.mark.parametrize("rule", [None, "as_tensor", torch.ones(2)])
def test_what_cannot_be_called_is_no_rule(rule):
    before = dict(rules.RULES)
    with pytest.raises(TypeError, match=NODE):
        register_rule(NODE)(rule)
    assert before == rules.RULES
