"""Per-sample importance is exact for every layer and model of the zoo, however data is batched.

The judge is each sample by itself, in float64 and ordinary autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mas_ext import MAS, Importance, estimate_importance
from tests.support import zoo
from tests.support.oracle import REDUCTIONS, assert_exact, by_reduction, one_by_one, split
from tests.support.zoo.layers import (
    Net,
    learned_queries,
    low_rank,
    rnn_by_hand,
    tied_language_model,
    time_first,
)
from tests.support.zoo.models import encoder
from tests.support.zoo.paths import PATHS
from tests.support.zoo.small import B, convnet, images, mlp, vectors

# Under a softmax a key's bias shifts all scores of a query alike: its true gradient is zero.
# A norm takes away what was shifted before it.
ZERO_BY_NATURE = ("shift", "*key.bias", "*k_lin.bias", "*k_proj.bias", "aux*")
EITHER = pytest.mark.parametrize("reduction", REDUCTIONS)
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in zoo.LARGE_MODELS]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# -- The zoo ---------------------------------------------------------------------------------------
def expected_paths(name: str, omega: Importance) -> dict[str, str]:
    """The first of the patterns that matches a parameter decides; without one it is direct."""
    patterns = PATHS.get(name, {})
    return {
        parameter: next(
            (p for glob, p in patterns.items() if fnmatchcase(parameter, glob)), "direct"
        )
        for parameter in omega
    }


@pytest.mark.parametrize("name", [*zoo.LAYERS, *zoo.MODELS, *LARGE])
def test_the_zoo_is_exact_and_takes_the_paths_it_should(name):
    model, batch, forward = zoo.build(name)
    means = by_reduction(model, [batch], forward=forward)
    for reduction in REDUCTIONS:
        omega = estimate_importance(model, [batch], forward=forward, reduction=reduction)
        assert omega.num_samples == B
        assert_exact(omega, means[reduction])
        assert omega.coverage == expected_paths(name, omega)
    expected = means["abs"]
    # A zero Ω would be right by accident: only a parameter that is unused may have one.
    floor = 1e-13 * max(float(value.max()) for value in expected.values())
    for parameter, value in expected.items():
        if value.max() <= floor and omega.coverage[parameter] != "unused":
            assert any(fnmatchcase(parameter, glob) for glob in ZERO_BY_NATURE), parameter


@pytest.mark.parametrize(
    ("sizes", "reduction"), [((3, 2), "square"), ((1, 4), "abs")], ids=["3, 2", "1, 4"]
)
@pytest.mark.parametrize("name", zoo.LAYERS)
def test_layers_are_exact_however_the_batch_is_cut(name, sizes, reduction):
    """Plans are made for one of the reductions, and serve both."""
    model, batch, forward = zoo.build(name)
    means = by_reduction(model, [batch], forward=forward)
    omega = estimate_importance(model, split(batch, sizes), forward=forward, reduction=reduction)
    assert_exact(omega, means[reduction])


def test_a_linear_layer_analytically():
    """F(x) = Wx: ∂‖F‖²/∂W_ij = 2 y_i x_j."""
    model, x = nn.Linear(6, 3, bias=False).double(), vectors()
    y = x @ model.weight.detach().T
    expected = (2 * y[:, :, None] * x[:, None, :]).abs().mean(0)
    torch.testing.assert_close(estimate_importance(model, [x])["weight"], expected)


# -- What it costs ---------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [8, 32])
def test_the_model_runs_a_few_times_not_once_per_sample(batch_size):
    model, calls = convnet(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    estimate_importance(model, images(64).split(batch_size))
    batches = 64 // batch_size
    assert len(calls) <= batches + 4 + 2 * math.ceil(math.log2(batches) + 1)


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation made, oneDNN's byte buffers apart."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made = [tensor.numel() for tensor in tensors if tensor.is_floating_point()]
        self.elements = max([self.elements, *made])
        return result


WIDE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "vectors": lambda: (nn.Linear(64, 64), torch.randn(32, 64)),
    "sequences": lambda: (nn.Linear(64, 64), torch.randn(32, 4, 64)),
    "embedding": lambda: (nn.Embedding(500, 8), torch.randint(500, (32, 4))),
    "convolution": lambda: (nn.Conv2d(32, 32, 3, padding=1), torch.randn(32, 32, 4, 4)),
    "lstm": lambda: (nn.LSTM(32, 32, batch_first=True), torch.randn(32, 3, 32)),
    "tied": lambda: (tied_language_model(300, 16), torch.randint(300, (32, 2))),
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


# -- Batches of any size and length ----------------------------------------------------------------
SIZED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "cnn": (convnet, (2, 8, 8)),
    "cnn in chunks": (lambda: nn.Conv2d(8, 3, 3), (8, 24, 24)),  # too many patches for one
    "cnn of many pixels": (lambda: nn.Conv2d(16, 3, 3), (16, 18, 18)),
    "transformer": (lambda: encoder(True), (6, 8)),
    "lstm": (lambda: nn.LSTM(4, 5, 2, batch_first=True), (6, 4)),
}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("batch_size", [1, 7, 64, 72])  # rows are told apart by powers of two
@pytest.mark.parametrize("name", SIZED)
def test_importance_does_not_depend_on_the_batch_size(name, batch_size, dtype):
    make, shape = SIZED[name]
    model, x = make().to(dtype), torch.randn(72, *shape, dtype=dtype)
    means, bound = by_reduction(model, [x]), 2 * TOLERANCE[dtype]
    for reduction in REDUCTIONS:
        omega = estimate_importance(model, x.split(batch_size), reduction=reduction)
        assert omega.num_samples == 72
        assert set(omega.coverage.values()) == {"direct"}
        assert_exact(omega, means[reduction], rtol=bound, floor=bound)


LENGTHS = [(3, 6), (1, 1), (4, 3), (1, 6), (2, 2), (5, 5), (2, 1)]  # samples, tokens
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: encoder(True),
    "lstm": lambda: nn.LSTM(8, 3, bidirectional=True, batch_first=True),
    "gru time first": lambda: time_first(nn.GRU(8, 3)),
    "attention pooling": lambda: learned_queries(2, 8),
    "rnn by hand": lambda: rnn_by_hand(8, 3),
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize(("order", "reduction"), [(1, "abs"), (-1, "square")], ids=["", "reversed"])
def test_batches_of_other_sizes_and_lengths(name, order, reduction):
    model = SEQUENCES[name]().double()
    batches = [normal(b, t, 8) for b, t in LENGTHS[::order]]
    omega = estimate_importance(model, batches, reduction=reduction)
    assert omega.num_samples == sum(b for b, _ in LENGTHS)
    assert_exact(omega, one_by_one(model, batches, reduction=reduction))


# -- A plan is made from one batch, and must not be used for a batch that it is wrong for ----------
def branching(m: Net, x: Tensor) -> Tensor:
    """One more layer for large inputs: another graph in a later batch."""
    x = m.first(x)
    return m.last((m.extra(x / 1000).relu() if x.abs().max() > 100 else x).tanh())


def scaled_batches(*scales: float) -> tuple[nn.Module, list[Tensor]]:
    layers = {name: nn.Linear(4, 4) for name in ("first", "extra", "last")}
    return Net(branching, **layers), [s * (1 + torch.rand(5, 4).double()) for s in scales]


def dead_units() -> tuple[nn.Module, list[Tensor]]:
    """No gradient in the first batch: no plan may take the zero for a rule."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
    x = torch.rand(12, 4).double()
    x[:4] *= -1
    return model, list(x.split(4))


