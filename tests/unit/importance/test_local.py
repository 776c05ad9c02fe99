"""The Hebbian variant against its formula, and against autograd of each layer's own output."""

from itertools import count

import pytest
import torch
from torch import nn
from torch.nn import functional

import mas_ext
from mas_ext import estimate_importance
from mas_ext.importance.per_sample import convolution
from tests.models import assert_same
from tests.test_importance import assert_untouched, broken_half_way, snapshot, used_model

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def measure(model, data, **options):
    return estimate_importance(model, data, estimator="local", **options)


def by_autograd(layer, x, activation=torch.relu):
    """Ω of one layer as it is defined: ∂‖activation(layer(x_k))‖²/∂θ, sample by sample."""
    params = dict(layer.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for sample in x.detach().split(1):
        scalar = activation(layer(sample)).square().sum()
        for name, grad in zip(params, torch.autograd.grad(scalar, params.values()), strict=True):
            total[name] += grad.abs() / len(x)
    return total


def prefixed(prefix, omega):
    return {f"{prefix}.{name}": value for name, value in omega.items()}


# -- the formula ---------------------------------------------------------------------------------


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
    y1 = model[:2](x).detach()
    y2 = model(x).detach()
    expected = {
        "0.weight": 2 * torch.einsum("ki,kj->ij", y1, x.abs()) / 10,
        "0.bias": 2 * y1.mean(0),
        "2.weight": 2 * torch.einsum("ki,kj->ij", y2, y1) / 10,
        "2.bias": 2 * y2.mean(0),
    }
    assert_same(omega, expected)
    assert omega.num_samples == 10
    assert set(omega.coverage.values()) == {"local"}


@pytest.mark.parametrize("shape", [(6,), (1, 6), (5, 6), (3, 4, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_with_any_number_of_positions(shape, bias):
    layer = nn.Linear(6, 4, bias=bias).double()
    x = normal(7, *shape)
    omega = measure(nn.Sequential(layer, nn.ReLU()), x.split(3))
    assert_same(omega, prefixed("0", by_autograd(layer, x)))


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3), (9,)),
    "1d same": (nn.Conv1d(4, 6, 4, padding="same", dilation=2), (9,)),
    "2d": (nn.Conv2d(4, 6, 3), (7, 8)),
    "2d pointwise": (nn.Conv2d(4, 6, 1), (3, 3)),
    "2d one position": (nn.Conv2d(4, 6, 3), (3, 3)),
    "2d without bias": (nn.Conv2d(4, 6, 3, bias=False), (7, 8)),
    "2d strides": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0)), (8, 9)),
    "2d dilation": (nn.Conv2d(4, 6, 3, dilation=(1, 2), padding=2), (7, 8)),
    "2d groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 6)),
    "2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (7, 7)),
    "2d valid": (nn.Conv2d(4, 6, 3, padding="valid"), (5, 5)),
    "2d reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (5, 6)),
    "2d circular": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"), (5, 6)),
    "2d replicate": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate"), (5, 6)),
    "3d": (nn.Conv3d(4, 6, (2, 3, 2), stride=(1, 2, 1), padding=1, groups=2), (4, 5, 3)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
    layer, size = CONVOLUTIONS[case]
    layer.double()
    x = normal(5, 4, *size)
    omega = measure(nn.Sequential(layer, nn.ReLU()), x.split(3))
    assert_same(omega, prefixed("0", by_autograd(layer, x)))


def test_channels_last_weights():
    layer = nn.Conv2d(4, 6, 3).double().to(memory_format=torch.channels_last)
    x = normal(5, 4, 6, 6)
    omega = measure(nn.Sequential(layer, nn.ReLU()), [x])
    assert_same(omega, prefixed("0", by_autograd(layer, x)))


@pytest.mark.parametrize("chunk", [1, 30, 100, 1000])
def test_the_size_of_a_chunk_changes_nothing(chunk, monkeypatch):
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()).double()
    x = normal(6, 3, 10)
    whole = measure(model, [x], max_samples=5)
    monkeypatch.setattr(convolution, "_PATCHES", chunk)
    assert_same(measure(model, [x], max_samples=5), dict(whole))


# -- followed by ReLU, or not --------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.layer = nn.Linear(6, 4).double()
        self.activation = activation

    def forward(self, x):
        return self.activation(self.layer(x)).sum(-1, keepdim=True)


def add_then_relu(y):
    y += 1  # the same tensor, which is no longer the layer's output
    return torch.relu_(y)


def relu_then_overwrite(y):
    z = torch.relu(y)
    y.fill_(3)
    z.zero_()
    return z


def used_twice(y):
    return torch.tanh(y) + torch.relu(y)


