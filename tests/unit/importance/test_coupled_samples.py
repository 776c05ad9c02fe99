"""Models built to break assumptions: Ω is exactly right, or refused with help, never wrong.

The judge is each sample alone. Sizes such as 3 and 5 meet each other as the number of samples, of
tokens and of features, so that no shape tells which dimension is which.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_ext import MAS, estimate_importance
from tests.layers import LowRank, weight
from tests.models import mlp, vectors
from tests.oracle import assert_exact, differences, one_by_one, refused_or, row_by_row

D, T = 3, 5  # features and tokens
SIZES = [1, 2, 3, 4, 5, 7]
HELPFUL = r"(?i)sample|batch|parameter"  # what a refusal must speak of


class Net(nn.Module):
    """Something done to all samples between two layers."""

    def __init__(self, between: Callable[..., Tensor]):
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)
        self.extra = weight(D)
        self.between = between
        self.double()

    def forward(self, x):
        hidden = self.first(x).tanh()
        return self.last(self.between(self, hidden))


def rows(size: int) -> list[Tensor]:
    """Three batches of a few sizes; samples differ in scale and in sign of their mean."""
    x = torch.randn(2 * size + 2, D).double()
    x[::2] += 1
    return list(x.split([size, size + 1, 1]))


def sequences(size: int) -> list[Tensor]:
    return list(torch.randn(2 * size + 2, T, D).double().split([size, size + 1, 1]))


def put_back(order: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x[order])[order.argsort()]


# ================================================================================================
# Samples that do not meet, wherever they go: exactly right
# ================================================================================================
def packed(net: Net, x: Tensor) -> Tensor:
    """Only some tokens go through the layer, all samples' together."""
    mask = x[..., 0] > 0
    out = torch.zeros_like(x)
    out[mask] = net.first(x[mask])
    return out


def experts(net: Net, x: Tensor) -> Tensor:
    tokens = x.flatten(0, -2)
    choice, out = (tokens[:, 0] > 0).long(), torch.zeros_like(tokens)
    for k, expert in enumerate((net.first, lambda t: t * net.extra)):
        (index,) = (choice == k).nonzero(as_tuple=True)
        out.index_add_(0, index, expert(tokens[index]))
    return out.view_as(x)


def by_length(net: Net, x: Tensor) -> Tensor:
    """Sorted by a length that the data has, stepped through while there are any left, put back."""
    lengths = 1 + (x[:, :, 0] > 0).sum(1)
    order = lengths.argsort(descending=True)
    packed = nn.utils.rnn.pack_padded_sequence(
        x[order], lengths[order].clamp(max=T), batch_first=True
    )
    mixed = packed._replace(data=net.first(packed.data).tanh())
    out, _ = nn.utils.rnn.pad_packed_sequence(mixed, batch_first=True, total_length=T)
    return out[order.argsort()]


