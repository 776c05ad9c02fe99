"""What a plan from an earlier batch must not hide in a later one, and what no graph shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mas_ext import estimate_importance
from tests.support.oracle import assert_exact, one_by_one
from tests.support.zoo.layers import Net
from tests.support.zoo.small import vectors

X = vectors()


def padded(lengths: list[int]) -> dict[str, Tensor]:
    """Sequences of these lengths, filled up with zeros."""
    sizes = torch.tensor(lengths)
    x = torch.randn(len(lengths), 7, 6).double()
    x[torch.arange(7) >= sizes[:, None]] = 0
    return {"x": x, "lengths": sizes}


def trimmed(m: Net, x: Tensor, lengths: Tensor) -> Tensor:
    """A mean over as many positions as the longest sequence of the batch has."""
    return m.layer(x[:, : int(lengths.max())]).mean(1)


def scaled_by(read: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    return lambda m, x: m.layer(x) * (2.0 if read(x) > 0 else -1.0)


def clipped(m: Net, x: Tensor) -> Tensor:
    y = m.layer(x)
    return y / y.detach().abs().max().clamp_min(10.0)


LENGTHS, FULL = [7, 5, 3, 3, 2, 2], [7] * 6
COUPLED: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Any]]]] = {
    "the longest of the first batch": (trimmed, lambda: [padded(LENGTHS)]),
    "the longest of a later batch": (trimmed, lambda: [padded(FULL), padded(LENGTHS)]),
    "a maximum that matters later": (clipped, lambda: [X, 30 * X]),
    "numpy": (scaled_by(lambda x: x.detach().numpy().sum()), lambda: [X.abs(), X]),
    "tolist": (scaled_by(lambda x: sum(x[:, 0].tolist())), lambda: [X.abs(), X]),
    "item": (scaled_by(lambda x: x.sum().item()), lambda: [X.abs(), X]),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_dependence_on_the_batch_is_found(name):
    forward, batches = COUPLED[name]
    torch.manual_seed(0)
    model = Net(forward, layer=nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match="depends on the other samples"):
        estimate_importance(model, batches())


def test_hooks_that_come_between_two_measurements():
    model = nn.Linear(6, 3).double()
    estimate_importance(model, [X])
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-0.1, 0.1))
    assert_exact(estimate_importance(model, [X]), one_by_one(model, [X]))


def looked_up(rows: Tensor, table: Tensor) -> Tensor:
    return F.embedding(rows, table)


def multiplied(rows: Tensor, table: Tensor) -> Tensor:
    return F.one_hot(rows, len(table)).to(table) @ table


def indexed(rows: Tensor, table: Tensor) -> Tensor:
    return table[rows]


@pytest.mark.parametrize("gather", [looked_up, multiplied, indexed])
def test_rows_that_a_later_batch_sorts_otherwise(gather):
    """Positions are sorted over all samples, as experts do it, and the first batch is in order."""

    def forward(m: Net, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        order = rows[:, 0].argsort()
        hidden = m.a(gather(order, rows)).tanh()
        return m.b(gather(order.argsort(), hidden)).reshape(*x.shape[:2], -1)

    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3)).double()
    batches = [torch.randn(5, 4, 4).double() for _ in range(3)]
    rows = batches[0].reshape(20, 4)
    batches[0] = rows[rows[:, 0].argsort()].reshape(5, 4, 4)
    assert_exact(estimate_importance(model, batches), one_by_one(model, batches))


class Reversible(torch.autograd.Function):
    """Recomputes in its backward pass, and differentiates there with backward()."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.block(x), grad)
        return x.grad, None


@pytest.mark.parametrize("size", [1, 5])
def test_a_backward_pass_inside_the_backward_pass_is_refused(size):
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(Reversible.apply(m.stem(x), m.block))

    layers = {name: nn.Linear(6, 6) for name in ("stem", "block", "head")}
    with pytest.raises(ValueError, match=r"'block\.weight'.*torch\.autograd\.grad"):
        estimate_importance(Net(forward, **layers).double(), X.split(size))


def test_noise_of_an_own_generator_is_found_in_batches_of_one():
    generator = torch.Generator().manual_seed(0)

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.layer(x) * torch.rand(3, generator=generator).double()

    with pytest.raises(ValueError, match="random"):
        estimate_importance(Net(forward, layer=nn.Linear(6, 3)).double(), X.split(1))


@pytest.mark.parametrize("estimator", ["per_sample", "local"])
def test_a_default_device_changes_nothing(estimator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    expected = estimate_importance(model, [X], estimator=estimator)
    with torch.device("meta"):
        found = estimate_importance(model, [X], estimator=estimator)
    assert_exact(found, dict(expected))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences_and_the_backends_that_they_leave_as_they_were(kind):
    def forward(m: Net, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        hidden = m.layer(packed)[1]
        return (hidden[0] if isinstance(hidden, tuple) else hidden)[-1]

    torch.manual_seed(0)
    model, batch = Net(forward, layer=kind(6, 3, batch_first=True)).double(), padded(LENGTHS)
    switches = torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
    with pytest.warns(UserWarning, match="padding and a mask"):
        omega = estimate_importance(model, [batch])
    assert_exact(omega, one_by_one(model, [batch]))
    assert switches == (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
