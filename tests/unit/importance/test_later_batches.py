"""What a plan from an earlier batch must not hide in a later one, and what no graph shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mas_ext import estimate_importance
from tests.support.oracle import REDUCTIONS, assert_exact, one_by_one
from tests.support.zoo.layers import Net
from tests.support.zoo.small import vectors

X = vectors()
EITHER = pytest.mark.parametrize("reduction", REDUCTIONS)


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


def noted(write: Callable[[Tensor, Tensor], Any]) -> Callable[..., Tensor]:
    """Reads the data by way of a tensor that forward made, of which a view gets written to."""

    def read(x: Tensor) -> bool:
        note = torch.zeros(2, dtype=x.dtype)
        write(note[1:], x[:, 0].detach())
        return bool((note + 0).sum() > 0)

    return scaled_by(read)


ONE_BELOW = torch.ones(7, 6).double()  # alone, a sample that no batch of two checks differs
ONE_BELOW[2, 0] = -1
LENGTHS, FULL = [7, 5, 3, 3, 2, 2], [7] * 6
COUPLED: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Any]]]] = {
    "the longest of the first batch": (trimmed, lambda: [padded(LENGTHS)]),
    "the longest of a later batch": (trimmed, lambda: [padded(FULL), padded(LENGTHS)]),
    "a maximum that matters later": (clipped, lambda: [X, 30 * X]),
    "numpy": (scaled_by(lambda x: x.detach().numpy().sum()), lambda: [X.abs(), X]),
    "tolist": (scaled_by(lambda x: sum(x[:, 0].tolist())), lambda: [X.abs(), X]),
    "item": (scaled_by(lambda x: x.sum().item()), lambda: [X.abs(), X]),
    "copied into a note": (noted(lambda n, x: n.copy_(x.sum())), lambda: [ONE_BELOW]),
    "assigned to a note": (noted(lambda n, x: n.__setitem__(0, x.sum())), lambda: [ONE_BELOW]),
    "added to a note": (noted(lambda n, x: n.add_(x.sum())), lambda: [ONE_BELOW]),
    "summed into a note": (
        noted(lambda n, x: torch.sum(x, 0, keepdim=True, out=n)),
        lambda: [ONE_BELOW],
    ),
    "scattered into a note": (
        noted(lambda n, x: n.index_add_(0, torch.zeros(len(x), dtype=torch.int64), x)),
        lambda: [ONE_BELOW],
    ),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_dependence_on_the_batch_is_found(name):
    forward, batches = COUPLED[name]
    torch.manual_seed(0)
    model = Net(forward, layer=nn.Linear(6, 3)).double()
    with pytest.raises(ValueError, match="depends on the other samples"):
        estimate_importance(model, batches())


def test_a_dependence_is_found_in_the_first_batch_of_a_later_measurement():
    torch.manual_seed(0)
    model = Net(clipped, layer=nn.Linear(6, 3)).double()
    estimate_importance(model, [X] * 5)  # the plan has served five batches, no power of two
    with pytest.raises(ValueError, match="depends on the other samples"):
        estimate_importance(model, [30 * X])


def test_single_samples_run_in_ever_fewer_batches():
    model, calls = nn.Linear(6, 3).double(), []
    estimate_importance(model, [X] * 5)
    model.register_forward_hook(lambda *_: calls.append(1))
    estimate_importance(model, [X] * 10)
    # Two in the first batch, which is the plan's fifth, and two in its eighth.
    assert len(calls) == 10 + 2 + 2


READ: dict[str, tuple[Callable[[Tensor], Any], bool]] = {  # and whether it says anything of x
    "positions": (lambda x: 1 - torch.arange(x.shape[1]).diff().min(), False),
    "a mask": (lambda x: torch.ones(len(x), 1).tril().bool().all(), False),
    "positions, as a list": (lambda x: torch.arange(x.shape[1]).tolist()[0], False),
    "a mask of zeros": (lambda x: (x.detach() == 0).any(), True),
    "a mask of zeros, as a list": (lambda x: (x.detach() == 0)[:, 0].tolist()[0], True),
}


@pytest.mark.parametrize("name", READ)
def test_all_samples_run_alone_if_forward_reads_the_data(name):
    """But not if it reads what it made itself of sizes alone."""
    read, is_data = READ[name]
    model, calls = Net(scaled_by(read), layer=nn.Linear(6, 3)).double(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    omega = estimate_importance(model, [X])
    assert (len(calls) > len(X)) == is_data
    assert_exact(omega, one_by_one(model, [X]))


@EITHER
def test_hooks_that_come_between_two_measurements(reduction):
    model = nn.Linear(6, 3).double()
    estimate_importance(model, [X], reduction=reduction)
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-0.1, 0.1))
    omega = estimate_importance(model, [X], reduction=reduction)
    assert_exact(omega, one_by_one(model, [X], reduction=reduction))


def looked_up(rows: Tensor, table: Tensor) -> Tensor:
    return F.embedding(rows, table)


def multiplied(rows: Tensor, table: Tensor) -> Tensor:
    return F.one_hot(rows, len(table)).to(table) @ table


def indexed(rows: Tensor, table: Tensor) -> Tensor:
    return table[rows]


@EITHER
@pytest.mark.parametrize("gather", [looked_up, multiplied, indexed])
def test_rows_that_a_later_batch_sorts_otherwise(gather, reduction):
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
    omega = estimate_importance(model, batches, reduction=reduction)
    assert_exact(omega, one_by_one(model, batches, reduction=reduction))


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


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences_and_the_backends_that_they_leave_as_they_were(kind, is_sorted):
    def forward(m: Net, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths.cpu(), batch_first=True, enforce_sorted=is_sorted
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


@EITHER
@pytest.mark.parametrize("sizes", [(8, 5), (5, 8), (8, 8, 8, 5)], ids=str)
def test_a_later_batch_may_have_as_many_samples_as_a_shared_input_has_rows(sizes, reduction):
    def forward(m: Net, x: Tensor, positions: Tensor) -> Tensor:
        return m.layer((x + m.table(positions)).tanh()).mean(1)

    torch.manual_seed(0)
    model = Net(forward, table=nn.Embedding(5, 4), layer=nn.Linear(4, 3)).double()
    batches = [{"x": torch.randn(b, 5, 4).double(), "positions": torch.arange(5)} for b in sizes]

    def alone(m: Net, x: Tensor) -> Tensor:
        return m(x, torch.arange(5))

    data = [batch["x"] for batch in batches]
    expected = one_by_one(model, data, forward=alone, reduction=reduction)
    assert_exact(estimate_importance(model, batches, reduction=reduction), expected)


def test_a_recurrent_layer_inside_activation_checkpointing():
    def forward(m: Net, x: Tensor) -> Tensor:
        return checkpoint(m.layer, x, use_reentrant=False)[0][:, -1]

    torch.manual_seed(0)
    model, x = Net(forward, layer=nn.LSTM(3, 4, batch_first=True)), torch.randn(6, 5, 3)
    expected = one_by_one(model, [x])
    omega = estimate_importance(model, [x])
    assert_exact(omega, expected, rtol=1e-4, floor=1e-6)
    assert set(omega.coverage.values()) == {"direct"}  # oneDNN has no part in it


@pytest.mark.parametrize("max_samples", [2, 5, 6])
def test_lists_of_sequences_are_not_cut_by_their_lengths(max_samples):
    def forward(m: Net, sequences: list[Tensor]) -> Tensor:
        return torch.stack([m.layer(sequence).tanh().mean(0) for sequence in sequences])

    torch.manual_seed(0)
    model = Net(forward, layer=nn.Linear(3, 2)).double()
    lists = [[torch.randn(t, 3).double() for t in lengths] for lengths in ((7, 4, 7), (7, 5, 7))]
    alone = [one.unsqueeze(0) for one in [*lists[0], *lists[1]][:max_samples]]
    expected = one_by_one(model, alone, forward=lambda m, one: forward(m, list(one)))
    data = [(sequences, None) for sequences in lists]
    assert_exact(estimate_importance(model, data, max_samples=max_samples), expected)


def test_an_empty_first_batch_says_nothing_of_the_outputs():
    torch.manual_seed(0)
    model = Net(lambda m, x: (m.layer(x), m.layer(x)), layer=nn.Linear(6, 2)).double()
    found = estimate_importance(model, [X[:0], X])
    assert found.outputs == ("output[0]", "output[1]")
    assert_exact(found, dict(estimate_importance(model, [X])))


def test_looking_for_the_outputs_draws_no_random_numbers():
    def forward(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = m.drop(m.layer(x))
        return hidden, hidden

    options: dict[str, Any] = {"estimator": "batch", "training": True}
    torch.manual_seed(0)
    model = Net(forward, layer=nn.Linear(6, 2), drop=nn.Dropout(0.5)).double()
    torch.manual_seed(1)
    both = estimate_importance(model, X.split(5), **options)
    torch.manual_seed(1)
    one = estimate_importance(model, X.split(5), forward=lambda m, x: m(x)[0], **options)
    assert_exact(both, {name: 2 * omega for name, omega in one.items()})
