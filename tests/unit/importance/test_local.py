"""The Hebbian variant against its formula, and against autograd of each layer's own output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mas_ext import MAS, Importance, estimate_importance
from tests.support import zoo
from tests.support.oracle import REDUCTIONS, one_by_one, squared_l2
from tests.support.zoo.layers import Net
from tests.support.zoo.small import assert_same

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

Function = Callable[[Tensor], Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def measure(model: nn.Module, data: Any, **options: Any) -> Importance:
    return estimate_importance(model, data, estimator="local", **options)


def by_autograd(
    layer: nn.Module,
    x: Tensor,
    activation: Function = torch.relu,
    prefix: str = "layer",
    reduction: str = "abs",
) -> dict[str, Tensor]:
    """Ω of one layer as it is defined: ∂‖activation(layer(x_k))‖²/∂θ, sample by sample."""
    objective = lambda y: squared_l2(activation(y))  # noqa: E731
    omega = one_by_one(layer, [x.detach()], objective, reduction=reduction)
    return {f"{prefix}.{name}": value for name, value in omega.items()}


def identity(y: Tensor) -> Tensor:
    return y


def followed_by(activation: Function, layer: nn.Module | None = None) -> Net:
    """One layer, a function of its output, and an output with a row per sample."""
    parts = {"layer": layer or nn.Linear(6, 4)}
    if isinstance(activation, nn.Module):
        parts["activation"] = activation  # so that it is in evaluation mode
    function = lambda m, x: activation(m.layer(x)).flatten(1).sum(-1, keepdim=True)  # noqa: E731
    return Net(function, **parts).double()


# -- The formula -----------------------------------------------------------------------------------
def test_hebbs_rule_by_hand():
    """Ω_ji = 2 y_j x_i of two neurons, one of which does not fire."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([0.5, 0.0]))
    omega = measure(model, [torch.tensor([[2.0, 3.0]], dtype=torch.float64)])
    # y = ReLU([5.5, -2]) = [5.5, 0]
    assert omega["0.weight"].tolist() == [[22.0, 33.0], [0.0, 0.0]]
    assert omega["0.bias"].tolist() == [11.0, 0.0]


def test_the_product_of_the_activities_of_both_ends():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()).double()
    x = normal(10, 6)
    omega = measure(model, x.split(4))
    expected = by_autograd(model[0], x, prefix="0")
    assert_same(omega, expected | by_autograd(model[2], model[:2](x), prefix="2"))
    assert omega.num_samples == 10
    assert set(omega.coverage.values()) == {"local"}
    assert omega.energy == pytest.approx(model(x).square().sum(1).mean().item())


# Not a layer, and one that torch warns of.
OTHERS = ("linear, twice", "conv2d, same, even kernel")
LAYERS = [n for n in zoo.LAYERS if n.startswith(("linear", "conv")) and n not in OTHERS]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, reduction):
    layer, x, _ = zoo.build(name)
    model = followed_by(torch.relu, layer)
    omega = measure(model, x.split(3), reduction=reduction)
    assert_same(omega, by_autograd(layer, x, reduction=reduction))


# -- Followed by ReLU, or not ----------------------------------------------------------------------
def add_then_relu(y: Tensor) -> Tensor:
    y += 1  # the same tensor, which is no longer the layer's output
    return torch.relu_(y)


def relu_then_overwrite(y: Tensor) -> Tensor:
    z = torch.relu(y)
    y.fill_(3)
    z.zero_()
    return z


RECTIFIED: dict[str, Function] = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "functional": F.relu,
    "functional in place": lambda y: F.relu(y, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda y: y.relu(),
    "method in place": lambda y: y.relu_(),
    "clamp": lambda y: y.clamp(min=0),
    "clamp in place": lambda y: y.clamp_(min=0),
    "clamp_min": lambda y: y.clamp_min(0.0),
    "dropout between": nn.Sequential(nn.Dropout(), nn.ReLU()),
    "a skip connection as well": lambda y: torch.tanh(y) + torch.relu(y),
    "overwritten after": relu_then_overwrite,
}
NOT_RECTIFIED: dict[str, Function] = {
    "nothing": identity,
    "GELU": F.gelu,
    "ReLU6": nn.ReLU6(inplace=True),
    "leaky": F.leaky_relu_,
    "clamp from both sides": lambda y: y.clamp(0, 1),
    "clamp elsewhere": lambda y: y.clamp(min=-1),
    "norm between": nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.ReLU()),
    "changed in place between": add_then_relu,
    "a copy": lambda y: (y * 1).relu(),
    "a part": lambda y: y[:, :2].relu(),
}