def apply_to_masked(m: Net, x: Tensor) -> Tensor:
    """The layer sees the positions that a mask leaves, of all samples in one sequence."""
    mask, out = x[..., 0] > 0, torch.zeros_like(x)
    out[mask] = m.layer(x[mask]).tanh()
    return out


def ragged(*counts: int) -> Tensor:
    x = normal(len(counts), 5, 4)
    x[..., 0].abs_()
    for k, count in enumerate(counts):
        x[k, count:, 0] *= -1
    return x


def cached_weight(m: Net, x: Tensor) -> Tensor:
    """What the weight looks like is computed once, and kept with its history."""
    if not hasattr(m, "cache"):
        m.cache = m.table.exp()[torch.arange(4) % 3]
    return x * m.cache


CHANGING: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "a layer more in the middle": lambda: scaled_batches(1, 1e4, 1),
    "a layer less": lambda: scaled_batches(1e4, 1),
    "a layer more": lambda: scaled_batches(1, 1e4),
    "no gradient in the first batch": dead_units,
    "rows elsewhere in the next batch": lambda: (
        Net(apply_to_masked, layer=nn.Linear(4, 4)),
        [ragged(3, 3, 3, 3), ragged(5, 1, 4, 2)],
    ),
    "a graph that the model keeps": lambda: (Net(cached_weight, table=(6,)), [normal(5, 4)]),
}


@EITHER
@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_between_batches(name, reduction):
    torch.manual_seed(0)
    model, batches = CHANGING[name]()
    model.double()
    omega = estimate_importance(model, batches, reduction=reduction)
    vars(model).pop("cache", None)
    assert_exact(omega, one_by_one(model, batches, reduction=reduction))


