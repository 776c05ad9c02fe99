"""What surrounds or replaces a model in a loop: averages, copies, meta, adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mas_ext
from mas_ext import MAS
from tests.support import zoo
from tests.support.hand_loop import HandLoop, Protection, assert_trained, sgd
from tests.support.oracle import one_by_one
from tests.support.regularizers import (
    assert_refused,
    assert_states_equal,
    learned,
    move,
    refusal,
)
from tests.support.zoo.small import assert_same, mlp, vectors

X = vectors()
Loss = Callable[[nn.Module], Tensor]


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - 1).pow(2).mean()


def train(model: nn.Module, mas: MAS, loss: Loss = loss_of, lr=0.05, after_step=lambda: None):
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr, momentum=0.9)
    handle = mas.attach(optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        after_step()
    handle.remove()


def assert_trains_as_by_hand(
    model: nn.Module, mas: MAS, plain: nn.Module | None = None, loss: Loss = loss_of, lr=0.05
) -> None:
    """``plain``: the same network, under the names that the loop by hand knows."""
    assert mas.penalty() > 0
    start = copy.deepcopy(model if plain is None else plain)
    hand = HandLoop(start, Protection.of(mas), sgd(lr))
    for _ in range(5):
        hand.step([loss])
    train(model, mas, loss, lr)
    trained = copy.deepcopy(start)
    with torch.no_grad():
        for p, q in zip(trained.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    assert_trained(trained, hand.theta, start, 1e-9)


# -- Averages and copies ---------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.7)}])
def test_an_average_is_measured_and_protects_the_model_that_it_is_of(options):
    """The next task is held where the average ended, by what matters there."""
    model = mlp()
    average = AveragedModel(model, **options)
    train(model, MAS(model), after_step=lambda: average.update_parameters(model))
    measured = MAS(average, 5.0)
    measured.consolidate([X])
    assert_same(measured.importance, one_by_one(copy.deepcopy(average.module), [X]))
    assert_same(measured.anchor, dict(average.module.named_parameters()), 0, 0)
    mas = MAS(model)
    mas.load_state_dict(measured.state_dict())
    assert_trains_as_by_hand(model, mas)


def test_a_copy_of_model_and_mas_goes_its_own_way():
    model, mas = learned(5.0)
    other, other_mas = copy.deepcopy((model, mas))
    before = copy.deepcopy((model.state_dict(), mas.state_dict()))
    assert_trains_as_by_hand(other, other_mas)
    other_mas.consolidate([X])
    assert_states_equal((model.state_dict(), mas.state_dict()), before)
    assert_trains_as_by_hand(model, mas)


# -- A model that is made without memory -----------------------------------------------------------
def loaded(model: nn.Module) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(mlp().state_dict())


def assigned(model: nn.Module) -> None:
    model.load_state_dict(mlp().state_dict(), assign=True)
    model.requires_grad_()


@pytest.mark.parametrize("is_measured_before", [False, True])
@pytest.mark.parametrize("materialise", [loaded, assigned])
def test_a_mas_of_a_model_on_meta_serves_it_when_it_has_values(materialise, is_measured_before):
    model = mlp().to("meta")
    with torch.device("meta"):  # λ is no part of the model
        mas = MAS(model, 5.0)
    materialise(model)
    if is_measured_before:
        mas.load_state_dict(learned(5.0)[1].state_dict())
    else:
        mas.consolidate([X])
    assert_same(mas.importance, one_by_one(mlp(), [X]))
    move(model)
    assert_trains_as_by_hand(model, mas)


ON_META = [
    lambda mas: mas.consolidate([X]),
    lambda mas: mas.consolidate([X], estimator="batch"),
    lambda mas: mas.consolidate([X], estimator="local"),
    lambda mas: mas.update_importance([X.to("meta")]),
    lambda mas: mas.load_state_dict(learned(5.0)[1].state_dict()),
]


@pytest.mark.parametrize("call", ON_META)
def test_a_model_on_meta_can_neither_be_measured_nor_take_a_state(call):
    model = mlp().to("meta")
    mas = MAS(model)
    mas.load_state_dict(MAS(mlp()).state_dict())  # which has nothing to lose
    assert_refused(refusal(call, ValueError, "0.weight", "meta device", "to_empty()"), mas)
    assert (mas.num_tasks, mas.lambda_reg, len(mas.anchor)) == (0, 1.0, 0)
    with pytest.raises(ValueError, match="meta device"):
        mas_ext.estimate_importance(model, [X])


# -- Adapters --------------------------------------------------------------------------------------
TOKENS = torch.randint(19, (6, 7), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": TOKENS}]


def language_loss(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


train_language = partial(train, loss=language_loss, lr=0.01)
assert_language_trains_as_by_hand = partial(assert_trains_as_by_hand, loss=language_loss, lr=0.01)


def adapted(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def assert_exact(mas: MAS, model: nn.Module, names: set[str]) -> None:
    """Ω of the adapters that can be trained."""
    found = {name: mas.importance[name] for name in names}
    assert_same(found, one_by_one(model, DATA), 1e-9, 1e-12)


@pytest.fixture
def adapters():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about layers it was not asked about
        yield adapted(zoo.build("llama").model)


def test_only_adapters_are_measured_and_held_merged_in_between_or_not(adapters):
    frozen = {n: p.detach().clone() for n, p in adapters.named_parameters() if not p.requires_grad}
    mas = MAS(adapters, 5.0)
    mas.consolidate(DATA)
    assert set(mas.importance) == {n for n, p in adapters.named_parameters() if "lora_" in n}
    assert_exact(mas, adapters, set(mas.importance))
    train_language(adapters, mas)
    value = mas.penalty().item()
    adapters.merge_adapter()
    assert mas.penalty() == value
    adapters.unmerge_adapter()
    assert mas.penalty() == value > 0
    assert_language_trains_as_by_hand(adapters, mas)
    for name, p in frozen.items():
        torch.testing.assert_close(adapters.get_parameter(name), p, rtol=0, atol=1e-15)


def test_an_adapter_for_the_next_task_joins_when_it_is_measured(adapters):
    peft = pytest.importorskip("peft")
    mas = MAS(adapters, 5.0)
    mas.consolidate(DATA)
    first = {name: omega.clone() for name, omega in mas.importance.items()}
    config = peft.LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False)
    adapters.add_adapter("second", config)
    adapters.set_adapter("second")  # the first is frozen from here on
    assert mas.penalty() == 0
    adapters.double()
    train_language(adapters, mas)
    mas.consolidate(DATA)
    second = set(trainable(adapters))
    assert second
    assert all(".second." in n for n in second)
    assert set(mas.importance) == set(first) | second
    assert_same({n: mas.importance[n] for n in first}, first, 0, 0)
    assert_exact(mas, adapters, second)
    train_language(adapters, mas)
    assert_language_trains_as_by_hand(adapters, mas)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_that_gets_adapters_after_its_first_task():
    """Its own weights are frozen then, and the adapters are free until they are measured."""
    model = zoo.build("llama").model
    mas = MAS(model, 5.0)
    mas.consolidate(DATA)
    adapters = adapted(model)
    with pytest.warns(UserWarning, match=r"q_proj\.weight' .*measured.*consolidate"):
        assert mas.penalty() == 0
    train_language(adapters, mas)
    mas.consolidate(DATA)
    new = {n for n in mas.importance if "lora_" in n}
    assert len(new) == 8
    assert_exact(mas, model, new)
    train_language(model, mas)
    assert_language_trains_as_by_hand(model, mas)
