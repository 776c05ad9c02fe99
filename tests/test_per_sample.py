"""Exact importance of any architecture, objective and cut into batches, against batch size 1."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mas_ext import Importance, estimate_importance
from tests import layers, zoo
from tests.models import convnet, images, mlp, vectors
from tests.oracle import assert_exact, one_by_one, split

FALLBACK = "one sample at a time"
PATHS = {"direct", "generic", "subgraph", "unused"}

# Under a softmax a key's bias shifts all scores of a query alike: its true gradient is zero.
ZERO_BY_NATURE = ("key.bias", "k_lin.bias", "k_proj.bias")

# Exact, but not asked to be fast: samples change their place or their order of derivation.
MAY_FALL_BACK = {
    "mixtral",
    "batch as channels",
    "batch as length",
    "columns",
    "crops",
    "distances",
    "embedding, max norm",
    "force field",
    "fourier",
    "functional",
    "hypernetwork",
    "two views",
}


# ================================================================================================
# The zoo
# ================================================================================================
class Measured(NamedTuple):
    name: str
    expected: dict[str, Tensor]
    omega: Importance


def measured(name: str, sizes: tuple[int, ...] = (zoo.B,)) -> Measured:
    model, batch, forward = zoo.build(name)
    expected = one_by_one(model, [batch], forward=forward)
    return Measured(
        name, expected, estimate_importance(model, split(batch, sizes), forward=forward)
    )


LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in zoo.LARGE_MODELS]


@pytest.fixture(scope="module", params=[*zoo.MODELS, *LARGE])
def model(request) -> Measured:
    """Measured once for the tests that look at it."""
    return measured(request.param)


def test_models_are_exact(model):
    assert model.omega.num_samples == zoo.B
    assert_exact(model.omega, model.expected)


def share_of_generic(omega: Importance) -> float:
    generic = sum(omega[name].numel() for name, path in omega.coverage.items() if path == "generic")
    return generic / sum(value.numel() for value in omega.values())


def assert_covered(measured: Measured) -> None:
    name, expected, omega = measured
    assert set(omega.coverage) == set(omega)
    print(name, {p: path for p, path in omega.coverage.items() if path != "direct"})
    allowed = PATHS | {FALLBACK} if name in MAY_FALL_BACK else PATHS
    assert set(omega.coverage.values()) <= allowed
    assert not any(expected[p].any() for p, path in omega.coverage.items() if path == "unused")


def test_models_are_measured_in_one_pass(model):
    assert_covered(model)
    assert share_of_generic(model.omega) < 0.05


def test_the_zoo_hides_nothing(model):
    """A zero Ω would be right by accident: only what is unused, or zero by nature, has one."""
    floor = 1e-13 * max(float(value.max()) for value in model.expected.values())
    zero = [name for name, value in model.expected.items() if value.max() <= floor]
    assert all(name.endswith(ZERO_BY_NATURE) or name.startswith("aux") for name in zero)


@pytest.mark.parametrize("sizes", [(5,), (3, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("name", zoo.LAYERS)
def test_layers_are_exact_however_the_batch_is_cut(name, sizes):
    layer = measured(name, sizes)
    assert_exact(layer.omega, layer.expected)


@pytest.mark.parametrize("name", zoo.LAYERS)
def test_layers_are_measured_in_one_pass(name):
    assert_covered(measured(name))


def test_what_the_output_does_not_depend_on_is_unused():
    omega = measured("two heads").omega
    assert {name for name, path in omega.coverage.items() if path == "unused"} == {
        "other.weight",
        "other.bias",
    }


@pytest.mark.parametrize("batch_size", [8, 32])
def test_the_model_runs_a_few_times_not_once_a_sample(batch_size):
    model, calls = convnet(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    estimate_importance(model, images(64).split(batch_size))
    assert len(calls) <= 64 // batch_size + 4


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation made, oneDNN's byte buffers apart."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made = [tensor.numel() for tensor in tensors if tensor.is_floating_point()]
        self.elements = max([self.elements, *made])
        return result


WIDE = {
    "vectors": lambda: (nn.Linear(64, 64), torch.randn(32, 64)),
    "sequences": lambda: (nn.Linear(64, 64), torch.randn(32, 4, 64)),
    "embedding": lambda: (nn.Embedding(500, 8), torch.randint(500, (32, 4))),
    "convolution": lambda: (nn.Conv2d(32, 32, 3, padding=1), torch.randn(32, 32, 4, 4)),
    "lstm": lambda: (nn.LSTM(32, 32, batch_first=True), torch.randn(32, 3, 32)),
    "tied": lambda: (layers.TiedLM(300, 16), torch.randint(300, (32, 2))),
    "weight norm": lambda: (
        nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
        torch.randn(32, 64),
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_memory_does_not_grow_with_samples_times_parameters(name):
    model, x = WIDE[name]()
    with Largest() as largest:
        estimate_importance(model, [x])
    assert 0 < largest.elements < len(x) * max(p.numel() for p in model.parameters())


# ================================================================================================
# Objectives and outputs
# ================================================================================================
def flat(y: Tensor) -> Tensor:
    return y.reshape(len(y), -1)


OBJECTIVES = {
    "squared_l2": lambda y: flat(y).square().sum(1),
    "l2": lambda y: flat(y).square().sum(1).sqrt(),
    "l1": lambda y: flat(y).abs().sum(1),
}
CALLABLES = {
    "cube": lambda y: (flat(y) ** 3).sum(1),
    "entropy": lambda y: -(flat(y).softmax(1) * flat(y).log_softmax(1)).sum(1),
    "first": lambda y: flat(y)[:, 0],
    "largest": lambda y: flat(y).amax(1),
}
OUTPUTS = {
    1: lambda: (layers.VectorWeight(6), vectors(5)),
    2: lambda: (mlp(), vectors(5)),
    3: lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh()), vectors(5).view(5, 2, 3)),
    4: lambda: (convnet()[:3], images(5)),
}


@pytest.mark.parametrize("rank", OUTPUTS)
@pytest.mark.parametrize("objective", [*OBJECTIVES, *CALLABLES])
def test_objectives_of_outputs_of_any_rank(objective, rank):
    model, x = OUTPUTS[rank]()
    expected = one_by_one(model.double(), [x], {**OBJECTIVES, **CALLABLES}[objective])
    given = CALLABLES.get(objective, objective)
    assert_exact(estimate_importance(model, x.split([3, 2]), objective=given), expected)


# ================================================================================================
# The cut into batches
# ================================================================================================
def recurrent() -> nn.Module:
    return nn.Sequential(nn.LSTM(4, 5, 2, batch_first=True))


CUT = {
    "mlp": (mlp, (6,)),
    "cnn": (convnet, (2, 8, 8)),
    "transformer": (lambda: zoo.encoder(True), (6, 8)),
    "lstm": (recurrent, (6, 4)),
}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 7, 32, 40])
@pytest.mark.parametrize("name", CUT)
def test_importance_does_not_depend_on_the_batch_size(name, batch_size, dtype):
    make, shape = CUT[name]
    model, x = make().to(dtype), torch.randn(40, *shape, dtype=dtype)
    expected = one_by_one(model, [x])
    omega = estimate_importance(model, x.split(batch_size))
    assert omega.num_samples == 40
    assert_exact(omega, expected, rtol=TOLERANCE[dtype], floor=TOLERANCE[dtype])


@pytest.mark.parametrize("max_samples", [1, 2, 4, 5, 6, 9])
def test_max_samples_cuts_a_batch(max_samples):
    model, x = convnet(), images(12)
    omega = estimate_importance(model, x.split(4), max_samples=max_samples)
    assert omega.num_samples == max_samples
    assert_exact(omega, one_by_one(model, [x[:max_samples]]))


LENGTHS = [(3, 6), (1, 1), (4, 3), (1, 6), (2, 2), (5, 5), (2, 1)]  # samples, tokens
SEQUENCES = ["encoder", "lstm", "gru time first", "attention pooling", "rnn by hand"]


def sequence_model(name: str) -> nn.Module:
    return {
        "encoder": lambda: zoo.encoder(True),
        "lstm": lambda: nn.LSTM(8, 3, bidirectional=True, batch_first=True),
        "gru time first": lambda: layers.TimeFirst(nn.GRU(8, 3)),
        "attention pooling": lambda: layers.LearnedQueries(2, 8),
        "rnn by hand": lambda: layers.HandRNN(8, 3),
    }[name]().double()


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("order", [1, -1], ids=["", "reversed"])
def test_batches_of_other_sizes_and_lengths(name, order):
    model = sequence_model(name)
    batches = [torch.randn(b, t, 8).double() for b, t in LENGTHS[::order]]
    omega = estimate_importance(model, batches)
    assert omega.num_samples == sum(b for b, _ in LENGTHS)
    assert_exact(omega, one_by_one(model, batches))


class Branching(nn.Module):
    """A layer more for large inputs: another graph in a later batch."""

    def __init__(self):
        super().__init__()
        self.first, self.extra, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        if x.abs().max() > 100:
            x = self.extra(x / 1000).relu()
        return self.last(x.tanh())


@pytest.mark.parametrize("scales", [(1, 1e4, 1), (1e4, 1), (1, 1e4)], ids=str)
def test_a_graph_that_changes_between_batches(scales):
    model = Branching().double()
    batches = [scale * (1 + torch.rand(5, 4).double()) for scale in scales]
    assert_exact(estimate_importance(model, batches), one_by_one(model, batches))


def test_a_gradient_that_is_zero_in_the_first_batch_only():
    """Dead units, and LoRA before its first step: no plan may take the zero for a rule."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model.double()
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
    x = torch.rand(12, 4).double()
    x[:4] *= -1
    batches = x.split(4)
    assert_exact(estimate_importance(model, batches), one_by_one(model, batches))


