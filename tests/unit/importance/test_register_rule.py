"""Rules that a user registers, against batch size 1 in float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from mas_ext import estimate_importance
from mas_ext.importance import MatrixProduct, register_rule
from mas_ext.importance.per_sample import rules

NODE = "ProjectionBackward"
WEIGHT = "project.weight"


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


class Project(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return Projection.apply(x, self.weight)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.project = Project()

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.tanh(self.first(x)))


def as_tensor(op, input):
    x, _ = op.saved_tensors
    return torch.einsum("bti,bto->bio", x, op.grad)


def as_product(op, input):
    x, _ = op.saved_tensors
    return MatrixProduct(x, op.grad)


@pytest.fixture(autouse=True)
def _rules_as_they_were(monkeypatch):
    """What a test registers is gone after it."""
    before = dict(rules.RULES)
    yield
    rules.RULES.clear()
    rules.RULES.update(before)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


@pytest.fixture
def data() -> Tensor:
    return torch.randn(6, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_exact(model: nn.Module, data: Tensor, path: str) -> None:
    omega = estimate_importance(model, data.split([4, 2]))
    assert omega.coverage[WEIGHT] == path
    for name, expected in batch_size_one(model, data).items():
        torch.testing.assert_close(omega[name], expected, rtol=1e-12, atol=1e-12)


def batch_size_one(model: nn.Module, data: Tensor) -> dict[str, Tensor]:
    """Plain autograd, a sample at a time."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k in range(len(data)):
        scalar = model(data[k : k + 1]).square().sum()
        grads = torch.autograd.grad(scalar, list(model.parameters()))
        for total, grad in zip(sums.values(), grads, strict=True):
            total += grad.abs() / len(data)
    return sums


@pytest.mark.parametrize("rule", [as_tensor, as_product])
def test_a_rule_makes_the_path_direct_and_the_result_stays_exact(network, data, rule):
    assert_exact(network, data, "generic")
    assert register_rule(NODE)(rule) is rule
    # The same model: the plan that was made without the rule must not be used again.
    assert_exact(network, data, "direct")


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


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_rule_is_found_and_the_result_is_exact(network, data, kind):
    register_rule(NODE)(WRONG[kind])
    with pytest.warns(UserWarning, match=WEIGHT):
        assert_exact(network, data, "one sample at a time")


def test_a_case_that_the_rule_leaves_out_is_generic(network, data):
    @register_rule(NODE)
    def rule(op, input):
        raise rules.NoRule("not covered")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_exact(network, data, "generic")


def test_a_rule_that_is_replaced_is_checked_again(network, data):
    register_rule(NODE)(as_tensor)
    assert_exact(network, data, "direct")
    register_rule(NODE, override=True)(WRONG["a factor"])
    with pytest.warns(UserWarning, match=WEIGHT):
        assert_exact(network, data, "one sample at a time")


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

    assert_exact(copy.deepcopy(network), data, "generic")
    assert set(calls) == {0, 2}


@pytest.mark.parametrize(
    ("name", "error"),
    [(None, TypeError), (Projection, TypeError), ("", ValueError), ("AddBackward0", ValueError),
     (" ScaleBackward", ValueError)],
)  # fmt: skip
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
