"""Which of a model's outputs are measured, for every convention, against single samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from mas_ext import MAS, estimate_importance
from tests.support.oracle import assert_exact, one_by_one
from tests.support.zoo.layers import Net
from tests.support.zoo.small import vectors

X = vectors()


class Pair(NamedTuple):
    mu: Tensor
    logvar: Tensor


def two_heads(function: Callable[[Tensor, Tensor], Any]) -> Net:
    """``function`` makes an output of two heads' results, [B, 3] and [B, 4]."""
    torch.manual_seed(0)
    parts = {"trunk": nn.Linear(6, 5), "a": nn.Linear(5, 3), "b": nn.Linear(5, 4)}

    def forward(m: Net, x: Tensor) -> Any:
        hidden = m.trunk(x).tanh()
        return function(m.a(hidden), m.b(hidden))

    return Net(forward, **parts).double()


def side_by_side(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b.flatten(1)], 1)


BOTH = ("output[0]", "output[1]")
CONVENTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[str, ...], Any]] = {
    "a tensor": (lambda a, b: a, ("output",), lambda a, b: a),
    "a list of heads": (lambda a, b: [a, b], BOTH, side_by_side),
    "features and logits": (lambda a, b: (a, b), BOTH, side_by_side),
    "different ranks": (lambda a, b: (a, b.view(-1, 2, 2)), BOTH, side_by_side),
    "a named tuple": (lambda a, b: Pair(a, b), BOTH, side_by_side),
    "a dict of heads": (
        *(lambda a, b: {"seg": a, "depth": b}, ("output['seg']", "output['depth']")),
        side_by_side,
    ),
    "loss and logits": (lambda a, b: (a.sum(), b), ("output[1]",), lambda a, b: b),
    "no loss, and logits": (lambda a, b: (None, b), ("output[1]",), lambda a, b: b),
    "logits and predictions": (lambda a, b: (a, a.argmax(1)), ("output[0]",), lambda a, b: a),
    "logits and a table": (lambda a, b: (a, b[:1].sum(0)), ("output[0]",), lambda a, b: a),
    "a field for logits": (
        *(lambda a, b: SequenceClassifierOutput(logits=a, hidden_states=(b, b)),),
        *(("output.logits",), lambda a, b: a),
    ),
    "heads as logits": (
        *(lambda a, b: {"logits": (a, b), "loss": None},),
        *(("output.logits[0]", "output.logits[1]"), side_by_side),
    ),
    "a hidden state": (
        *(lambda a, b: BaseModelOutputWithPooling(last_hidden_state=a, pooler_output=b),),
        *(("output.last_hidden_state",), lambda a, b: a),
    ),
}


