"""LoRA adapters that are protected as one update of the frozen weight: ``adapters="merged"``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mas_ext import EWC, L2SP, MAS, DriftBudget, optim
from tests.support.oracle import assert_exact, one_by_one
from tests.support.regularizers import (
    assert_refused,
    assert_states_equal,
    plain_state,
    refusal,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

MERGED = {"adapters": "merged"}


# -- Models with adapters --------------------------------------------------------------------------
def linear() -> tuple[nn.Module, Tensor, list[str]]:
    body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    return body, torch.randn(8, 5), ["0", "2"]


def transposed() -> tuple[nn.Module, Tensor, list[str]]:
    """GPT-2's layers keep their weights as [in, out]."""
    conv1d = transformers.pytorch_utils.Conv1D
    body = nn.Sequential(conv1d(7, 5), nn.Tanh(), conv1d(3, 7))
    return body, torch.randn(8, 5), ["0", "2"]


def convolutions() -> tuple[nn.Module, Tensor, list[str]]:
    body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 1), nn.Flatten())
    return body, torch.randn(8, 2, 5, 4), ["0", "2"]


def embedding() -> tuple[nn.Module, Tensor, list[str]]:
    body = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(24, 3))
    return body, torch.randint(11, (8, 4)), ["0", "2"]


BODIES = {f.__name__: f for f in (linear, transposed, convolutions, embedding)}


