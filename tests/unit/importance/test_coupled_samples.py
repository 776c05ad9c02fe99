"""Models built to break assumptions: Ω is exactly right, or refused with help, and never wrong.

The judge is each sample by itself. Sizes such as 3 and 5 meet each other as the number of samples,
of tokens and of features, so that no shape tells which dimension is which.
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

from mas_ext import estimate_importance
from tests.support.oracle import (
    REDUCTIONS,
    assert_exact,
    by_reduction,
    differences,
    one_by_one,
    refused_or,
    row_by_row,
)
from tests.support.zoo.layers import Net
from tests.support.zoo.small import mlp, vectors

D, T = 3, 5  # features and tokens
SIZES = [1, 2, 3, 4, 5, 7]
HELPFUL = r"(?i)sample|batch|parameter"  # what a refusal must speak of

Between = Callable[[Net, Tensor], Tensor]


def net(between: Between, **more: Any) -> Net:
    """Something is done to all samples between two layers."""
    return Net(
        lambda m, x: m.last(between(m, m.first(x).tanh())),
        **{"first": nn.Linear(D, D), "last": nn.Linear(D, 2), "extra": (D,), **more},
    ).double()


def rows(size: int) -> list[Tensor]:
    """Three batches of several sizes; samples differ in scale and in the sign of their mean."""
    x = torch.randn(2 * size + 2, D).double()
    x[::2] += 1
    return list(x.split([size, size + 1, 1]))


def sequences(size: int) -> list[Tensor]:
    return list(torch.randn(2 * size + 2, T, D).double().split([size, size + 1, 1]))


def put_back(order: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x[order])[order.argsort()]


# -- Samples that do not meet, wherever they go: exactly right -------------------------------------
def packed(m: Net, x: Tensor) -> Tensor:
    """Only some tokens go through the layer, those of all samples together."""
    mask, out = x[..., 0] > 0, torch.zeros_like(x)
    out[mask] = m.first(x[mask])
    return out


def experts(m: Net, x: Tensor) -> Tensor:
    tokens = x.flatten(0, -2)
    choice, out = (tokens[:, 0] > 0).long(), torch.zeros_like(tokens)
    for k, expert in enumerate((m.first, lambda t: t * m.extra)):
        (index,) = (choice == k).nonzero(as_tuple=True)
        out.index_add_(0, index, expert(tokens[index]))
    return out.view_as(x)


def by_length(m: Net, x: Tensor) -> Tensor:
    """Sorted by a length that the data has, stepped through while there are any left, put back."""
    lengths = 1 + (x[:, :, 0] > 0).sum(1)
    order = lengths.argsort(descending=True)
    ragged = nn.utils.rnn.pack_padded_sequence(
        x[order], lengths[order].clamp(max=T), batch_first=True
    )
    mixed = ragged._replace(data=m.first(ragged.data).tanh())
    out, _ = nn.utils.rnn.pad_packed_sequence(mixed, batch_first=True, total_length=T)
    return out[order.argsort()]


def shuffled_tokens(m: Net, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    return put_back(order, m.first, flat).view_as(x)


def windows(m: Net, x: Tensor) -> Tensor:
    padded = F.pad(x, (0, 0, 0, 1)).view(len(x) * 3, 2, D)
    return m.first(padded).tanh().view(len(x), 6, D)


def masked_output(m: Net, x: Tensor) -> Tensor:
    """The rest of every sample is padding, from another token on."""
    length = 1 + (x[:, :, 1] > 0).sum(1, keepdim=True)
    return m.first(x) * (torch.arange(T) < length).unsqueeze(-1)


def hypernetwork(m: Net, x: Tensor) -> Tensor:
    """Every sample makes its own weights, from a parameter that is also used directly."""
    own = m.first.weight * torch.sigmoid(x).unsqueeze(1)
    return torch.bmm(own, x.unsqueeze(2)).squeeze(2) + m.first(x)


def computed_and_direct(m: Net, x: Tensor) -> Tensor:
    """One parameter in a sub-graph of parameters only, in its result's use, and on its own."""
    normal = m.first.weight / m.first.weight.norm(dim=1, keepdim=True)
    return F.linear(F.linear(x, normal, m.extra), m.first.weight) * m.extra.exp()


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