@pytest.mark.parametrize("activation", [*RECTIFIED, *NOT_RECTIFIED])
def test_a_relu_counts_where_it_is_applied_to_the_output_itself(activation):
    function = {**RECTIFIED, **NOT_RECTIFIED}[activation]
    model, x = followed_by(function), normal(5, 6)
    judge = torch.relu if activation in RECTIFIED else identity
    assert_same(measure(model, [x]), by_autograd(model.layer, x, judge))


def test_batch_norm_between():
    conv, norm, head = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False), nn.Linear(3, 2)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    model.double()
    norm.running_mean.uniform_(-1, 1)
    x = normal(4, 2, 5, 5)
    expected = by_autograd(conv, x, identity, "0")
    assert_same(
        measure(model, [x]), expected | by_autograd(head, model[:5].eval()(x), identity, "5")
    )


def overwriting(m: Net, x: Tensor) -> Tensor:
    """x is changed in place after the layer has read it."""
    x = x.clone()
    x += m.layer(x)
    x[0] = 7
    return torch.mul(x, 2, out=torch.empty_like(x))


def test_inputs_that_are_overwritten_later():
    model, x = Net(overwriting, layer=nn.Linear(6, 6)).double(), normal(5, 6)
    assert_same(measure(model, [x]), by_autograd(model.layer, x, identity))


def test_hooks_on_a_layer_see_and_change_what_they_did():
    model, x = followed_by(torch.relu), normal(5, 6)
    model.layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model.layer.register_forward_hook(lambda module, args, output: output.tanh())
    y = F.linear(2 * x, model.layer.weight, model.layer.bias).detach()
    expected = 2 * torch.einsum("ki,kj->ij", y.abs(), 2 * x.abs()) / 5
    torch.testing.assert_close(measure(model, [x])["layer.weight"], expected, rtol=1e-12, atol=0)


# -- Several uses: summed before the absolute value ------------------------------------------------
def three_times(m: Net, x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.relu(m.layer(x))
    return x


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_uses_of_a_layer_are_positions_of_one_sample(reduction):
    model, x = Net(three_times, layer=nn.Linear(5, 5)).double(), normal(4, 5)
    inputs = [x]
    for _ in range(2):
        inputs.append(torch.relu(model.layer(inputs[-1])).detach())
    expected = by_autograd(model.layer, torch.stack(inputs, dim=1), reduction=reduction)
    assert_same(measure(model, [x], reduction=reduction), expected)


def test_tied_weights_with_biases_of_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()).double()
    model[2].weight = model[0].weight
    x = normal(5, 4)
    hidden, y = model[:2](x).detach(), model(x).detach()
    both = hidden[:, :, None] * x[:, None] + y[:, :, None] * hidden[:, None]
    expected = {"0.weight": both.abs(), "0.bias": hidden, "2.bias": y}
    assert_same(measure(model, [x]), {name: 2 * v.mean(0) for name, v in expected.items()})


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tied_convolutions_that_walk_differently(reduction):
    first, second = nn.Conv1d(2, 2, 3).double(), nn.Conv1d(2, 2, 3, stride=2, padding=1).double()
    second.weight = first.weight
    x = normal(5, 2, 11)
    both = Net(lambda m, x: (m.first(x), m.second(m.first(x).detach())), first=first, second=second)

    def forward(m: Net, x: Tensor) -> Tensor:
        return torch.cat([y.flatten(1) for y in m(x)], 1)

    expected = one_by_one(both, [x], forward=forward, reduction=reduction)["first.weight"]
    omega = measure(nn.Sequential(first, second), [x], reduction=reduction)
    assert_same({"w": omega["0.weight"]}, {"w": expected})


# -- Which rows are a sample's ---------------------------------------------------------------------
def flattened_if_many(m: Net, x: Tensor) -> Tensor:
    """One sample by itself does not tell."""
    rows = x.flatten(0, 1) if len(x) > 1 else x
    return torch.relu(m.layer(rows)).reshape(*x.shape[:2], 4)


ROWS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "time first": lambda m, x: torch.relu(m.layer(x.transpose(0, 1))).sum(0),
    "flattened": lambda m, x: torch.relu(m.layer(x.flatten(0, 1))).unflatten(0, x.shape[:2]),
    "flattened if many": flattened_if_many,
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("samples", [1, 4, 6])  # as many as positions, too
@pytest.mark.parametrize(("max_samples", "reduction"), [(None, "abs"), (2, "square")])
def test_layers_whose_rows_are_not_samples(name, samples, max_samples, reduction):
    model, x = Net(ROWS[name], layer=nn.Linear(6, 4)).double(), normal(samples, 4, 6)
    omega = measure(model, x.split(4), max_samples=max_samples, reduction=reduction)
    assert_same(omega, by_autograd(model.layer, x[:max_samples], reduction=reduction))