RECTIFIED = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "functional": functional.relu,
    "functional in place": lambda y: functional.relu(y, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda y: y.relu(),
    "method in place": lambda y: y.relu_(),
    "clamp": lambda y: y.clamp(min=0),
    "clamp in place": lambda y: y.clamp_(min=0),
    "clamp_min": lambda y: y.clamp_min(0.0),
    "dropout between": nn.Sequential(nn.Dropout(), nn.ReLU()),
    "a skip connection as well": used_twice,
    "overwritten after": relu_then_overwrite,
}
NOT_RECTIFIED = {
    "nothing": lambda y: y,
    "GELU": functional.gelu,
    "ReLU6": nn.ReLU6(inplace=True),
    "leaky": functional.leaky_relu_,
    "clamp from both sides": lambda y: y.clamp(0, 1),
    "clamp elsewhere": lambda y: y.clamp(min=-1),
    "norm between": nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.ReLU()),
    "changed in place between": add_then_relu,
    "a copy": lambda y: (y * 1).relu(),
    "a part": lambda y: y[:, :2].relu(),
}


@pytest.mark.parametrize("activation", RECTIFIED)
def test_followed_by_relu(activation):
    model = Functional(RECTIFIED[activation])
    x = normal(5, 6)
    assert_same(measure(model, [x]), prefixed("layer", by_autograd(model.layer, x)))


@pytest.mark.parametrize("activation", NOT_RECTIFIED)
def test_not_followed_by_relu_it_is_the_linear_output(activation):
    model = Functional(NOT_RECTIFIED[activation])
    x = normal(5, 6)
    expected = by_autograd(model.layer, x, activation=lambda y: y)
    assert_same(measure(model, [x]), prefixed("layer", expected))


def test_batch_norm_between():
    conv, norm, head = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False), nn.Linear(3, 2)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    model.double()
    norm.running_mean.uniform_(-1, 1)
    x = normal(4, 2, 5, 5)
    expected = prefixed("0", by_autograd(conv, x, activation=lambda y: y))
    expected |= prefixed("5", by_autograd(head, model[:5].eval()(x), activation=lambda y: y))
    assert_same(measure(model, [x]), expected)


class Overwritten(nn.Module):
    """x is changed in place after the layer has read it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()

    def forward(self, x):
        x = x.clone()
        x += self.layer(x)
        x[0] = 7
        return torch.mul(x, 2, out=torch.empty_like(x))


def test_inputs_that_are_overwritten_later():
    model, x = Overwritten(), normal(5, 6)
    expected = by_autograd(model.layer, x, activation=lambda y: y)
    assert_same(measure(model, [x]), prefixed("layer", expected))


def test_a_users_hooks_see_and_change_what_they_did():
    layer = nn.Linear(6, 4).double()
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    layer.register_forward_hook(lambda module, args, output: output.tanh())
    before = [list(layer._forward_hooks), list(layer._forward_pre_hooks)]
    x = normal(5, 6)
    omega = measure(nn.Sequential(layer, nn.ReLU()), [x])
    y = functional.linear(2 * x, layer.weight, layer.bias).detach()
    expected = 2 * torch.einsum("ki,kj->ij", y.abs(), 2 * x.abs()) / 5
    torch.testing.assert_close(omega["0.weight"], expected, rtol=1e-12, atol=0)
    assert [list(layer._forward_hooks), list(layer._forward_pre_hooks)] == before


# -- several uses --------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, steps=3):
        super().__init__()
        self.cell = nn.Linear(5, 5).double()
        self.steps = steps

    def forward(self, x):
        for _ in range(self.steps):
            x = torch.relu(self.cell(x))
        return x


def test_a_layer_used_again_sums_before_the_absolute_value():
    model, x = Recurrent(), normal(4, 5)
    inputs = [x]
    for _ in range(2):
        inputs.append(torch.relu(model.cell(inputs[-1])).detach())
    # Its uses are positions of one sample.
    positions = torch.stack(inputs, dim=1)
    assert_same(measure(model, [x]), prefixed("cell", by_autograd(model.cell, positions)))


def test_tied_weights_with_biases_of_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()).double()
    model[2].weight = model[0].weight
    x = normal(5, 4)
    hidden = model[:2](x).detach()
    omega = measure(model, [x])
    assert list(omega) == ["0.weight", "0.bias", "2.bias"]
    y = model(x).detach()
    both = hidden[:, :, None] * x[:, None] + y[:, :, None] * hidden[:, None]
    torch.testing.assert_close(omega["0.weight"], 2 * both.abs().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(omega["2.bias"], 2 * y.mean(0), rtol=1e-12, atol=0)


def test_tied_convolutions_that_walk_differently():
    first, second = nn.Conv1d(2, 2, 3).double(), nn.Conv1d(2, 2, 3, stride=2, padding=1).double()
    second.weight = first.weight
    x = normal(5, 2, 11)
    hidden = first(x).detach()
    expected = torch.zeros_like(first.weight)
    for k in range(5):
        scalar = first(x[k : k + 1]).square().sum() + second(hidden[k : k + 1]).square().sum()
        expected += torch.autograd.grad(scalar, first.weight)[0].abs() / 5
    assert_same({"w": measure(nn.Sequential(first, second), [x])["0.weight"]}, {"w": expected})


# -- which rows are a sample's -------------------------------------------------------------------


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4).double()

    def forward(self, x):  # [B, T, 6]
        return torch.relu(self.layer(x.transpose(0, 1))).sum(0)


class Flattened(TimeFirst):
    def forward(self, x):
        return torch.relu(self.layer(x.flatten(0, 1))).unflatten(0, x.shape[:2])


class Shared(TimeFirst):
    """The layer also works on a table that is no sample's."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", normal(6))

    def forward(self, x):
        return self.layer(x).relu() + self.layer(self.table).relu()