def adapted(body: str = "linear", seed: int = 0, **options: Any) -> tuple[nn.Module, Tensor]:
    """A PEFT model in float64 whose adapters are still 0, and a batch."""
    torch.manual_seed(seed)
    base, x, targets = BODIES[body]()
    settings = {"r": 2, "lora_alpha": 3, "target_modules": targets, **options}
    settings.setdefault("fan_in_fan_out", body == "transposed")
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    return model.double().eval(), x.double() if x.is_floating_point() else x


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def move(model: nn.Module, seed: int = 1, by: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained(model):
            p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def learned(body: str = "linear", **options: Any) -> tuple[nn.Module, Tensor, Any]:
    """After a task at which the adapters were 0; they have moved since."""
    model, x = adapted(body)
    mas = MAS(model, **{"lambda_reg": 2.0, **MERGED, **options})
    mas.consolidate([x])
    move(model)
    return model, x, mas


def layers(model: nn.Module) -> dict[str, Any]:
    """The LoRA layers by the name of the weight in the model without adapters."""
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def update(layer: Any) -> Tensor:
    """Of a weight by its active adapters, as PEFT computes it; differentiable."""
    return sum(layer.get_delta_weight(name) for name in layer.active_adapters)


def by_hand(model: nn.Module, mas: MAS, before: dict[str, Tensor] | None = None) -> Tensor:
    """The penalty in plain autograd."""
    terms = [
        (mas.importance[name] * (update(layer) - (before[name] if before else 0)) ** 2).sum()
        for name, layer in layers(model).items()
    ]
    return float(mas.lambda_reg) / 2 * torch.stack(terms).sum()


def assert_same_penalty(model: nn.Module, mas: MAS, expected: Tensor) -> None:
    """Its value and gradients, in both ways to get them."""
    params = trained(model)
    gradients = torch.autograd.grad(expected, params)
    torch.testing.assert_close(mas.penalty(), expected, rtol=1e-12, atol=1e-14)
    ours = torch.autograd.grad(mas.penalty(), params)
    torch.testing.assert_close(ours, gradients, rtol=1e-11, atol=1e-13)
    for p in params:
        p.grad = torch.ones_like(p)
    torch.testing.assert_close(mas.add_penalty_grad_(0.5), expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close([p.grad for p in params], [1 + g / 2 for g in gradients])


# -- Ω and the penalty -----------------------------------------------------------------------------
@pytest.mark.parametrize("body", BODIES)
def test_importance_is_that_of_the_frozen_weights(body):
    model, x = adapted(body)
    mas = MAS(model, **MERGED)
    mas.consolidate(x.split(4))
    names = set(layers(model))
    base = model.merge_and_unload()
    for p in base.parameters():
        p.requires_grad_(True)
    expected = one_by_one(base, [x])
    assert set(mas.importance) == names
    assert_exact(mas.importance, {name: expected[name] for name in names})


@pytest.mark.parametrize("body", BODIES)
def test_importance_is_measured_at_the_merged_weights(body):
    model, x = adapted(body)
    move(model)
    mas, ewc = MAS(model, **MERGED), EWC(model, **MERGED)
    mas.consolidate([x])
    ewc.consolidate([x], criterion="exact_fisher")
    assert all(not p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    merged = copy.deepcopy(model).merge_and_unload()
    for p in merged.parameters():
        p.requires_grad_(True)
    expected = one_by_one(merged, [x])
    assert_exact(mas.importance, {name: expected[name] for name in mas.importance})
    plain = EWC(merged, params=list(layers(model)))
    plain.consolidate([x], criterion="exact_fisher")
    assert_exact(ewc.importance, dict(plain.importance))


@pytest.mark.parametrize("state_dtype", ["float32", "uint8"])
@pytest.mark.parametrize("body", BODIES)
def test_the_penalty_of_the_merged_update(body, state_dtype):
    if state_dtype == "uint8":
        torch.manual_seed(0)
        model, x = adapted(body)
        model = model.float()
        mas = MAS(model, 2.0, state_dtype="uint8", **MERGED)
        mas.consolidate([x.float() if x.is_floating_point() else x])
        move(model)
        torch.testing.assert_close(mas.penalty(), by_hand(model, mas), rtol=1e-5, atol=0)
        return
    model, _, mas = learned(body)
    assert_same_penalty(model, mas, by_hand(model, mas))


def test_a_convolution_with_channels_last():
    model, x = adapted("convolutions")
    model = model.to(memory_format=torch.channels_last)
    mas = MAS(model, 2.0, **MERGED)
    mas.consolidate([x])
    assert not mas.importance["0.weight"].is_contiguous()
    move(model)
    assert_same_penalty(model, mas, by_hand(model, mas))


OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "ranks of their own": {"rank_pattern": {"0": 4}, "alpha_pattern": {"0": 1}},
    "dropout": {"lora_dropout": 0.5},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_adapters(options):
    model, x = adapted(**options)
    mas = MAS(model, 2.0, **MERGED)
    mas.consolidate([x])
    before = {name: update(layer).detach() for name, layer in layers(model).items()}
    move(model)
    assert_same_penalty(model, mas, by_hand(model, mas, before))


def test_a_second_task_is_held_where_the_first_ended():
    model, x, mas = learned()
    mas.consolidate([x])
    before = {name: update(layer).detach() for name, layer in layers(model).items()}
    assert float(mas.penalty()) < 1e-20
    anchors = {n: layer.get_base_layer().weight + before[n] for n, layer in layers(model).items()}
    torch.testing.assert_close(dict(mas.anchor), anchors)
    move(model, seed=2)
    assert_same_penalty(model, mas, by_hand(model, mas, before))


def test_several_adapters_count_together():
    model, x, mas = learned()
    mas.consolidate([x])
    before = {name: update(layer).detach() for name, layer in layers(model).items()}
    config = peft.LoraConfig(r=3, target_modules=["0"])
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    model.double()
    move(model, seed=3)
    present = {
        name: sum(layer.get_delta_weight(a) for a in layer.lora_A)
        for name, layer in layers(model).items()
    }
    terms = [(mas.importance[n] * (present[n] - before[n]) ** 2).sum() for n in present]
    assert_same_penalty(model, mas, torch.stack(terms).sum())
    # What is not active does not take part in the forward pass, nor here.
    model.base_model.set_adapter("default")
    assert_same_penalty(model, mas, by_hand(model, mas, before))


def test_what_is_trained_beside_adapters_is_protected_as_usual():
    model, x = adapted(modules_to_save=["4"], bias="all")
    mas = MAS(model, 2.0, **MERGED)
    mas.consolidate([x])
    ordinary = {n: p for n, p in trained_by_name(model).items() if "lora_" not in n}
    assert len(ordinary) == 4
    starts = {n: p.detach().clone() for n, p in ordinary.items()}
    move(model)
    expected = by_hand(model, mas)
    for name, p in ordinary.items():
        omega = mas.importance[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        expected = expected + (omega * (p - starts[name]) ** 2).sum()
    assert_same_penalty(model, mas, expected)


def trained_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def test_l2sp_holds_the_update_itself():
    model, _ = adapted()
    l2sp = L2SP(model, 3.0, **MERGED)
    l2sp.consolidate()
    move(model)
    expected = 1.5 * sum(update(layer).square().sum() for layer in layers(model).values())
    assert_same_penalty(model, l2sp, expected)


# -- Training --------------------------------------------------------------------------------------
def test_attached_it_trains_as_the_penalty_in_the_loss_does():
    def train(model: nn.Module, x: Tensor, penalty: Callable[[], Tensor | float]) -> None:
        optimizer = torch.optim.AdamW(trained(model), lr=0.05)
        handle = mas.attach(optimizer) if model is ours else None
        for _ in range(5):
            optimizer.zero_grad()
            for part in x.split(4):  # accumulated
                (F.mse_loss(model(part), torch.ones(4, 3, dtype=x.dtype)) / 2).backward()
            if handle is None:
                penalty().backward()
            optimizer.step()

    ours, x, mas = learned()
    theirs, _, reference = learned()
    train(ours, x, lambda: 0.0)
    train(theirs, x, lambda: by_hand(theirs, reference))
    assert_states_equal(
        {n: p.detach().round(decimals=10) for n, p in trained_by_name(ours).items()},
        {n: p.detach().round(decimals=10) for n, p in trained_by_name(theirs).items()},
    )


def test_a_gradient_step_of_sgd_is_stable_under_a_budget():
    model, x = adapted()
    mas = MAS(model, 1e9, budget=DriftBudget(0.01, metric="relative", every=1), **MERGED)
    mas.consolidate([x])
    move(model, by=0.5)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    mas.attach(optimizer)
    sizes = []
    for _ in range(30):
        optimizer.zero_grad()
        F.mse_loss(model(x), torch.ones(8, 3, dtype=x.dtype)).backward()
        optimizer.step()
        sizes.append(sum(float(update(layer).square().sum()) for layer in layers(model).values()))
    assert max(sizes) < 2 * sizes[0]


@pytest.mark.parametrize("weights", ["importance", "uniform"])
@pytest.mark.parametrize("tasks", [1, 2])
def test_settling_keeps_a_part_of_each_update(tasks, weights):
    model, x = adapted()
    mas = MAS(model, 0.0, budget=DriftBudget(0.05, metric="relative", samples=8), **MERGED)
    mas.lambda_reg = 1.0
    mas.consolidate([x])
    if tasks == 2:
        move(model)
        mas.consolidate([x])
    start = {n: p.detach().clone() for n, p in trained_by_name(model).items()}
    move(model, seed=4)
    end = {n: p.detach().clone() for n, p in trained_by_name(model).items()}
    before = {name: update(layer).detach() for name, layer in layers(model).items()}
    settled = mas.settle(weights=weights)
    assert settled.before > 0.05 >= settled.after >= 0.9 * 0.05
    for name, layer in layers(model).items():
        if tasks == 1:  # A stays, and B is scaled
            size = before[name].square().sum()
            weighted = (
                size if weights == "uniform" else (mas.importance[name] * before[name] ** 2).sum()
            )
            kept = size / (size + settled.c * weighted)
            torch.testing.assert_close(update(layer).detach(), kept * before[name])
        else:
            a = next(
                n for n in end if n.startswith("base") and n.endswith("0.lora_A.default.weight")
            )
            now, low, high = trained_by_name(model)[a].detach(), start[a], end[a]
            share = (now - low) / (high - low)
            torch.testing.assert_close(share, share.mean().expand_as(share))
            assert 0 < float(share.mean()) < 1


def test_there_is_no_copy_of_the_base():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    mas = MAS(model, 2.0, state_dtype="uint8", **MERGED)
    mas.consolidate([torch.randn(2, 512)])
    state = plain_state(mas)
    raw = {**mas._state.to_dict()}
    size = sum(
        tensor.numel() * tensor.element_size()
        for group in raw.values()
        if isinstance(group, dict)
        for tensor in group.values()
        if isinstance(tensor, Tensor)
    )
    assert size <= 1.03 * 2 * 512 * 512
    assert state["anchor"] == {}
    weight = base[0].base_layer.weight
    assert mas.anchor["0.weight"].data_ptr() == weight.data_ptr()


# -- Saving and loading ----------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["file", "state_dict", "deepcopy"])
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_state_comes_back(tmp_path, way, tasks):
    model, x, mas = learned(budget=DriftBudget(0.1, metric="relative"))
    if tasks == 2:
        mas.consolidate([x])
        move(model, seed=5)
    mas.update_importance([x])
    if way == "deepcopy":
        model, again = copy.deepcopy((model, mas))
    else:
        again = MAS(model, budget=DriftBudget(0.1, metric="relative"), **MERGED)
        if way == "file":
            mas.save(tmp_path / "mas.safetensors")
            again.load(tmp_path / "mas.safetensors")
        else:
            again.load_state_dict(mas.state_dict())
    assert_states_equal(plain_state(again), plain_state(mas))
    assert float(again.penalty()) == float(mas.penalty()) > 0
    assert again.drift_measured() == mas.drift_measured()


def test_importance_of_the_base_serves_its_adapters_and_back(tmp_path):
    model, x = adapted()
    base = copy.deepcopy(model).merge_and_unload()
    for p in base.parameters():
        p.requires_grad_(True)
    plain, merged = MAS(base, 2.0), MAS(model, 2.0, **MERGED)
    plain.consolidate([x])
    plain.save(tmp_path / "plain.safetensors")
    merged.load(tmp_path / "plain.safetensors")
    names = layers(model)
    assert_states_equal(dict(merged.importance), {n: plain.importance[n] for n in names})
    move(model)
    assert_same_penalty(model, merged, by_hand(model, merged))
    merged.save(tmp_path / "merged.safetensors")
    again = MAS(base, 2.0, params=list(names))
    again.load(tmp_path / "merged.safetensors")
    assert_states_equal(dict(again.importance), dict(merged.importance))
    assert_states_equal(dict(again.anchor), {n: plain.anchor[n] for n in names})


def test_a_state_of_another_base_is_refused(tmp_path):
    _, _, mas = learned()
    mas.save(tmp_path / "mas.safetensors")
    other, _ = adapted(seed=9)
    own = MAS(other, **MERGED)
    case = refusal(
        lambda one: one.load(tmp_path / "mas.safetensors"), ValueError, "base", "0.weight"
    )
    assert_refused(case, own, unchanged=(own,))
    plain = MAS(copy.deepcopy(other).merge_and_unload().requires_grad_(True), params=["0.*", "2.*"])
    case = refusal(
        lambda one: one.load(tmp_path / "mas.safetensors", strict=False), ValueError, "base"
    )
    assert_refused(case, plain, unchanged=(plain,))


DAMAGED = {
    "no B": lambda state: state.pop("0.weight/default/b"),
    "no scale": lambda state: state.pop("0.weight/default/scale"),
    "several scales": lambda state: state.update({"0.weight/default/scale": torch.ones(2)}),
    "a scale of NaN": lambda state: state["0.weight/default/scale"].fill_(torch.nan),
    "another A": lambda state: state.update({"0.weight/default/a": torch.ones(2, 4)}),
    "another rank": lambda state: state.update({"0.weight/default/b": torch.ones(7, 3)}),
    "a flat B": lambda state: state.update({"0.weight/default/b": torch.ones(14)}),
    "a fingerprint of integers": lambda state: state.update(
        {"0.weight/fingerprint": torch.ones(35).long()}
    ),
}


def test_a_base_without_its_importance_is_refused():
    _, x, mas = learned()
    mas.update_importance([x])
    state = mas._state.to_dict()
    del state["importance"]["0.weight"]
    assert_refused(refusal(lambda: mas.load_state_dict(state), ValueError), unchanged=(mas,))


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_adapters_are_refused(case):
    _, x, mas = learned()
    mas.consolidate([x])
    state = mas._state.to_dict()
    DAMAGED[case](state["adapters"])
    assert_refused(
        refusal(lambda: mas.load_state_dict(state), ValueError, "0.weight"), unchanged=(mas,)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_is_known_after_merging_and_unmerging(tmp_path, dtype):
    model, x = adapted()
    model = model.to(dtype)
    mas = MAS(model, 2.0, **MERGED)
    mas.consolidate([x.to(dtype)])
    mas.save(tmp_path / "mas.safetensors")
    move(model)
    penalty = float(mas.penalty())
    model.merge_adapter()
    assert float(mas.penalty()) == penalty, "the update is the same, wherever it is"
    mas.load(tmp_path / "mas.safetensors")
    model.unmerge_adapter()
    mas.load(tmp_path / "mas.safetensors")
    assert float(mas.penalty()) == penalty


def test_adapters_that_are_merged_for_good_are_missed():
    model, _, mas = learned()
    model.merge_and_unload()
    with pytest.warns(UserWarning, match="not protected"):
        mas.penalty()


# -- Refused ---------------------------------------------------------------------------------------
def of(**options: Any) -> Callable[[], Any]:
    return lambda: MAS(adapted(**options)[0], **MERGED)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1"]))


def attached_proximally() -> Any:
    model, _, mas = learned()
    return mas.attach(torch.optim.SGD(trained(model), lr=0.1), mode="proximal")


def settled_while_merged() -> Any:
    model, _, mas = learned(budget=DriftBudget(1e-4, metric="relative"))
    model.merge_adapter()
    return mas.settle()


def trained_beside_its_adapter() -> Any:
    model, x = adapted()
    model.base_model.model[0].base_layer.weight.requires_grad_(True)
    return MAS(model, **MERGED).consolidate([x])


def fused_step() -> Any:
    model, _, mas = learned()
    return optim.AdamW(trained(model), mas=mas)


REFUSED = {
    "no adapters": refusal(lambda: MAS(linear()[0], **MERGED), ValueError, "adapters", "LoRA"),
    "an unknown word": refusal(
        lambda: MAS(linear()[0], adapters="joined"), ValueError, "adapters", "separate"
    ),
    "DoRA": refusal(of(use_dora=True), ValueError, "dora", "separate"),
    "a bias of B": refusal(of(lora_bias=True), ValueError, "lora_bias", "separate"),
    "one weight, two adapters": refusal(
        lambda: MAS(tied(), **MERGED), ValueError, "0.weight", "target_modules"
    ),
    "the proximal step": refusal(attached_proximally, ValueError, "mode", "gradient"),
    "the proximal step by hand": refusal(
        lambda: learned()[2].proximal_step_(0.1), ValueError, "mode", "gradient"
    ),
    "settling what is merged": refusal(settled_while_merged, ValueError, "unmerge"),
    "a weight that is trained": refusal(trained_beside_its_adapter, ValueError, "freeze"),
    "a fused step": refusal(fused_step, ValueError, "attach"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_held_is_refused(case):
    assert_refused(REFUSED[case])


def test_quantized_bases_take_an_importance_but_have_none(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def make(quantized: bool) -> nn.Module:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        if quantized:
            for i in (0, 2):
                layer = bitsandbytes.nn.Linear4bit(64, 64)
                layer.load_state_dict(body[i].state_dict())
                body[i] = layer.to("cpu")
        return peft.get_peft_model(body, peft.LoraConfig(r=2, target_modules=["0", "2"]))

    x = torch.randn(4, 64)
    whole, quantized = make(False), make(True)
    measured, mas = MAS(whole, 2.0, **MERGED), MAS(quantized, 2.0, **MERGED)
    assert_refused(refusal(lambda: mas.consolidate([x]), ValueError, "0.weight", "quantized"))
    measured.consolidate([x])
    measured.save(tmp_path / "mas.safetensors")
    mas.load(tmp_path / "mas.safetensors")
    move(quantized)
    terms = [
        (
            measured.importance[name]
            * (layer.lora_B.default.weight @ layer.lora_A.default.weight * layer.scaling["default"])
            ** 2
        ).sum()
        for name, layer in layers(quantized).items()
    ]
    torch.testing.assert_close(mas.penalty(), torch.stack(terms).sum(), rtol=1e-5, atol=0)