def shuffled_tokens(net: Net, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    return put_back(order, net.first, flat).view_as(x)


def both_layouts(net: Net, x: Tensor) -> Tensor:
    """The same weight with the sample as the slow dimension, then as the fast one."""
    return net.first(x).sin() * net.first(x.transpose(0, 1)).transpose(0, 1)


def time_first_last_token(net: Net, x: Tensor) -> Tensor:
    """For T ≡ 1 mod B the only row of sample 0 is the same in both layouts."""
    return net.first(x.transpose(0, 1))[-1]


def windows(net: Net, x: Tensor) -> Tensor:
    padded = F.pad(x, (0, 0, 0, 1)).view(len(x) * 3, 2, D)
    return net.first(padded).tanh().view(len(x), 6, D)


def in_chunks(net: Net, x: Tensor) -> Tensor:
    """Another graph for large batches, and the same function."""
    return torch.cat([net.first(part).tanh() for part in (x.chunk(2) if len(x) > 4 else [x])])


def masked_output(net: Net, x: Tensor) -> Tensor:
    """The rest of every sample is padding, from another token on."""
    length = 1 + (x[:, :, 1] > 0).sum(1, keepdim=True)
    return net.first(x) * (torch.arange(T) < length).unsqueeze(-1)


def hypernetwork(net: Net, x: Tensor) -> Tensor:
    """Every sample makes its own weights, from a parameter that is also used directly."""
    own = net.first.weight * torch.sigmoid(x).unsqueeze(1)
    return torch.bmm(own, x.unsqueeze(2)).squeeze(2) + net.first(x)


def computed_and_direct(net: Net, x: Tensor) -> Tensor:
    """One parameter in a sub-graph of parameters only, in its result's use, and on its own."""
    normal = net.first.weight / net.first.weight.norm(dim=1, keepdim=True)
    return F.linear(F.linear(x, normal, net.extra), net.first.weight) * net.extra.exp()


def in_place(net: Net, x: Tensor) -> Tensor:
    hidden = net.first(x)
    hidden[:, 1:] *= net.extra[1:]
    hidden[:, 0].add_(net.extra[0])
    return hidden.sigmoid_()


def outer_products(net: Net, x: Tensor) -> Tensor:
    """Rows meet all columns of a parameter of the same length as the batch may have."""
    return (x.unsqueeze(1) * net.first.weight).sum(2) + net.extra[:, None].mT


def appended_feature(net: Net, x: Tensor) -> Tensor:
    """A parameter as a further feature, and as a further token."""
    return torch.cat([x, net.extra.expand(len(x), 1, -1)], 1) * net.first.weight.sum()


class WrongOnPurpose(torch.autograd.Function):
    """Straight-through, and off by a factor: Ω is what autograd says, not what is true."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return (x * w).round()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g * w, (g.clamp(-1, 1) * x).sum(0) * 3


class ClippedParameter(torch.autograd.Function):
    """Its backward is not linear: what belongs to a sample is found only sample by sample."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0).clamp(-0.1, 0.1)


SAMPLEWISE: dict[str, tuple[Callable[..., Tensor], Callable[[int], list]]] = {
    "nothing": (lambda net, h: h, rows),
    "shuffled and back": (
        lambda net, h: put_back(torch.randperm(len(h)), lambda t: t * net.extra, h),
        rows,
    ),
    "sorted and back": (
        lambda net, h: put_back(h[:, 0].argsort(), lambda t: t * net.extra, h),
        rows,
    ),
    "flipped and back": (lambda net, h: (h.flip(0) * net.extra).flip(0), rows),
    "only some of the samples": (
        lambda net, h: torch.where(h[:, :1] > 0, h * net.extra, h),
        rows,
    ),
    "samples without a gradient": (
        lambda net, h: torch.where(h[:, :1] > 0, h, h.detach()) * net.extra,
        rows,
    ),
    "packed by a mask": (packed, sequences),
    "experts": (experts, sequences),
    "experts, vectors": (experts, rows),
    "sorted by length": (by_length, sequences),
    "shuffled tokens": (shuffled_tokens, sequences),
    "both layouts": (both_layouts, sequences),
    "time first, last token": (time_first_last_token, sequences),
    "time first, first token": (lambda net, h: net.first(h.transpose(0, 1))[0], sequences),
    "first token": (lambda net, h: net.first(h)[:, 0], sequences),
    "last token": (lambda net, h: net.first(h)[:, -1], sequences),
    "windows": (windows, sequences),
    "chunks of large batches": (in_chunks, rows),
    "ragged by a mask": (masked_output, sequences),
    "hypernetwork": (hypernetwork, rows),
    "computed and direct": (computed_and_direct, rows),
    "in place": (in_place, rows),
    "outer products": (outer_products, rows),
    "appended": (appended_feature, sequences),
    "largest token": (lambda net, h: net.first(h).amax(1), sequences),
    "wrong on purpose": (lambda net, h: WrongOnPurpose.apply(h * 3, net.extra), rows),
    "a backward that clips": (lambda net, h: ClippedParameter.apply(h, net.extra), rows),
    "a loop for each sample": (
        lambda net, h: torch.stack([net.first(row) * net.extra for row in h]),
        rows,
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SAMPLEWISE)
def test_samples_that_do_not_meet(name, size):
    between, data = SAMPLEWISE[name]
    model, batches = Net(between), data(size)
    assert_exact(estimate_importance(model, batches), one_by_one(model, batches))


@pytest.mark.parametrize("size", SIZES)
def test_a_forward_that_changes_its_input(size):
    model, batches = Net(lambda net, h: h), rows(size)
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].mul_(2),))
    expected = one_by_one(model, copy.deepcopy(batches))
    assert_exact(estimate_importance(model, batches), expected)