class FlattenedIfMany(TimeFirst):
    """One sample alone does not tell."""

    def forward(self, x):
        rows = x.flatten(0, 1) if len(x) > 1 else x
        return torch.relu(self.layer(rows)).reshape(*x.shape[:2], 4)


@pytest.mark.parametrize("model", [TimeFirst, Flattened, FlattenedIfMany])
@pytest.mark.parametrize("samples", [1, 4, 6])  # as many as positions, too
@pytest.mark.parametrize("max_samples", [None, 2])
def test_layers_whose_rows_are_not_samples(model, samples, max_samples):
    model, x = model(), normal(samples, 4, 6)
    omega = measure(model, x.split(4), max_samples=max_samples)
    assert_same(omega, prefixed("layer", by_autograd(model.layer, x[:max_samples])))


def test_a_use_without_a_sample_dimension_belongs_to_every_sample():
    model, x = Shared(), normal(6, 3, 6)
    rows = torch.cat([x, model.table.expand(6, 1, 6)], dim=1)
    assert_same(measure(model, [x]), prefixed("layer", by_autograd(model.layer, rows)))


def test_custom_batches_need_samples_first():
    def forward(model, batch):
        return model(batch["deep"])

    model, x = Flattened(), normal(6, 4, 6)
    expected = prefixed("layer", by_autograd(model.layer, x))
    assert_same(measure(model, [{"deep": row} for row in x.split(1)], forward=forward), expected)
    with pytest.raises(ValueError, match=r"'layer.weight' got an input of shape \[24, 6\] for 6"):
        measure(model, [{"deep": x}], forward=forward)
    with pytest.raises(ValueError, match=r"got an input of shape \[6\] for 6 samples"):
        measure(Shared(), [{"deep": x}], forward=forward)


@pytest.mark.parametrize("max_samples", [1, 4, 5, 10, 99])
@pytest.mark.parametrize("forward", [None, lambda model, batch: model(batch)])
def test_max_samples_cuts_a_batch(max_samples, forward):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).double()
    x = normal(10, 6)
    omega = measure(model, x.split(4), max_samples=max_samples, forward=forward)
    assert omega.num_samples == min(max_samples, 10)
    assert_same(omega, prefixed("0", by_autograd(model[0], x[:max_samples])))


# -- what is covered -----------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_other_parameters_are_named_in_one_warning():
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.ReLU(), Scaled(4, 2)).double()
    x = normal(6, 6)
    message = (
        r"4 of 6 parameters \(1.weight, 1.bias, 3.weight, 3.bias\).*importance is 0.*unprotected"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        omega = measure(model, x.split(2))
    assert len(warned) == 1
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match=message) as warned:
        mas_ext.MAS(model).update_importance(x.split(2), estimator="local")
    assert [w.filename for w in warned] == [__file__]
    left_out = [name for name, path in omega.coverage.items() if path == "none"]
    assert left_out == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert not any(omega[name].any() for name in left_out)
    assert omega.coverage["0.weight"] == "local"
    assert omega["0.weight"].all()


def test_a_layer_that_is_only_read_by_others_is_not_covered():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    with pytest.warns(UserWarning, match="8 of 12 parameters.*self_attn.in_proj_weight.*…"):
        omega = measure(model, [normal(3, 5, 8)])
    served = {name for name, path in omega.coverage.items() if path == "local"}
    assert served == {f"linear{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    assert omega["linear1.weight"].any()


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2).double()

    def forward(self, x, mask):
        return self.encoder(x, src_key_padding_mask=mask)