OF_ROWS: dict[str, Between] = {
    "nothing": lambda m, h: h,
    "shuffled and back": lambda m, h: put_back(torch.randperm(len(h)), lambda t: t * m.extra, h),
    "sorted and back": lambda m, h: put_back(h[:, 0].argsort(), lambda t: t * m.extra, h),
    "flipped and back": lambda m, h: (h.flip(0) * m.extra).flip(0),
    "only some of the samples": lambda m, h: torch.where(h[:, :1] > 0, h * m.extra, h),
    "samples without a gradient": lambda m, h: torch.where(h[:, :1] > 0, h, h.detach()) * m.extra,
    "experts, vectors": experts,
    "chunks of large batches": lambda m, h: torch.cat(
        [m.first(part).tanh() for part in (h.chunk(2) if len(h) > 4 else [h])]
    ),
    "hypernetwork": hypernetwork,
    "computed and direct": computed_and_direct,
    "outer products": lambda m, h: (h.unsqueeze(1) * m.first.weight).sum(2) + m.extra[:, None].mT,
    "wrong on purpose": lambda m, h: WrongOnPurpose.apply(h * 3, m.extra),
    "a backward that clips": lambda m, h: ClippedParameter.apply(h, m.extra),
    "a loop over samples": lambda m, h: torch.stack([m.first(row) * m.extra for row in h]),
}
OF_SEQUENCES: dict[str, Between] = {
    "packed by a mask": packed,
    "experts": experts,
    "sorted by length": by_length,
    "shuffled tokens": shuffled_tokens,
    # the same weight with the sample as the slow dimension, then as the fast one
    "both layouts": lambda m, h: m.first(h).sin() * m.first(h.transpose(0, 1)).transpose(0, 1),
    # for T ≡ 1 mod B the only row of sample 0 is the same in both layouts
    "time first, last token": lambda m, h: m.first(h.transpose(0, 1))[-1],
    "time first, first token": lambda m, h: m.first(h.transpose(0, 1))[0],
    "first token": lambda m, h: m.first(h)[:, 0],
    "last token": lambda m, h: m.first(h)[:, -1],
    "windows": windows,
    "ragged by a mask": masked_output,
    "a parameter as a token": lambda m, h: (
        torch.cat([h, m.extra.expand(len(h), 1, -1)], 1) * m.first.weight.sum()
    ),
    "largest token": lambda m, h: m.first(h).amax(1),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*OF_ROWS, *OF_SEQUENCES])
def test_samples_that_do_not_meet(name, size):
    model = net({**OF_ROWS, **OF_SEQUENCES}[name])
    batches = rows(size) if name in OF_ROWS else sequences(size)
    means = by_reduction(model, batches)
    for reduction in REDUCTIONS:
        omega = estimate_importance(model, batches, reduction=reduction)
        assert_exact(omega, means[reduction])


@pytest.mark.parametrize("size", SIZES)
def test_a_forward_that_changes_its_input(size):
    model, batches = net(lambda m, h: h), rows(size)
    model.register_forward_pre_hook(lambda _, inputs: (inputs[0].mul_(2),))
    expected = one_by_one(model, copy.deepcopy(batches))
    assert_exact(estimate_importance(model, batches), expected)


# -- Samples that meet: exactly what each would give by itself, or refused -------------------------
class MixedBackward(torch.autograd.Function):
    """The identity, whose backward averages over the batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.mean(0, keepdim=True).expand_as(g)


class ClippedByNorm(MixedBackward):
    """The identity, whose backward divides by the norm of the whole batch's gradient."""

    @staticmethod
    def backward(ctx, g):
        return g / (1 + g.norm())


def looped(h: Tensor) -> Tensor:
    for _ in range(1 + int(h.detach().abs().sum()) % 3):
        h = h.tanh()
    return h


def first_added_to_last(h: Tensor) -> Tensor:
    out = h.clone()
    out[-1] += h[0]
    return out


def convolved(h: Tensor) -> Tensor:
    """The batch as the length of a convolution that is wider than one."""
    kernel = torch.tensor([0.5, 1.0, 0.25], dtype=h.dtype).expand(D, 1, 3)
    return F.conv1d(h.T.unsqueeze(0), kernel, padding=1, groups=D).squeeze(0).T