def test_another_slice_of_a_parameter_in_every_batch():
    """A head for each task: the same operations elsewhere in the parameter."""
    model, x = Net(lambda m, x: (x @ m.w[m.task]).tanh(), w=(3, 4, 2)).double(), normal(5, 4)
    mas = MAS(model)
    for model.task in (0, 2, 0, 1):
        assert_exact(estimate_importance(model, [x]), one_by_one(model, [x]))
        mas.consolidate([x])
    assert (mas.importance["w"] > 0).all()


def test_a_gradient_that_is_zero_in_the_first_measurement_only():
    """LoRA starts with B = 0: the first measurement finds no gradient in A, the next one does."""
    model, x = low_rank(3, 4, 2).double(), normal(6, 3)
    nn.init.zeros_(model.b)
    mas, first = MAS(model), one_by_one(model, [x])
    mas.update_importance([x])
    with torch.no_grad():
        model.b.normal_()
    second = one_by_one(model, [x])
    mas.consolidate([x])
    assert_exact(mas.importance, {n: (first[n] + second[n]) / 2 for n in first})


def test_layers_exchanged_between_measurements():
    model, x = mlp(), vectors()
    estimate_importance(model, [x])
    model[1] = nn.Sequential(nn.LayerNorm(8), nn.ReLU()).double()
    model[0].weight = nn.Parameter(normal(8, 6))
    assert_exact(estimate_importance(model, [x]), one_by_one(model, [x]))


# -- Dtypes ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "function",
    [F.linear, lambda x, w: F.embedding(x[:, :1].long() % 3, w)],
    ids=["linear", "table"],
)
@pytest.mark.parametrize("inside", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("outside", [torch.float32, torch.float64], ids=str)
@EITHER
def test_a_use_in_another_dtype(function, inside, outside, reduction):
    model = Net(lambda m, x: function(x.to(inside), m.w.to(inside)).tanh(), w=(3, 4)).to(outside)
    x = 10 * torch.randn(5, 4, dtype=outside)
    omega = estimate_importance(model, [x], reduction=reduction)
    assert omega["w"].dtype == outside
    assert_exact(omega, one_by_one(model, [x], reduction=reduction), rtol=2e-5)


def test_parameters_of_several_dtypes():
    parts = {"low": nn.Linear(6, 4).bfloat16(), "high": nn.Linear(4, 3).double()}
    model = Net(lambda m, x: m.high(m.low(x.bfloat16()).double().tanh()), **parts)
    omega = estimate_importance(model, [vectors()])
    assert [omega[n].dtype for n in ("low.weight", "high.weight")] == [torch.float32, torch.float64]
    assert_exact(omega, one_by_one(model, [vectors()]), rtol=1e-2)


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_are_kept_in_float32(dtype, reduction):
    omega = estimate_importance(mlp(dtype), [vectors(dtype=dtype)], reduction=reduction)
    assert {t.dtype for t in omega.values()} == {torch.float32}


SQUARED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a matrix": lambda m, x: x @ m.w,
    "a part of one": lambda m, x: x[:, :2] @ m.w[1:3],
    "rows out of order": lambda m, x: x @ m.w[torch.tensor([2, 0, 1, 3])],
    "computed": lambda m, x: x @ (m.w * 2),
    "elementwise": lambda m, x: x * m.w[:, 0],
    "used twice": lambda m, x: x @ m.w + x.flip(1) @ m.w,
}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("use", SQUARED)
def test_squares_may_exceed_the_range_of_the_parameters(use, size):
    """A gradient of 1000 fits into float16, and its square does not."""
    model, x = Net(SQUARED[use], w=(4, 4)).half(), torch.full((size, 4), 1000.0).half()
    for row, value in zip(x, (1, -1, 0.5, 0.25), strict=False):
        row.mul_(value)
    options: dict = {"objective": lambda y: y.float().sum(1) / 8, "reduction": "square"}
    omega = estimate_importance(model, [x], **options)
    assert omega["w"].dtype == torch.float32
    assert omega["w"].max() > torch.finfo(torch.float16).max / 16
    assert_exact(omega, one_by_one(model, [x], **options), rtol=5e-3)


def test_rows_too_small_to_assign_do_not_make_it_slow():
    """Gradients at the edge of float32's range have lost digits, and no sample can be read off."""
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)), torch.randn(7, 6)
    x[3:] *= 1e-26
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(1e-3)
            layer.bias.zero_()
    assert set(estimate_importance(model, [x]).coverage.values()) == {"direct"}