# ================================================================================================
# Inputs
# ================================================================================================
class Several(nn.Module):
    """Tokens, features, a shared table, and a flag."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.mix = nn.Embedding(7, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, tokens, features, table, squash=True):
        hidden = self.embedding(tokens).mean(1) + self.linear(features) @ table
        return self.mix(hidden.tanh() if squash else hidden)


def several() -> dict:
    return {
        "tokens": torch.randint(7, (5, 6)),
        "features": torch.randn(5, 3).double().requires_grad_(),
        "table": torch.randn(4, 4).double(),  # no sample dimension: shared by all
        "squash": False,
    }


def test_a_mapping_of_several_tensors_some_of_which_are_shared_or_require_gradients():
    model, batch = Several().double(), several()
    expected = one_by_one(model, [batch])
    labelled = [{**part, "labels": part["tokens"]} for part in split(batch, (3, 2))]
    assert_exact(estimate_importance(model, labelled), expected)
    assert batch["features"].grad is None
    assert batch["features"].requires_grad


def test_inputs_that_require_gradients_or_come_from_a_graph():
    model, leaf = convnet(), images().requires_grad_()
    expected = one_by_one(model, [images()])
    assert_exact(estimate_importance(model, [leaf]), expected)
    assert_exact(estimate_importance(model, [leaf * 1]), expected)
    assert leaf.grad is None


LAYOUTS = {
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "batch last in memory": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_memory_layout(layout):
    model, x = convnet(), LAYOUTS[layout](images())
    assert_exact(estimate_importance(model, [x]), one_by_one(model, [x]))


FORWARDS = {
    "nested": (lambda x: {"deep": [x, "name"]}, lambda m, b: m(b["deep"][0])),
    "transposed": (lambda x: (x.T,), lambda m, b: m(b[0].T)),
    "list of samples": (list, lambda m, b: m(torch.stack(b))),
    "an object": (lambda x: type("Batch", (), {"x": x}), lambda m, b: m(b.x)),
    "indices": (lambda x: torch.arange(len(x)), lambda m, b: m(vectors()[b])),
}


@pytest.mark.parametrize("max_samples", [None, 4])
@pytest.mark.parametrize("name", FORWARDS)
def test_forward_with_odd_batches(name, max_samples):
    pack, forward = FORWARDS[name]
    model, x = mlp(), vectors()
    omega = estimate_importance(model, [pack(x)], forward=forward, max_samples=max_samples)
    assert_exact(omega, one_by_one(model, [x[:max_samples]]))


def test_forward_may_leave_out_layers():
    model, x = mlp(), vectors()

    def without_tanh(model, batch):
        return model[2](model[0](batch))

    omega = estimate_importance(model, x.split(4), forward=without_tanh)
    assert_exact(omega, one_by_one(model, [x], forward=without_tanh))


# ================================================================================================
# Which parameters
# ================================================================================================
@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "0.*", "2.*"])
def test_frozen_parameters(frozen):
    model, x = mlp(), vectors()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen.rstrip("*")))
    omega = estimate_importance(model, x.split(4))
    assert not any(name.startswith(frozen.rstrip("*")) for name in omega)
    assert_exact(omega, one_by_one(model, [x]))


SUBSETS = [["0.*"], ["*.bias"], ["6.weight"], ["1.*"], ["0.bias"]]


@pytest.mark.parametrize("params", SUBSETS, ids=str)
def test_a_subset_of_the_parameters(params):
    model, x = convnet(), images()
    omega = estimate_importance(model, [x], params=params)
    expected = one_by_one(model, [x])
    assert omega
    assert_exact(omega, {name: expected[name] for name in omega})
    assert set(omega.coverage) == set(omega)


def test_dtypes_may_be_mixed():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = nn.Linear(6, 4).bfloat16(), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.high(self.low(x.bfloat16()).double().tanh())

    model = Mixed()
    omega = estimate_importance(model, [vectors()])
    assert [omega[n].dtype for n in ("low.weight", "high.weight")] == [torch.float32, torch.float64]
    assert_exact(omega, one_by_one(model, [vectors()]), rtol=1e-2)


def test_rows_too_small_to_tell_do_not_make_it_slow():
    """Gradients at the edge of float32's range have lost digits, and no owner can be read off."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    x = torch.randn(7, 6)
    x[3:] *= 1e-26
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-3)
        for layer in model:
            layer.bias.zero_()
    omega = estimate_importance(model, [x])
    assert set(omega.coverage.values()) == {"direct"}