def test_a_use_without_a_sample_dimension_belongs_to_every_sample():
    layer, table = nn.Linear(6, 4), normal(6)
    model = Net(lambda m, x: m.layer(x).relu() + m.layer(table).relu(), layer=layer).double()
    x = normal(6, 3, 6)
    rows = torch.cat([x, table.expand(6, 1, 6)], dim=1)
    assert_same(measure(model, [x]), by_autograd(layer, rows))


def test_custom_batches_of_one_sample_may_have_rows_anywhere():
    model, x = Net(ROWS["flattened"], layer=nn.Linear(6, 4)).double(), normal(6, 4, 6)
    batches = [{"deep": row} for row in x.split(1)]
    omega = measure(model, batches, forward=lambda model, batch: model(batch["deep"]))
    assert_same(omega, by_autograd(model.layer, x))


# -- What is covered -------------------------------------------------------------------------------
class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def weight_normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    nn.utils.parametrizations.weight_norm(model[0])
    return model


COVERED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str], str]] = {
    # model, shape of a sample, what is covered, and what the warning says
    "other layers": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.ReLU(), Scaled(4, 2)),
        *((6,), {"0.weight", "0.bias"}),
        r"4 of 6 parameters \(1.weight, 1.bias, 3.weight, 3.bias\).*unprotected",
    ),
    "layers that others only read": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        *((5, 8), {f"linear{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}),
        "8 of 12 parameters.*self_attn.in_proj_weight.*…",
    ),
    "parametrized weights": (weight_normed, (6,), {"0.bias"}, "2 of 3 parameters"),
}


@pytest.mark.parametrize("case", COVERED)
def test_other_parameters_are_named_in_one_warning(case):
    make, shape, covered, message = COVERED[case]
    model, x = make().double(), normal(6, *shape)
    with pytest.warns(UserWarning, match=message) as warned:
        omega = measure(model, x.split(2))
    with pytest.warns(UserWarning, match=message) as warned_by_mas:
        MAS(model).update_importance(x.split(2), estimator="local")
    assert [w.filename for w in (*warned, *warned_by_mas)] == [__file__] * 2
    assert {name for name, path in omega.coverage.items() if path == "local"} == covered
    for name, path in omega.coverage.items():
        assert omega[name].any() == (path == "local")
        assert path in ("local", "none")


def test_a_transformer_with_padding_does_not_take_its_fused_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = Net(
        lambda m, x, mask: m.encoder(x, src_key_padding_mask=mask),
        encoder=nn.TransformerEncoder(layer, 2),
    ).double()
    x, mask = normal(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    alone = [{"x": x[k : k + 1], "mask": mask[k : k + 1]} for k in range(3)]
    with pytest.warns(UserWarning, match="16 of 24"):
        omega = measure(model, [{"x": x, "mask": mask}])
    with pytest.warns(UserWarning, match="16 of 24"):
        assert_same(omega, dict(measure(model, alone)))
    assert omega.coverage["encoder.layers.1.linear2.weight"] == "local"


def test_no_warning_for_what_is_not_measured():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)).double(), normal(3, 6)
    assert list(measure(model, [x], params=["0.bias"])) == ["0.bias"]
    model[1].requires_grad_(False)
    assert list(measure(model, [x])) == ["0.weight", "0.bias"]


# -- Precision, modes, compiled models -------------------------------------------------------------
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_kept_in_float32(dtype, autocast):
    """Autocast rounds the layers and nothing else."""
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).to(dtype), torch.randn(300, 3, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        omega = measure(model, [x])
        y = model(x).detach()
    assert y.dtype == (torch.bfloat16 if autocast else dtype)
    expected = 2 * torch.einsum("kti,ktj->kij", y.float(), x.float()).abs().mean(0)
    assert omega["0.weight"].dtype == torch.float32
    torch.testing.assert_close(omega["0.weight"], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_any_gradient_mode(mode):
    model, x = followed_by(torch.relu_), normal(5, 6)
    with mode():
        omega = measure(model, [x * 1])
    assert_same(omega, by_autograd(model.layer, x))


def test_one_forward_pass_per_batch_without_a_graph():
    seen = []

    def look(y: Tensor) -> Tensor:
        seen.append((y.requires_grad, torch.is_grad_enabled()))
        return y.relu()

    measure(followed_by(look), normal(12, 6).split(4))
    assert seen == [(False, False)] * (3 + 1)  # and one sample to see that rows are samples


def test_a_compiled_model():
    model, x = followed_by(torch.relu_), normal(5, 6)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled.eval()(x)  # as it will be called, so that nothing is compiled anew
    assert_same(measure(compiled, [x]), by_autograd(model.layer, x))
