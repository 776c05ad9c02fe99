"""Ω against batch size 1 in float64, analytic values, and a model that must be left as it was."""

import pytest
import torch
from torch import nn

from mas_ext import estimate_importance
from tests.models import assert_same, convnet, images, mlp, oracle, vectors

OBJECTIVES = {
    "squared_l2": lambda y: (y**2).sum(),
    "l2": lambda y: (y**2).sum().sqrt(),
    "l1": lambda y: y.abs().sum(),
}


@pytest.mark.parametrize(("model", "data"), [(mlp, vectors), (convnet, images)])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_per_sample_is_exact_whatever_the_batch_size(model, data, batch_size):
    model, x = model(), data()
    omega = estimate_importance(model, x.split(batch_size))
    assert omega.num_samples == len(x)
    assert set(omega.coverage.values()) == {"direct"}
    assert_same(omega, oracle(model, x))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(objective):
    model, x = mlp(), vectors()
    omega = estimate_importance(model, [x], objective=objective)
    assert_same(omega, oracle(model, x, OBJECTIVES[objective]))


def test_objective_may_be_a_callable():
    model, x = mlp(), vectors()
    omega = estimate_importance(model, [x], objective=lambda y: y[:, 1] ** 3)
    assert_same(omega, oracle(model, x, lambda y: (y[:, 1] ** 3).sum()))


def test_linear_layer_analytically():
    """F(x) = Wx: ∂‖F‖²/∂W_ij = 2 y_i x_j."""
    model = nn.Linear(6, 3, bias=False).double()
    x = vectors()
    y = x @ model.weight.detach().T
    expected = (2 * y[:, :, None] * x[:, None, :]).abs().mean(0)
    torch.testing.assert_close(estimate_importance(model, [x])["weight"], expected)


def test_batch_is_the_absolute_value_of_each_batchs_gradient_weighted_by_size():
    model, x = mlp(), vectors(7)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part in x.split(3):  # 3, 3, 1
        grads = torch.autograd.grad((model(part) ** 2).sum(1).mean(), list(model.parameters()))
        for name, g in zip(expected, grads, strict=True):
            expected[name] += len(part) * g.abs() / len(x)
    assert_same(estimate_importance(model, x.split(3), estimator="batch"), expected)


def test_batch_mean_loses_what_cancels():
    model, x = mlp(), vectors()
    exact = estimate_importance(model, [x])
    lossy = estimate_importance(model, [x], estimator="batch")
    assert all((lossy[name] <= exact[name] + 1e-12).all() for name in exact)
    assert sum(t.sum() for t in lossy.values()) < 0.95 * sum(t.sum() for t in exact.values())


@pytest.mark.parametrize("estimator", ["per_sample", "batch"])
@pytest.mark.parametrize("max_samples", [1, 4, 5, 10, 99])
def test_max_samples_counts_samples_not_batches(estimator, max_samples):
    model, x = mlp(), vectors()
    omega = estimate_importance(model, x.split(4), estimator=estimator, max_samples=max_samples)
    wanted = x[:max_samples]
    assert omega.num_samples == len(wanted)
    assert_same(omega, estimate_importance(model, wanted.split(4), estimator=estimator))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, scale, labels=None):
        assert labels is None
        return {"a": 1}, type("Output", (), {"logits": self.body(x) * scale})()


class Logits(Keywords):
    def forward(self, x, scale, labels=None):
        return super().forward(x, scale, labels)[1]


class Mapped(Keywords):
    """As models do that are written for transformers' Trainer."""

    def forward(self, x, scale, labels=None):
        return {"loss": None, "logits": super().forward(x, scale, labels)[1].logits}


class First(Keywords):
    def forward(self, x):
        return self.body(x), "hidden states"


def batches_of(form):
    for part in vectors().split(4):
        yield {
            "tensor": part,
            "tuple": (part, torch.zeros(len(part))),
            "list": [part, torch.zeros(len(part))],
        }[form]


@pytest.mark.parametrize("form", ["tensor", "tuple", "list"])
def test_forms_of_a_batch(form):
    model = mlp()
    assert_same(estimate_importance(model, batches_of(form)), oracle(model, vectors()))