TRAPS: dict[str, Callable[[Tensor], Tensor]] = {
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
    # the gradient stays within a sample; only the first sample's value is its own
    "earlier values, detached": lambda h: (
        h * (1 + torch.cat([torch.zeros_like(h[:1]), h[:-1].detach()]))
    ),
    "first added to last": first_added_to_last,
    "all multiplied by the first": lambda h: h * h[:1],
    "every second one doubled": lambda h: h * (1 + torch.arange(len(h)) % 2)[:, None],
    "the last one doubled": lambda h: torch.cat([h[:-1], 2 * h[-1:]]),
    "branch on the batch's mean": lambda h: h * 3 if h.mean() > 0 else h.sin(),
    "branch on the batch's size": lambda h: h * 3 if len(h) > 4 else h,
    "branch on even sizes": lambda h: h.sin() if len(h) % 2 == 0 else h,
    "as many rounds as the data says": looped,
    "a backward that averages": MixedBackward.apply,
    "a shape that is added up": lambda h: (h.reshape(-1) * len(h.reshape(-1))).view_as(h),
}


@pytest.mark.parametrize("name", TRAPS)
def test_each_trap_is_one(name):
    """One backward per row of a whole batch is wrong for it, which is why it is in the table."""
    model, batches = net(lambda m, h: TRAPS[name](h)), rows(5)
    assert differences(row_by_row(model, batches), one_by_one(model, batches), rtol=1e-3)


ELSEWHERE: dict[str, Callable[[Tensor], Tensor]] = {  # outputs in another order than the samples
    "shuffled": lambda h: h[torch.randperm(len(h))],
    "flipped": lambda h: h.flip(0),
    "sorted": lambda h: h[h[:, 0].argsort()],
    "rolled": lambda h: h.roll(1, 0),
    "a backward that clips by norm": ClippedByNorm.apply,
}


def row_added(keep: bool) -> Net:
    """A parameter as one more row of the batch, which every sample then sees."""

    def forward(m: Net, x: Tensor) -> Tensor:
        hidden = m.layer(torch.cat([m.row, x], 0)).tanh()
        return hidden[1:] * (hidden[:1] if keep else 1)

    return Net(forward, row=(1, D), layer=nn.Linear(D, D))


class AlwaysTraining(nn.BatchNorm1d):
    """Switches itself back to training mode in the forward."""

    def forward(self, x):
        self.train()
        return super().forward(x)


def normalized(function: Callable[[Tensor], Tensor] | nn.Module) -> nn.Module:
    layer = function if isinstance(function, nn.Module) else Net(lambda m, h: function(h))
    return nn.Sequential(nn.Conv1d(T, D, 1), layer, nn.Tanh())


WHOLE: dict[str, tuple[Callable[[], nn.Module], Callable[[int], list[Tensor]]]] = {
    "a parameter as a row": (lambda: row_added(keep=False), rows),
    "a parameter as a row that all see": (lambda: row_added(keep=True), rows),
    "time first, in and out": (
        lambda: Net(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(D, 4)),
        sequences,
    ),
    "normalized by the batch": (
        lambda: normalized(lambda h: F.batch_norm(h, None, None, training=True)),
        sequences,
    ),
    "normalized in training mode": (lambda: normalized(AlwaysTraining(D)), sequences),
    "means of all tokens": (
        lambda: normalized(lambda h: h - h.mean((0, 2), keepdim=True)),
        sequences,
    ),
    "layer norm over the batch": (
        lambda: normalized(
            lambda h: F.layer_norm(h.mT.transpose(0, 2), (D, len(h))).transpose(0, 2).mT
        ),
        sequences,
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*TRAPS, *ELSEWHERE, *WHOLE])
def test_samples_that_meet_are_refused_or_taken_apart(name, size):
    if name in WHOLE:
        make, data = WHOLE[name]
        model, batches = make().double(), data(size)
    else:
        between = {**TRAPS, **ELSEWHERE}[name]
        model, batches = net(lambda m, h: between(h)), rows(size)
    means = by_reduction(copy.deepcopy(model), batches)
    for reduction in REDUCTIONS:
        measured = copy.deepcopy(model)  # of which no plan is known
        with refused_or(HELPFUL):
            omega = estimate_importance(measured, batches, reduction=reduction)
            assert_exact(omega, means[reduction])


OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean taken off": lambda y: (y - y.mean(0)).square().sum(1),
    "mean over the batch": lambda y: y.square().sum(1) / len(y),
    "contrastive": lambda y: (y @ y.T).logsumexp(1),
    "ranked": lambda y: y.square().sum(1).sort().values * (1 + torch.arange(len(y))),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_in_which_samples_meet(name, size):
    model, batches = mlp(), list(vectors(2 * size + 1).split(size))
    means = by_reduction(model, batches, OBJECTIVES[name])
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"objective": OBJECTIVES[name], "reduction": reduction}
        with refused_or(HELPFUL):
            omega = estimate_importance(copy.deepcopy(model), batches, **options)
            assert_exact(omega, means[reduction])


