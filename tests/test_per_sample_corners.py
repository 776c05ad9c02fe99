"""Corners of exact importance that were wrong or failed once: one small function each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_ext import MAS, estimate_importance
from tests.oracle import assert_exact, one_by_one

D = 4


class Function(nn.Module):
    """A function of its input and of one parameter."""

    def __init__(self, function: Callable[..., Tensor], w: Tensor) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.w, x)


class TwoOutputs(torch.autograd.Function):
    """One of which may not be used: its gradient is zeros then, and not None."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w, x + w

    @staticmethod
    def backward(ctx, a, b):
        x, w = ctx.saved_tensors
        return a * w + b, (a * x + b).sum(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def recurrent(w: Tensor, x: Tensor, steps: int) -> Tensor:
    h = x
    for _ in range(steps):
        h = (h @ w).tanh()
    return h


CORNERS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "inner": (lambda w, x: torch.inner(x, w), normal(2, D)),
    "permuted from the end": (lambda w, x: x @ w.permute(-1, 0), normal(2, D)),
    "an output that is not used": (lambda w, x: TwoOutputs.apply(x, w)[0], normal(D)),
    "the other output": (lambda w, x: TwoOutputs.apply(x, w)[1].sin(), normal(D)),
    "added to a spectrum": (lambda w, x: (torch.fft.fft(x) + w).abs(), normal(D)),
    "times a spectrum": (lambda w, x: (torch.fft.fft(x) * w).abs(), normal(D)),
    "a product of complex matrices": (
        lambda w, x: (torch.fft.fft(x) @ w.to(torch.complex128)).abs(),
        normal(D, 3),
    ),
    "channels last, flattened": (
        lambda w, x: F.linear(x, w.flatten(1)),
        normal(3, 2, 2, 1).to(memory_format=torch.channels_last),
    ),
    "256 uses": (lambda w, x: recurrent(w, x, 256), 0.5 * normal(D, D)),
    "a rounded quotient": (
        lambda w, x: x * w + torch.div(x, w, rounding_mode="floor"),
        1 + normal(D).abs(),
    ),
}


@pytest.mark.parametrize("name", CORNERS)
def test_corners(name):
    function, w = CORNERS[name]
    model, x = Function(function, w), normal(5, D)
    assert_exact(estimate_importance(model, [x]), one_by_one(model, [x]))


@pytest.mark.parametrize("function", [F.linear, lambda x, w: F.embedding(x[:, :1].long() % 3, w)])
@pytest.mark.parametrize("inside", [torch.float32, torch.float64])
@pytest.mark.parametrize("outside", [torch.float32, torch.float64])
def test_a_use_in_another_dtype(function, inside, outside):
    model = Function(lambda w, x: function(x.to(inside), w.to(inside)).tanh(), normal(3, D))
    model, x = model.to(outside), 10 * normal(5, D).to(outside)
    omega = estimate_importance(model, [x])
    assert omega["w"].dtype == outside
    assert_exact(omega, one_by_one(model, [x]), rtol=1e-5)


def test_what_is_used_may_change_from_batch_to_batch():
    """A head a task: the same operations, but another slice of the parameter."""

    def heads(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w[model.task]).tanh()

    model, x = Function(heads, normal(3, D, 2)), normal(5, D)
    mas = MAS(model)
    for model.task in (0, 2, 0, 1):
        expected = one_by_one(model, [x])
        assert_exact(estimate_importance(model, [x]), expected)
        mas.update_importance([x])
    assert (mas.state_dict()["open"]["w"] > 0).all()


class Cached(nn.Module):
    """Computes what its weight looks like once, and keeps it with its history."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(normal(6))
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = self.table.exp()[torch.arange(D) % 3]
        return x * self.cache


def test_a_graph_that_the_model_keeps():
    omega = estimate_importance(Cached(), [normal(5, D)])
    assert_exact(omega, one_by_one(Cached(), [normal(5, D)]))


class Packed(nn.Module):
    """Applies its layer to the positions that a mask leaves, of all samples in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D).double()

    def forward(self, x: Tensor) -> Tensor:
        mask = x[..., 0] > 0
        out = torch.zeros_like(x)
        out[mask] = self.layer(x[mask]).tanh()
        return out


def lengths(*counts: int) -> Tensor:
    x = normal(len(counts), 5, D)
    x[..., 0].abs_()
    for k, count in enumerate(counts):
        x[k, count:, 0] *= -1
    return x


def test_rows_that_the_data_places_elsewhere_in_the_next_batch():
    model, batches = Packed(), [lengths(3, 3, 3, 3), lengths(5, 1, 4, 2)]
    assert_exact(estimate_importance(model, batches), one_by_one(model, batches))
