"""What surrounds or replaces a model in a loop: averages, copies, checkpointing, meta, adapters."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import mas_ext
from mas_ext import MAS
from tests.hand_loop import Memory, Sgd, assert_trained, by_hand
from tests.models import assert_same, mlp, oracle, vectors

X = vectors()
NAMES = {"0.weight", "0.bias", "2.weight", "2.bias"}


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - 1).pow(2).mean()


def train(model: nn.Module, mas: MAS, steps: int = 5, after_step=lambda: None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    handle = mas.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        after_step()
    handle.remove()


def assert_trains_as_by_hand(model: nn.Module, mas: MAS, plain: nn.Module | None = None) -> None:
    """``plain``: the same network in whose terms the loop is written."""
    plain = copy.deepcopy(model if plain is None else plain)
    expected = by_hand(plain, Memory.of(mas), Sgd(0.05, 0.9), [[loss_of]] * 5)
    train(model, mas)
    trained = copy.deepcopy(plain)
    with torch.no_grad():
        for p, q in zip(trained.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    assert_trained(trained, expected, plain, 1e-10)


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)


# ================================================================================================
# Averages and copies
# ================================================================================================
AVERAGES = {"swa": {}, "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.7)}}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_is_measured_and_holds_the_model_it_is_of(kind):
    """The next task is held where the average ended, by what matters there."""
    model = mlp()
    average = AveragedModel(model, **AVERAGES[kind])
    train(model, MAS(model), after_step=lambda: average.update_parameters(model))
    measured = MAS(average, 5.0)
    measured.consolidate([X])
    assert set(measured.importance) == NAMES
    assert_same(measured.importance, oracle(copy.deepcopy(average.module), X))
    assert_same(measured.anchor, dict(average.module.named_parameters()), 0, 0)

    mas = MAS(model)
    mas.load_state_dict(measured.state_dict())
    assert mas.penalty() > 0  # the model is not where its average is
    assert_trains_as_by_hand(model, mas)


def test_averaging_beside_an_attached_optimizer_changes_neither():
    alone, averaged = mlp(), mlp()
    mean = [torch.zeros_like(p) for p in alone.parameters()]
    results = []
    for model in (alone, averaged):
        mas = MAS(model, 5.0)
        mas.consolidate([X])
        average = AveragedModel(model)

        def note(model=model, average=average):
            if model is averaged:
                average.update_parameters(model)
            else:
                torch._foreach_add_(mean, [p.detach() / 5 for p in model.parameters()])

        train(model, mas, after_step=note)
        results.append(average)
    for p, q, r, m in zip(
        alone.parameters(), averaged.parameters(), results[1].parameters(), mean, strict=True
    ):
        assert torch.equal(p, q)
        torch.testing.assert_close(r, m)


def test_a_copy_of_model_and_mas_goes_its_own_way():
    model = mlp()
    mas = MAS(model, 5.0)
    mas.consolidate([X])
    moved(model)
    other, other_mas = copy.deepcopy((model, mas))
    before = copy.deepcopy((model.state_dict(), mas.state_dict()))
    assert_trains_as_by_hand(other, other_mas)
    other_mas.consolidate([X])
    assert_same(model.state_dict(), before[0], 0, 0)
    assert_same(mas.state_dict()["importance"], before[1]["importance"], 0, 0)
    assert_trains_as_by_hand(model, mas)


# ================================================================================================
# Activation checkpointing
# ================================================================================================
class Checkpointed(nn.Sequential):
    def __init__(self, reentrant: bool) -> None:
        super().__init__(*mlp())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        return checkpoint(lambda h: self[2](self[1](h)), x, use_reentrant=self.reentrant)


def wrapped(reentrant: bool) -> nn.Module:
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    first, middle, last = mlp()
    return nn.Sequential(first, middle, checkpoint_wrapper(last, checkpoint_impl=kind))


@pytest.mark.parametrize("make", [Checkpointed, wrapped])
def test_checkpointing_without_reentrance(make):
    model = make(reentrant=False)
    mas = MAS(model, 5.0)
    mas.consolidate([X])
    assert_same(mas.importance, oracle(mlp(), X))
    moved(model)
    plain = mlp()
    moved(plain)
    assert_trains_as_by_hand(model, mas, plain)


@pytest.mark.parametrize("make", [Checkpointed, wrapped])
def test_reentrant_checkpointing_trains_and_is_not_measured(make):
    """It hides what is inside from autograd; measured without it, the model is held as ever."""
    model, plain = make(reentrant=True), mlp()
    mas, measured = MAS(model, 5.0), MAS(plain, 5.0)
    with pytest.raises(ValueError, match=r"use_reentrant=True.*use use_reentrant=False"):
        mas.consolidate([X])
    assert mas.num_tasks == 0
    measured.consolidate([X])
    mas.load_state_dict(measured.state_dict())
    moved(model)
    moved(plain)
    assert_trains_as_by_hand(model, mas, plain)


# ================================================================================================
# A model that is made without memory
# ================================================================================================
def on_meta() -> nn.Module:
    return mlp().to("meta")


def loaded(model: nn.Module) -> None:
    model.to_empty(device="cpu")
    model.load_state_dict(mlp().state_dict())


def assigned(model: nn.Module) -> None:
    model.load_state_dict(mlp().state_dict(), assign=True)
    model.requires_grad_()


@pytest.mark.parametrize("materialise", [loaded, assigned])
def test_a_mas_of_a_model_on_meta_serves_it_when_it_has_values(materialise):
    model = on_meta()
    with torch.device("meta"):  # λ is no part of the model
        mas = MAS(model, 5.0)
    materialise(model)
    mas.consolidate([X])
    assert_same(mas.importance, oracle(mlp(), X))
    moved(model)
    assert_trains_as_by_hand(model, mas)


@pytest.mark.parametrize("estimator", ["per_sample", "batch", "local"])
def test_a_model_on_meta_is_not_measured(estimator):
    model = on_meta()
    mas = MAS(model)
    for call in (mas.update_importance, mas.consolidate):
        with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device.*to_empty\(\)"):
            call([X.to("meta")], estimator=estimator)
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device"):
        mas_ext.estimate_importance(model, [X], estimator=estimator)
    assert mas.num_tasks == 0
    assert not mas.anchor


def test_a_state_is_not_lost_in_a_model_on_meta():
    trained = mlp()
    measured = MAS(trained, 5.0)
    measured.consolidate([X])
    model = on_meta()
    mas = MAS(model)
    mas.load_state_dict(MAS(trained).state_dict())  # which has nothing to lose
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device"):
        mas.load_state_dict(measured.state_dict())
    assert mas.lambda_reg == 1.0
    loaded(model)
    mas.load_state_dict(measured.state_dict())
    moved(model)
    assert_trains_as_by_hand(model, mas)


# ================================================================================================
# Adapters
# ================================================================================================
def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=19,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
    ).double()


TOKENS = torch.randint(19, (6, 7), generator=torch.Generator().manual_seed(0))


def language_loss(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def adapted(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def omega_by_hand(model: nn.Module) -> dict[str, Tensor]:
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    for row in TOKENS:
        grads = torch.autograd.grad(
            model(input_ids=row[None]).logits.square().sum(), list(params.values())
        )
        for name, grad in zip(params, grads, strict=True):
            total[name] += grad.abs() / len(TOKENS)
    return total


def train_language(model: nn.Module, mas: MAS) -> None:
    model.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    handle = mas.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        language_loss(model).backward()
        optimizer.step()
    handle.remove()


def assert_adapters_train_as_by_hand(model: nn.Module, mas: MAS) -> None:
    model.eval()
    start = copy.deepcopy(model)
    expected = by_hand(model, Memory.of(mas), Sgd(0.01), [[language_loss]] * 4)
    train_language(model, mas)
    assert_trained(model, expected, start, 1e-9)


@pytest.fixture
def adapters():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about layers it was not asked about
        yield adapted(tiny_llama())


def test_only_adapters_are_measured_and_held(adapters):
    frozen = {n: p.detach().clone() for n, p in adapters.named_parameters() if not p.requires_grad}
    mas = MAS(adapters, 5.0)
    mas.consolidate([{"input_ids": TOKENS}])
    assert set(mas.importance) == {n for n, p in adapters.named_parameters() if "lora_" in n}
    assert_same(mas.importance, omega_by_hand(adapters), 1e-9, 1e-12)
    train_language(adapters, mas)
    assert_adapters_train_as_by_hand(adapters, mas)
    for name, p in adapters.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name])


def test_adapters_merged_for_use_and_unmerged_are_held_as_before(adapters):
    mas = MAS(adapters, 5.0)
    mas.consolidate([{"input_ids": TOKENS}])
    train_language(adapters, mas)
    value = mas.penalty().item()
    assert value > 0
    adapters.merge_adapter()
    assert mas.penalty() == value
    adapters.unmerge_adapter()
    assert mas.penalty() == value
    assert_adapters_train_as_by_hand(adapters, mas)


def test_an_adapter_for_the_next_task_joins_when_it_is_measured(adapters):
    peft = pytest.importorskip("peft")
    mas = MAS(adapters, 5.0)
    mas.consolidate([{"input_ids": TOKENS}])
    first = {name: omega.clone() for name, omega in mas.importance.items()}
    adapters.add_adapter(
        "second", peft.LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False)
    )
    adapters.set_adapter("second")  # the first is frozen from here on
    assert mas.penalty() == 0
    adapters.double()
    train_language(adapters, mas)
    mas.consolidate([{"input_ids": TOKENS}])
    second = {n for n, p in adapters.named_parameters() if p.requires_grad}
    assert second
    assert all(".second." in n for n in second)
    assert set(mas.importance) == set(first) | second
    assert_same({n: mas.importance[n] for n in first}, first, 0, 0)
    assert_same({n: mas.importance[n] for n in second}, omega_by_hand(adapters), 1e-9, 1e-12)
    train_language(adapters, mas)
    assert_adapters_train_as_by_hand(adapters, mas)


def test_a_whole_model_that_gets_adapters_after_its_first_task():
    """Its own weights are frozen then, and the adapters are free until they are measured."""
    model = tiny_llama()
    mas = MAS(model, 5.0)
    mas.consolidate([{"input_ids": TOKENS}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapters = adapted(model)
    with pytest.warns(UserWarning, match=r"q_proj\.weight' \(4 in all\) was measured and is no"):
        assert mas.penalty() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_language(adapters, mas)
        mas.consolidate([{"input_ids": TOKENS}])
    new = {n for n in mas.importance if "lora_" in n}
    assert len(new) == 8
    mine = omega_by_hand(model)
    assert_same({n: mas.importance[n] for n in new}, mine, 1e-9, 1e-12)
    train_language(model, mas)
    assert_adapters_train_as_by_hand(model, mas)