# ================================================================================================
# Samples that meet: exactly what each would give alone, or refused
# ================================================================================================
class MixedBackward(torch.autograd.Function):
    """The identity, whose backward averages over the batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.mean(0, keepdim=True).expand_as(g)


class ClippedByNorm(torch.autograd.Function):
    """The identity, whose backward divides by the norm of the whole batch's gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g / (1 + g.norm())


def normalise(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def looped(h: Tensor) -> Tensor:
    for _ in range(1 + int(h.detach().abs().sum()) % 3):
        h = h.tanh()
    return h


def added_to_last(h: Tensor) -> Tensor:
    out = h.clone()
    out[-1] += h[0]
    return out


def convolved(h: Tensor) -> Tensor:
    """The batch as the length of a convolution that is wider than one."""
    kernel = torch.tensor([0.5, 1.0, 0.25], dtype=h.dtype).expand(D, 1, 3)
    return F.conv1d(h.T.unsqueeze(0), kernel, padding=1, groups=D).squeeze(0).T


def earlier_values(h: Tensor) -> Tensor:
    """The gradient stays within a sample; only the first sample's value is its own."""
    return h * (1 + torch.cat([torch.zeros_like(h[:1]), h[:-1].detach()]))


COUPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean taken off": lambda h: h - h.mean(0),
    "mean taken off, detached": lambda h: h - h.mean(0).detach(),
    "standard score by hand": lambda h: (h - h.mean(0)) / (h.var(0, correction=0) + 0.1).sqrt(),
    "divided by the largest": lambda h: h / h.abs().max(),
    "divided by the largest, detached": lambda h: h / h.detach().abs().max(),
    "divided by their number": lambda h: h / len(h),
    "averaged and expanded": lambda h: h.mean(0, keepdim=True).expand_as(h),
    "softmax over the batch": lambda h: h.softmax(0),
    "largest of the batch": lambda h: h + h.amax(0),
    "sorted in each column": lambda h: h.sort(0).values,
    "cumulative sum": lambda h: h.cumsum(0),
    "cumulative sum from the end": lambda h: h.flip(0).cumsum(0).flip(0),
    "neighbours added": lambda h: h + h.roll(1, 0),
    "attention across the batch": lambda h: (h @ h.T).softmax(-1) @ h,
    "convolution across the batch": convolved,
    "earlier values, detached": earlier_values,
    "first added to last": added_to_last,
    "all multiplied by the first": lambda h: h * h[:1],
    "every second one doubled": lambda h: h * (1 + torch.arange(len(h)) % 2)[:, None],
    "the last one doubled": lambda h: torch.cat([h[:-1], 2 * h[-1:]]),
    "branch on the batch's mean": lambda h: h * 3 if h.mean() > 0 else h.sin(),
    "branch on the batch's size": lambda h: h * 3 if len(h) > 4 else h,
    "branch on even sizes": lambda h: h.sin() if len(h) % 2 == 0 else h,
    "as many rounds as the data says": looped,
    "a backward that averages": MixedBackward.apply,
    "a backward that clips by norm": ClippedByNorm.apply,
    "a shape that is added up": lambda h: (h.reshape(-1) * len(h.reshape(-1))).view_as(h),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", COUPLED)
def test_samples_that_meet_are_refused_or_taken_apart(name, size):
    between = COUPLED[name]
    model, batches = Net(lambda _, h: between(h)), rows(size)
    expected = one_by_one(model, batches)
    with refused_or(HELPFUL):
        assert_exact(estimate_importance(model, batches), expected)


@pytest.mark.parametrize("name", sorted(COUPLED.keys() - {"a backward that clips by norm"}))
def test_each_trap_is_one(name):
    """One backward a row of whole batches is wrong for it, which is why it is in the table."""
    between = COUPLED[name]
    model, batches = Net(lambda _, h: between(h)), rows(5)
    assert differences(row_by_row(model, batches), one_by_one(model, batches), rtol=1e-3)


ELSEWHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "shuffled": lambda h: h[torch.randperm(len(h))],
    "flipped": lambda h: h.flip(0),
    "sorted": lambda h: h[h[:, 0].argsort()],
    "rolled": lambda h: h.roll(1, 0),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_outputs_in_another_order_than_the_samples(name, size):
    between = ELSEWHERE[name]
    model, batches = Net(lambda _, h: between(h)), rows(size)
    expected = one_by_one(model, batches)
    with refused_or(HELPFUL):
        assert_exact(estimate_importance(model, batches), expected)


class TimeFirstOut(nn.Module):
    """Dimension 0 of input and output is time: what comes later depends on what was before."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(D, 4).double()

    def forward(self, x):
        return self.lstm(x)[0]


class RowAdded(nn.Module):
    """A parameter as one more row of the batch, which every sample then sees."""

    def __init__(self, keep: bool):
        super().__init__()
        self.row, self.layer, self.keep = weight(1, D), nn.Linear(D, D), keep
        self.double()

    def forward(self, x):
        hidden = self.layer(torch.cat([self.row, x], 0)).tanh()
        return hidden[1:] * (hidden[:1] if self.keep else 1)


class AlwaysTraining(nn.BatchNorm1d):
    """Switches itself back to training mode in the forward."""

    def forward(self, x):
        self.train()
        return super().forward(x)


def normalised(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv1d(T, D, 1), layer, nn.Tanh()).double()


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


SEQUENCE_TRAPS: dict[str, Callable[[], nn.Module]] = {
    "time first, in and out": TimeFirstOut,
    "normalised by the batch": lambda: normalised(Function(normalise)),
    "normalised in training mode": lambda: normalised(AlwaysTraining(D)),
    "means of all tokens": lambda: normalised(Function(lambda h: h - h.mean((0, 2), keepdim=True))),
    "instance norm of the whole": lambda: normalised(
        Function(lambda h: F.layer_norm(h.mT.transpose(0, 2), (D, len(h))).transpose(0, 2).mT)
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SEQUENCE_TRAPS)
def test_sequences_that_meet_are_refused_or_taken_apart(name, size):
    model, batches = SEQUENCE_TRAPS[name](), sequences(size)
    expected = one_by_one(copy.deepcopy(model), batches)
    with refused_or(HELPFUL):
        assert_exact(estimate_importance(model, batches), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep", [False, True])
def test_a_parameter_as_a_row_of_the_batch(keep, size):
    model, batches = RowAdded(keep), rows(size)
    expected = one_by_one(model, batches)
    with refused_or(HELPFUL):
        assert_exact(estimate_importance(model, batches), expected)


COUPLING_OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean taken off": lambda y: (y - y.mean(0)).square().sum(1),
    "mean over the batch": lambda y: y.square().sum(1) / len(y),
    "contrastive": lambda y: (y @ y.T).logsumexp(1),
    "ranked": lambda y: y.square().sum(1).sort().values * (1 + torch.arange(len(y))),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", COUPLING_OBJECTIVES)
def test_objectives_in_which_samples_meet(name, size):
    objective = COUPLING_OBJECTIVES[name]
    model, batches = mlp(), list(vectors(2 * size + 1).split(size))
    expected = one_by_one(model, batches, objective)
    with refused_or(HELPFUL):
        assert_exact(estimate_importance(model, batches, objective=objective), expected)


# ================================================================================================
# A forward with a memory: as if run once a sample or once a batch, in order, or refused
# ================================================================================================
class Stateful(nn.Module):
    """What it remembers may be a buffer, which is put back, or an attribute, which is not."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)
        self.register_buffer("state", torch.ones(D))
        self.memory: Any = None
        self.double()

    def forward(self, x):
        return self.last(self.remember(self.first(x).tanh()))


class Counter(Stateful):
    def remember(self, h):
        self.state += 1
        return h * self.state


class CounterAttribute(Stateful):
    def remember(self, h):
        self.memory = (self.memory or 0) + 1
        return h * self.memory


class MovingAverage(Stateful):
    """A batch norm whose running mean follows the data also in evaluation mode."""

    def remember(self, h):
        self.state.lerp_(h.detach().mean(0), 0.3)
        return h - self.state


class Bank(Stateful):
    """Looks at the batch before."""

    def remember(self, h):
        before, self.memory = self.memory, h.detach().mean(0)
        return h if before is None else h + before


class Attached(Stateful):
    """Looks at the batch before, and its gradient flows into it."""

    def remember(self, h):
        before, self.memory = self.memory, h.mean(0)
        return h if before is None else h + before


class CachedWeight(Stateful):
    """Computes something from a parameter once and keeps it, graph and all."""

    def remember(self, h):
        if self.memory is None:
            self.memory = self.first.weight.sigmoid()
        return h @ self.memory


class CachedBySize(Stateful):
    """A cache that is made anew when the batch has another size, as masks are: no harm done."""

    def remember(self, h):
        if self.memory is None or len(self.memory) != len(h):
            self.memory = torch.ones(len(h), 1, dtype=h.dtype)
        return h * self.memory


STATEFUL = [Counter, CounterAttribute, MovingAverage, Bank, Attached, CachedWeight, CachedBySize]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", STATEFUL)
def test_a_forward_with_a_memory(kind, size):
    model, batches = kind(), rows(size)
    readings = [judge(copy.deepcopy(model), batches) for judge in (one_by_one, row_by_row)]
    with refused_or(HELPFUL + "|graph a second time"):
        omega = estimate_importance(model, batches)
        assert any(not differences(omega, reading) for reading in readings)


# ================================================================================================
# Chance: one draw a sample, or refused
# ================================================================================================
class Random(nn.Module):
    """Inputs multiplied by 1 or 2 at random, so that Ω of a draw is known exactly."""

    def __init__(self, draw: Callable[[int], Tensor]):
        super().__init__()
        self.linear, self.draw = nn.Linear(D, 2, bias=False).double(), draw

    def forward(self, x):
        return self.linear(x * self.draw(len(x)))


DRAWS: dict[str, Callable[[int], Tensor]] = {
    "torch": lambda n: 1.0 + (torch.randn(n, 1) > 0),
    "numpy": lambda n: torch.from_numpy(1.0 + (np.random.randn(n, 1) > 0)),
    "dropout that is always on": lambda n: 1 + F.dropout(torch.ones(n, 1), 0.5, True).clamp(max=1),
    "a generator of its own": lambda n: 1.0 + torch.randint(2, (n, 1), generator=GENERATOR),
}
GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", DRAWS)
def test_a_random_forward_gives_a_draw_for_each_sample(name):
    model, x = Random(DRAWS[name]), torch.randn(7, D).double()
    with refused_or(HELPFUL):
        omega = estimate_importance(model, x.split(4), objective=lambda y: y.sum(1))
        assert any(not differences(omega, ds) for ds in possible(x))


def possible(x: Tensor) -> Iterable[dict[str, Tensor]]:
    """Ω for every way in which the samples can be multiplied by 1 or 2."""
    for factors in itertools.product([1.0, 2.0], repeat=len(x)):
        mean = (x.abs() * torch.tensor(factors, dtype=x.dtype)[:, None]).mean(0)
        yield {"linear.weight": mean.expand(2, -1)}


# ================================================================================================
# What changes between measurements, and gradients that a user bends
# ================================================================================================
def test_a_gradient_that_is_zero_in_the_first_measurement_only():
    """LoRA starts with B = 0: the first measurement finds no gradient in A, the next one does."""
    model, x = LowRank(D, 4, 2).double(), torch.randn(6, D).double()
    nn.init.zeros_(model.b)
    mas = MAS(model)
    first = one_by_one(model, [x])
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
    model[0].weight = nn.Parameter(torch.randn(8, 6).double())
    assert_exact(estimate_importance(model, [x]), one_by_one(model, [x]))


def test_a_loader_that_fills_the_same_tensor_again():
    model, x = mlp(), vectors(12)

    def loader():
        buffer = torch.empty(4, 6).double()
        for part in x.split(4):
            yield buffer.copy_(part)

    assert_exact(estimate_importance(model, loader()), one_by_one(model, x.split(4)))


@pytest.mark.parametrize("hook", [lambda g: g * (g > 0), lambda g: g.clamp(-0.1, 0.1)])
def test_a_hook_on_a_parameter_bends_the_gradient_of_each_sample(hook):
    """How rows are frozen and gradients clipped: autograd's gradient has it, and so has Ω."""
    model, x = mlp(), vectors()
    model[0].weight.register_hook(hook)
    expected = one_by_one(model, [x])
    with refused_or(HELPFUL):
        assert_exact(estimate_importance(model, x.split(4)), expected)