@pytest.mark.parametrize("objective", ["squared_l2", "l1"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_what_is_measured_of_which_output(name, objective):
    function, outputs, expected = CONVENTIONS[name]
    scalar = {"squared_l2": Tensor.square, "l1": Tensor.abs}[objective]
    alone = one_by_one(two_heads(expected), [X], lambda y: scalar(y).sum(1))
    for batches in (X.split([7, 3]), X.split(1)):
        omega = estimate_importance(two_heads(function), batches, objective=objective)
        assert omega.outputs == outputs
        assert_exact(omega, alone)
    batch = estimate_importance(two_heads(function), [X], estimator="batch")
    assert batch.outputs == outputs


def test_a_callable_gets_the_rows_side_by_side():
    shapes = []

    def objective(rows: Tensor) -> Tensor:
        shapes.append(rows.shape[1:])
        return rows[:, 2] * rows[:, 5]

    model, alone = two_heads(lambda a, b: [a, b]), two_heads(side_by_side)
    omega = estimate_importance(model, [X], objective=objective)
    assert set(shapes) == {(7,)}
    assert_exact(omega, one_by_one(alone, [X], objective))


@pytest.mark.parametrize("size", [1, 2, 3, 5], ids="B={}".format)
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_hidden_state_is_no_output_however_many_layers_it_has(kind, size):
    """Its dimension 0 is the layer, of which there may be as many as samples."""
    model = kind(4, 3, num_layers=2, batch_first=True).double()
    x = torch.randn(size, 6, 4).double()
    omega = estimate_importance(model, [x])
    assert omega.outputs == ("output[0]",)
    assert_exact(omega, one_by_one(model, [x]))


def test_auxiliary_heads_of_training_mode_do_not_count():
    torch.manual_seed(0)
    model = torchvision.models.GoogLeNet(num_classes=3, aux_logits=True, init_weights=False)
    x = torch.randn(2, 3, 64, 64)
    omega = estimate_importance(model, [x], estimator="batch", training=True)
    assert omega.outputs == ("output.logits",)
    assert not omega["aux1.conv.conv.weight"].any()
    assert omega["fc.weight"].any()


def test_keys_and_values_for_later_tokens_do_not_count():
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, use_cache=True, output_hidden_states=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double().eval()
    ids = torch.randint(11, (3, 5))
    assert model(ids).past_key_values is not None
    omega = estimate_importance(model, [ids])
    assert omega.outputs == ("output.logits",)
    assert_exact(omega, one_by_one(model, [ids]))


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Any], type[Exception]]] = {
    "heads inside a tuple": (lambda a, b: (a, [b, b]), ValueError),
    "hidden states": (lambda a, b: {"mu": a, "hidden_states": (b,)}, ValueError),
    "only a loss": (lambda a, b: (a.sum(), None), ValueError),
    "time first": (lambda a, b: (a.T, b.T), ValueError),
    "nothing": (lambda a, b: (), TypeError),
    "an object": (lambda a, b: type("Output", (), {"mu": a})(), TypeError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_clear_output_is_refused(name):
    function, kind = REFUSED[name]
    with pytest.raises(kind, match="forward="):
        estimate_importance(two_heads(function), [X])


def test_forward_chooses():
    model = two_heads(lambda a, b: [a, b])
    omega = estimate_importance(model, [X], forward=lambda m, x: m(x)[1])
    assert_exact(omega, one_by_one(two_heads(lambda a, b: b), [X]))
    both = estimate_importance(model, [X], forward=lambda m, x: tuple(m(x)))
    assert both.outputs == BOTH
    assert_exact(both, one_by_one(two_heads(side_by_side), [X]))


# -- what nothing measured depends on --------------------------------------------------------------
def head(number: int) -> dict[str, Any]:
    return {"forward": lambda m, x: m(x)[number]}


def test_parameters_without_importance_are_warned_about_once(recwarn):
    model = two_heads(lambda a, b: [a, b])
    mas = MAS(model)
    with pytest.warns(UserWarning, match=r"'b\.weight' \(2 .*forward="):
        mas.consolidate([X], **head(0))
    mas.consolidate([X], **head(0))
    mas.consolidate([X], **head(1))
    assert not [w for w in recwarn if "importance" in str(w.message)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", ["in one task", "in two tasks", "left out", "of all"])
def test_what_was_measured_at_some_time_needs_no_warning(case):
    model = two_heads(lambda a, b: [a, b])
    mas = MAS(model, params=["trunk.*", "a.*"] if case == "left out" else None)
    if case == "in one task":
        mas.update_importance([X], **head(1))
    if case == "in two tasks":
        with pytest.warns(UserWarning, match="a.weight"):
            mas.consolidate([X], **head(1))
    mas.consolidate([X], **({} if case == "of all" else head(0)))


# -- inputs that all samples share -----------------------------------------------------------------
def shared_inputs() -> Net:
    def forward(m: Net, x: Tensor, positions: Tensor, scale: Any = None) -> Tensor:
        hidden = m.layer(x) + m.table(positions)
        return hidden.tanh() if scale is None else hidden.tanh() * scale["of"]

    return Net(forward, layer=nn.Linear(2, 3), table=nn.Embedding(9, 3)).double()


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("size", [3, 4, 5, 6], ids="B={}".format)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_shared_input_may_have_as_many_rows_as_there_are_samples(size, scaled, limit):
    torch.manual_seed(0)
    model, x = shared_inputs(), torch.randn(size, 5, 2).double()
    batch: dict[str, Any] = {"x": x, "positions": torch.arange(5)}
    if scaled:
        batch["scale"] = {"of": torch.rand(5, 1).double()}
    expected = one_by_one(
        model, x[:limit].split(1), forward=lambda m, one: m(**{**batch, "x": one})
    )
    if size == 5 and limit == 4:
        with pytest.raises(ValueError, match=r"4 of a batch's 5 samples .*positions.*forward="):
            estimate_importance(model, [batch], max_samples=limit)
        return
    assert_exact(estimate_importance(model, [batch], max_samples=limit), expected)


def of_images(m: Net, images: list[Tensor]) -> Tensor:
    return torch.cat([m.head(m.conv(image[None]).tanh().mean((2, 3))) for image in images])


@pytest.mark.parametrize("size", [2, 3, 4], ids="B={}".format)
def test_a_list_of_images_is_a_batch_of_images_whatever_their_channels(size):
    torch.manual_seed(0)
    model = Net(of_images, conv=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 2)).double()
    images = [torch.randn(3, 5 + k, 6).double() for k in range(size)]
    with pytest.warns(UserWarning, match="one sample at a time.*padding"):
        omega = estimate_importance(model, [{"images": images}])
    alone = [image.unsqueeze(0) for image in images]
    assert_exact(omega, one_by_one(model, alone, forward=lambda m, one: of_images(m, list(one))))


def spiking(m: Net, x: Tensor) -> Tensor:
    m.state = m.layer(x) + (0 if m.state is None else m.state / 2)
    return m.state.tanh()


def test_state_between_calls_is_an_error_that_says_what_was_run():
    model = Net(spiking, layer=nn.Linear(6, 2)).double()
    model.state = None
    with pytest.raises(ValueError, match=r"2 of a batch's 10 samples .*\[10, 6\].*reset"):
        estimate_importance(model, [X])


IGNORED: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "ids, mask, labels": (lambda x: (x, torch.ones_like(x), x[:, 0]), True),
    "ids and a mask": (lambda x: [x, torch.ones_like(x, dtype=torch.long)], True),
    "inputs and as many labels": (lambda x: (x, (x > 0).to(x)), False),
    "ids and labels": (lambda x: (x, x), False),
    "ids": (lambda x: (x,), False),
    "a tensor": (lambda x: x, False),
    "a mapping": (lambda x: {"x": x, "mask": torch.ones_like(x)}, False),
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_forward_takes_and_a_batch_has_is_missed_aloud(name, recwarn):
    pack, is_missed = IGNORED[name]

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2).double()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.layer(x if mask is None else x * mask)

    estimate_importance(Masked(), [pack(X)] * 2)
    found = [str(w.message) for w in recwarn if "'mask'" in str(w.message)]
    assert len(found) == is_missed