@pytest.mark.parametrize("model", [Logits(), Mapped()], ids=["object", "mapping"])
def test_a_mapping_becomes_keyword_arguments_without_labels(model):
    shared = torch.tensor([[2.0]], dtype=torch.float64)  # no sample dimension: used by every sample
    data = [{"x": p, "scale": shared, "labels": p[:, 0]} for p in vectors().split(4)]
    omega = estimate_importance(model, data)
    expected = oracle(model.body, vectors(), lambda y: ((2 * y) ** 2).sum())
    assert_same(omega, {f"body.{name}": value for name, value in expected.items()})


def test_the_output_may_be_a_tuples_first_item():
    model = First()
    expected = {f"body.{n}": v for n, v in oracle(model.body, vectors()).items()}
    assert_same(estimate_importance(model, [vectors()]), expected)


@pytest.mark.parametrize("estimator", ["per_sample", "batch"])
def test_forward_takes_any_batch(estimator):
    model, x = mlp(), vectors()
    omega = estimate_importance(
        model,
        [{"deep": [part]} for part in x.split(4)],
        forward=lambda m, batch: m(batch["deep"][0]),
        estimator=estimator,
        max_samples=9,
    )
    assert_same(omega, estimate_importance(model, x[:9].split(4), estimator=estimator))


def test_outputs_of_any_rank():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3).double()

        def forward(self, x):
            return self.linear(x.view(-1, 2, 6))  # [B, 2, 3]

    model = Sequence()
    x = vectors(8).view(4, 12)
    assert_same(estimate_importance(model, [x]), oracle(model, x))


def test_params_selects_by_name_glob_and_callable():
    model, x = mlp(), vectors()
    full = estimate_importance(model, [x])
    for params, names in [
        (["0.weight"], {"0.weight"}),
        (["*.bias"], {"0.bias", "2.bias"}),
        (lambda name, p: p.dim() == 2, {"0.weight", "2.weight"}),
    ]:
        omega = estimate_importance(model, [x], params=params)
        assert_same(omega, {name: full[name] for name in names})


def test_frozen_and_unused_parameters():
    model, x = mlp(), vectors()
    model[0].weight.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    omega = estimate_importance(model, [x], forward=lambda m, b: nn.Sequential.forward(m[:3], b))
    assert "0.weight" not in omega
    assert not omega["unused"].any()
    assert omega["0.bias"].any()