def test_a_transformer_with_padding_does_not_take_its_fused_path():
    model, x = Padded(), normal(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    one_by_one = [{"x": x[k : k + 1], "mask": mask[k : k + 1]} for k in range(3)]
    with pytest.warns(UserWarning, match="16 of 24"):
        omega = measure(model, [{"x": x, "mask": mask}])
    with pytest.warns(UserWarning, match="16 of 24"):
        assert_same(omega, dict(measure(model, one_by_one)))
    assert omega.coverage["encoder.layers.1.linear2.weight"] == "local"


def test_parametrized_weights_are_not_covered():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).double()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.warns(UserWarning, match="2 of 3 parameters"):
        omega = measure(model, [normal(3, 6)])
    assert omega.coverage["0.bias"] == "local"
    assert set(omega.coverage.values()) == {"local", "none"}


def test_no_warning_for_what_is_not_measured():
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)).double()
    x = normal(3, 6)
    assert list(measure(model, [x], params=["0.bias"])) == ["0.bias"]
    model[1].requires_grad_(False)
    assert list(measure(model, [x])) == ["0.weight", "0.bias"]


# -- precision, modes, compiled models -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_kept_in_float32(dtype):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).to(dtype)
    x = torch.randn(300, 3, 6).to(dtype)
    omega = measure(model, [x])
    y = model(x).detach()
    expected = 2 * torch.einsum("kti,ktj->kij", y.float(), x.float()).abs().mean(0)
    assert omega["0.weight"].dtype == torch.float32
    torch.testing.assert_close(omega["0.weight"], expected)


def test_autocast_rounds_the_layers_and_nothing_else():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    x = torch.randn(50, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        omega = measure(model, [x])
        y = model(x).detach()
    assert y.dtype == torch.bfloat16
    expected = 2 * torch.einsum("kti,ktj->kij", y.float(), x).abs().mean(0)
    torch.testing.assert_close(omega["0.weight"], expected)


def test_inside_no_grad_and_inference_mode():
    model, x = Functional(torch.relu_), normal(5, 6)
    expected = prefixed("layer", by_autograd(model.layer, x))
    with torch.no_grad():
        assert_same(measure(model, [x]), expected)
    with torch.inference_mode():
        assert_same(measure(model, [x * 1]), expected)


def test_no_graph_is_built():
    seen = []

    def look(y):
        seen.append((y.requires_grad, torch.is_grad_enabled()))
        return y

    measure(Functional(look), normal(4, 6).split(2))
    assert seen
    assert set(seen) == {(False, False)}


def test_one_forward_pass_a_batch():
    calls = count()

    def counted(y):
        next(calls)
        return y.relu()

    measure(Functional(counted), normal(12, 6).split(4))
    assert next(calls) == 3 + 1  # and one sample to see that rows are samples


def test_a_compiled_model():
    model = Functional(torch.relu_)
    compiled = torch.compile(model, backend="eager")
    x = normal(5, 6)
    with torch.no_grad():
        compiled.eval()(x)  # as it will be called, so that nothing is compiled anew
    assert_same(measure(compiled, [x]), prefixed("layer", by_autograd(model.layer, x)))


def test_mas_takes_it():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).double()
    mas, x = mas_ext.MAS(model), normal(5, 6)
    mas.update_importance(x[:3].split(2), estimator="local")
    mas.consolidate([x[3:]], estimator="local")
    assert_same(mas.importance, prefixed("0", by_autograd(model[0], x)))


# -- leaves no trace -----------------------------------------------------------------------------


def test_everything_is_put_back():
    model, x = used_model(), normal(6, 2, 8, 8)
    before = snapshot(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.warns(UserWarning, match=r"body.1.weight, body.1.bias"):
        measure(model, x.split(4))
    assert_untouched(model, before)
    with pytest.raises(OSError, match="the disk is gone"):
        measure(model, broken_half_way())
    assert_untouched(model, before)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(module._forward_hooks for module in model.modules())


# -- bad input -----------------------------------------------------------------------------------


class OnlyRead(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4).double()

    def forward(self, x):
        return x @ self.layer.weight.T


def relu_net():
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU()).double()


BAD = {
    "objective": (relu_net, {"objective": "l2"}, "objective is 'l2', but estimator='local'"),
    "a callable": (relu_net, {"objective": lambda y: y.sum(1)}, "has one of its own"),
    "no layers": (lambda: nn.LayerNorm(6).double(), {}, "defined for Linear and Conv layers"),
    "none measured": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)).double(),
        {"params": ["1.*"]},
        "no parameter that is measured belongs to one",
    ),
    "not called": (OnlyRead, {}, "none of the Linear and Conv layers.*was called as a module"),
    "averaged": (lambda: Functional(lambda y: y.mean(0)), {}, "no sample dimension"),
    "NaN": (
        lambda: Functional(lambda y: y),
        {"forward": lambda m, x: m(x / 0)},
        "'layer.weight' is NaN or Inf",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case):
    make, options, message = BAD[case]
    model, x = make(), normal(5, 6)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        measure(model, [x], **options)
    assert_untouched(model, before)


def test_no_samples():
    with pytest.raises(ValueError, match="no samples"):
        measure(relu_net(), [normal(0, 6)])