# -- A forward with a memory: as if run once per sample or once per batch, in order, or refused ----
def counter(m: Net, h: Tensor) -> Tensor:
    """The state is a buffer, which is put back."""
    m.state += 1
    return h * m.state


def counter_attribute(m: Net, h: Tensor) -> Tensor:
    """An attribute is not put back."""
    m.memory = (m.memory or 0) + 1
    return h * m.memory


def moving_average(m: Net, h: Tensor) -> Tensor:
    """A batch norm whose running mean follows the data also in evaluation mode."""
    m.state.lerp_(h.detach().mean(0), 0.3)
    return h - m.state


def bank(m: Net, h: Tensor) -> Tensor:
    """Looks at the batch before."""
    before, m.memory = m.memory, h.detach().mean(0)
    return h if before is None else h + before


def attached(m: Net, h: Tensor) -> Tensor:
    """Looks at the batch before, and its gradient flows into it."""
    before, m.memory = m.memory, h.mean(0)
    return h if before is None else h + before


def cached_weight(m: Net, h: Tensor) -> Tensor:
    """Computes something from a parameter once and keeps it, graph and all."""
    if m.memory is None:
        m.memory = m.first.weight.sigmoid()
    return h @ m.memory


def cached_by_size(m: Net, h: Tensor) -> Tensor:
    """A cache that is made anew when the batch has another size, as masks are: no harm done."""
    if m.memory is None or len(m.memory) != len(h):
        m.memory = torch.ones(len(h), 1, dtype=h.dtype)
    return h * m.memory


MEMORIES = [
    counter, counter_attribute, moving_average, bank, attached, cached_weight, cached_by_size,
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_forward_with_a_memory(memory, size):
    model, batches = net(memory), rows(size)
    model.register_buffer("state", torch.ones(D).double())
    model.memory = None
    readings = [judge(copy.deepcopy(model), batches) for judge in (one_by_one, row_by_row)]
    with refused_or(HELPFUL + "|graph a second time"):
        omega = estimate_importance(model, batches)
        assert any(not differences(omega, reading) for reading in readings)


# -- Chance: one draw per sample, or refused -------------------------------------------------------
GENERATOR = torch.Generator().manual_seed(0)
DRAWS: dict[str, Callable[[int], Tensor]] = {
    "torch": lambda n: 1.0 + (torch.randn(n, 1) > 0),
    "numpy": lambda n: torch.from_numpy(1.0 + (np.random.randn(n, 1) > 0)),
    "dropout that is always on": lambda n: 1 + F.dropout(torch.ones(n, 1), 0.5, True).clamp(max=1),
    "a generator of its own": lambda n: 1.0 + torch.randint(2, (n, 1), generator=GENERATOR),
}


def possible(x: Tensor) -> Iterable[dict[str, Tensor]]:
    """Ω for every way in which the samples can be multiplied by 1 or 2."""
    for factors in itertools.product([1.0, 2.0], repeat=len(x)):
        mean = (x.abs() * torch.tensor(factors, dtype=x.dtype)[:, None]).mean(0)
        yield {"linear.weight": mean.expand(2, -1)}


@pytest.mark.parametrize("name", DRAWS)
def test_a_random_forward_gives_one_draw_per_sample(name):
    linear, x = nn.Linear(D, 2, bias=False), torch.randn(7, D).double()
    model = Net(lambda m, x: m.linear(x * DRAWS[name](len(x))), linear=linear).double()
    with refused_or(HELPFUL):
        omega = estimate_importance(model, x.split(4), objective=lambda y: y.sum(1))
        assert any(not differences(omega, reading) for reading in possible(x))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "hook", [lambda g: g * (g > 0), lambda g: g.clamp(-0.1, 0.1)], ids=["frozen", "clipped"]
)
def test_a_hook_on_a_parameter_changes_the_gradient_of_each_sample(hook, reduction):
    """This is how rows are frozen and gradients clipped: autograd's gradient has it, so does Ω."""
    model, x = mlp(), vectors()
    model[0].weight.register_hook(hook)
    expected = one_by_one(model, [x], reduction=reduction)
    with refused_or(HELPFUL):
        omega = estimate_importance(model, x.split(4), reduction=reduction)
        assert_exact(omega, expected)