def test_a_tied_parameter_sums_its_uses_before_the_absolute_value():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model.double()
    model[2].weight = model[0].weight
    x = torch.randn(5, 4, dtype=torch.float64)
    omega = estimate_importance(model, [x])
    assert list(omega) == ["0.weight"]
    assert_same(omega, oracle(model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_kept_in_float32(dtype):
    model = mlp(dtype)
    omega = estimate_importance(model, [vectors(dtype=dtype)])
    assert {t.dtype for t in omega.values()} == {torch.float32}


def test_inside_no_grad_inference_mode_and_autocast():
    model, x = mlp(torch.float32), vectors(dtype=torch.float32)
    expected = estimate_importance(model, [x])
    with torch.no_grad():
        assert_same(estimate_importance(model, [x]), dict(expected))
    with torch.inference_mode():
        assert_same(estimate_importance(model, [x * 1]), dict(expected))
    with torch.autocast("cpu", torch.bfloat16):
        low = estimate_importance(model, [x])
    assert_same(low, dict(expected), rtol=0.1, atol=0.05)


def test_progress():
    seen = []
    estimate_importance(mlp(), vectors(10).split(4), progress=seen.append)
    assert seen == [4, 8, 10]


def test_progress_bar(capsys):
    estimate_importance(mlp(), vectors(10).split(4), progress=True)
    assert "10 samples" in capsys.readouterr().err


# -- leaves no trace -----------------------------------------------------------------------------


class Counting(nn.Module):
    """Writes to a buffer and to gradients also in evaluation mode, as real models do."""

    def __init__(self):
        super().__init__()
        self.body = convnet()
        self.register_buffer("calls", torch.zeros(()))
        self.statistics = nn.BatchNorm2d(2).double()

    def forward(self, x):
        self.calls += 1
        self.statistics.running_mean.add_(x.mean((0, 2, 3)))
        return self.body(x)


def snapshot(model):
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "grad values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "params": [p.detach().clone() for p in model.parameters()],
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "buffer objects": [id(b) for b in model.buffers()],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_untouched(model, before):
    after = snapshot(model)
    for key in ("modes", "requires_grad", "buffer objects", "grad mode"):
        assert before[key] == after[key], key
    assert all(a is b for a, b in zip(before["grads"], after["grads"], strict=True))
    for key in ("grad values", "params"):
        for a, b in zip(before[key], after[key], strict=True):
            assert (a is None and b is None) or torch.equal(a, b), key
    for name, b in before["buffers"].items():
        assert torch.equal(b, after["buffers"][name]), name
    assert torch.equal(before["rng"], after["rng"])


def used_model():
    model = Counting().train()
    model.body[0].eval()
    model.body[6].bias.requires_grad_(False)
    model(images()).sum().backward()
    return model


def broken_half_way():
    yield images(3)
    raise OSError("the disk is gone")


@pytest.mark.parametrize("estimator", ["per_sample", "batch"])
def test_everything_is_put_back(estimator):
    model = used_model()
    before = snapshot(model)
    loader = torch.utils.data.DataLoader(images(), batch_size=2, shuffle=True)
    estimate_importance(model, loader, estimator=estimator)
    assert_untouched(model, before)


def test_everything_is_put_back_when_the_data_fails_half_way():
    model = used_model()
    before = snapshot(model)
    with pytest.raises(OSError, match="the disk is gone"):
        estimate_importance(model, broken_half_way())
    assert_untouched(model, before)


# -- bad input -----------------------------------------------------------------------------------


class Scalar(nn.Linear):
    def forward(self, x):
        return super().forward(x).sum()


class Averaged(nn.Linear):
    def forward(self, x):
        return super().forward(x).mean(0)


def nan_in(x):
    x = x.clone()
    x[3, 0] = float("nan")
    return x


def with_nan_parameter():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    return model


def frozen():
    return mlp().requires_grad_(False)


X = vectors()
BAD = {
    "empty data": (mlp, [], {}, ValueError, "no samples"),
    "an exhausted iterator": (mlp, iter([]), {}, ValueError, "no samples"),
    "zero samples": (mlp, [X[:0]], {}, ValueError, "no samples"),
    "a bare tensor": (mlp, X, {}, TypeError, r"data is a Tensor.*\[batch\]"),
    "a number": (mlp, 3, {}, TypeError, "data is a int"),
    "an odd batch": (mlp, ["text"], {}, TypeError, "a batch is a str.*forward="),
    "an empty batch": (mlp, [()], {}, TypeError, "empty tuple"),
    "NaN inputs": (mlp, [nan_in(X)], {}, ValueError, "objective of sample.*'0.weight'"),
    "a NaN parameter": (with_nan_parameter, [X], {}, ValueError, "'2.weight'.*NaN or Inf itself"),
    "NaN gradients": (
        mlp,
        [X],
        {"objective": lambda y: (y - y.detach()).sum(1).sqrt()},
        ValueError,
        "gradient of parameter '0.weight' is NaN or Inf",
    ),
    "no sample dimension": (lambda: Scalar(6, 2).double(), [X], {}, ValueError, "no sample dim"),
    "averaged samples": (lambda: Averaged(6, 2).double(), [X], {}, ValueError, "no sample dim"),
    "integer output": (nn.Identity, [X], {}, ValueError, "no parameter is selected"),
    "no parameters": (frozen, [X], {}, ValueError, "no parameter is selected.*requires_grad"),
    "unknown name": (mlp, [X], {"params": ["head.*"]}, ValueError, r"'head.\*' matches no"),
    "params a string": (mlp, [X], {"params": "0.weight"}, TypeError, "params must be None, a list"),
    "estimator": (mlp, [X], {"estimator": "fisher"}, ValueError, "estimator: 'fisher'.*per_sample"),
    "objective": (mlp, [X], {"objective": "l3"}, ValueError, "objective: 'l3'.*squared_l2"),
    "objective's shape": (
        mlp,
        [X],
        {"objective": lambda y: y},
        ValueError,
        "objective: the callable returned",
    ),
    "max_samples": (mlp, [X], {"max_samples": 0}, ValueError, "max_samples is 0"),
    "progress": (mlp, [X], {"progress": 3}, TypeError, "progress is 3"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("estimator", ["per_sample", "batch"])
def test_bad_input_is_refused_and_changes_nothing(case, estimator):
    make, data, options, error, message = BAD[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        estimate_importance(model, data, **{"estimator": estimator, **options})
    after = snapshot(model)
    assert before["modes"] == after["modes"]
    assert torch.equal(before["rng"], after["rng"])
    assert before["requires_grad"] == after["requires_grad"]


def test_integer_output_is_refused():
    with pytest.raises(TypeError, match=r"dtype torch.int64; it must be floating"):
        estimate_importance(mlp(), [X], forward=lambda m, b: m(b).long())


def test_an_output_without_a_tensor_is_refused():
    with pytest.raises(TypeError, match=r"returned a str; pass forward="):
        estimate_importance(mlp(), [X], forward=lambda m, b: "logits")


def test_batch_statistics_in_evaluation_mode_are_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False)).double()
    with pytest.raises(ValueError, match=r"module '1' normalises by the batch"):
        estimate_importance(model, [X])


@pytest.mark.parametrize("estimator", ["per_sample", "batch"])
def test_an_objective_that_depends_on_no_parameter_is_refused(estimator):
    with pytest.raises(ValueError, match="depends on no parameter that is measured"):
        estimate_importance(mlp(), [X], objective=lambda y: y.detach().sum(1), estimator=estimator)
    with pytest.raises(ValueError, match="runs under no_grad"):
        estimate_importance(mlp(), [X], forward=torch.no_grad()(lambda m, b: m(b)))


def without_gradients(batches):
    with torch.no_grad():
        yield from batches


def test_a_generator_that_switches_gradients_off_does_no_harm():
    model = mlp()
    assert_same(estimate_importance(model, without_gradients(X.split(4))), oracle(model, X))


class Merging(nn.Linear):
    """As LoRA layers do: the weights change with the mode."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight.mul_(2 if mode else 0.5)
        return super().train(mode)


def test_what_modules_do_in_train_and_eval_is_not_run():
    model = Merging(6, 3).double()
    before = model.weight.detach().clone()
    estimate_importance(model, [X])
    assert torch.equal(model.weight, before)
    assert model.training


class Odd(nn.Module):
    """Buffers that are not dense, and one that appears in the forward."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("meta", torch.zeros(3, device="meta"))

    def forward(self, x):
        self.register_buffer("cache", x)
        self.sparse.mul_(2)
        return self.body(x)


def test_odd_buffers_are_put_back():
    model = Odd()
    estimate_importance(model, [X])
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))
    assert set(dict(model.named_buffers())) == {"sparse", "meta"}


class Lengths(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 2).double()

    def forward(self, x, lengths):
        assert len(x) == len(lengths)
        return self.linear(x) * torch.tensor(lengths).unsqueeze(1)


def test_a_list_with_a_value_a_sample_is_cut_with_the_batch():
    model, lengths = Lengths(), list(range(1, 11))
    batches = [{"x": X[k : k + 1], "lengths": lengths[k : k + 1]} for k in range(10)]
    whole = estimate_importance(model, [{"x": X, "lengths": lengths}])
    assert_same(whole, estimate_importance(model, batches))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(layer):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = layer(3, 4, batch_first=True).double()

        def forward(self, x):
            return self.recurrent(x.view(-1, 2, 3))[0][:, -1]

    model = Recurrent()
    assert_same(estimate_importance(model, [X]), oracle(model, X))
