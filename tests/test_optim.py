"""mas_ext.optim against torch's optimizers with the penalty attached, and against torch's alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import mas_ext
from mas_ext import MAS
from tests.models import mlp, vectors

X = vectors(dtype=torch.float32)
KINDS = {
    "SGD": ("SGD", {"lr": 0.05}),
    "SGD decay": ("SGD", {"lr": 0.05, "weight_decay": 0.1}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "Adam": ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW": ("AdamW", {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6}),
    "tensor lr": ("AdamW", {"lr": torch.tensor(0.01)}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_mode = pytest.mark.parametrize("mode", ["gradient", "proximal"])
# A momentum, which has a first step, and Adam's counts.
each_state = pytest.mark.parametrize("kind", ["momentum", "AdamW"])


def theirs(kind: str, params, **more):
    name, options = KINDS[kind]
    return getattr(torch.optim, name)(params, **{**copy.deepcopy(options), **more})


def ours(kind: str, params, mas: MAS, **more):
    name, options = KINDS[kind]
    return getattr(mas_ext.optim, name)(params, mas=mas, **{**copy.deepcopy(options), **more})


def learned(lambda_reg: float = 5.0, **options):
    model = mlp(torch.float32)
    mas = MAS(model, lambda_reg, **options)
    mas.consolidate([X])
    return model, mas


def task_loss(model: nn.Module) -> Tensor:
    return (model(X) - 3).pow(2).mean()


def train(model, optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        task_loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def assert_near(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def assert_bits(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


# ================================================================================================
# The same training
# ================================================================================================
@each_kind
@each_mode
def test_training_is_that_of_an_attached_optimizer(kind, mode):
    attached, mas = learned()
    optimizer = theirs(kind, attached.parameters())
    handle = mas.attach(optimizer, mode)
    train(attached, optimizer)

    model, mas = learned()
    optimizer = ours(kind, model.parameters(), mas, mode=mode)
    assert optimizer.last_penalty is None
    train(model, optimizer)
    assert_near(model, attached)
    torch.testing.assert_close(optimizer.last_penalty, handle.last_penalty, rtol=1e-5, atol=0)
    assert optimizer.last_penalty > 0
    assert not torch.equal(model[0].weight, mlp(torch.float32)[0].weight)


@each_kind
def test_before_the_first_task_it_is_torchs_step(kind):
    plain = mlp(torch.float32)
    train(plain, theirs(kind, plain.parameters(), fused=True))
    model = mlp(torch.float32)
    optimizer = ours(kind, model.parameters(), MAS(model))
    train(model, optimizer)
    assert_bits(model, plain)
    assert optimizer.last_penalty == 0


@pytest.mark.parametrize("kind", ["SGD decay", "momentum", "nesterov"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [None, 64.0])
def test_half_precision_on_the_cpu_takes_torchs_plain_step(kind, dtype, scale):
    """torch's fused one gives other results before torch 2.14."""
    results = []
    for fused in (True, False):
        model = mlp(torch.float32).to(dtype)
        p = list(model.parameters())
        optimizer = ours(kind, p, MAS(model)) if fused else theirs(kind, p)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=bool(scale and fused))
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale((model(X.to(dtype)) - 3).pow(2).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        before = copy.deepcopy(model)
        if scale and fused:
            optimizer.zero_grad()
            scaler.scale(model(X.to(dtype)).mean() * float("inf")).backward()
            scaler.step(optimizer)
            assert_bits(model, before)
        results.append(model)
    assert_bits(*results)


@each_kind
@each_mode
def test_two_tasks(kind, mode):
    """Torch's step first, then ours with the state that it left."""
    results = []
    for make in (theirs, ours):
        model = mlp(torch.float32)
        mas = MAS(model, 5.0)
        more = {"mas": mas, "mode": mode} if make is ours else {}
        optimizer = make(kind, model.parameters(), **more)
        if make is theirs:
            mas.attach(optimizer, mode)
        train(model, optimizer, 3)
        mas.consolidate([X])
        train(model, optimizer, 3)
        results.append(model)
    assert_near(*results)


@each_kind
@each_mode
def test_what_the_mas_does_not_hold_takes_torchs_step(kind, mode):
    plain = mlp(torch.float32)
    model, mas = learned(params=["0.*"])
    plain_optimizer = theirs(kind, plain.parameters(), fused=True)
    optimizer = ours(kind, model.parameters(), mas, mode=mode)
    train(plain, plain_optimizer, 1)
    train(model, optimizer, 1)
    assert torch.equal(model[2].weight, plain[2].weight)
    assert not torch.equal(model[0].weight, plain[0].weight) or mode == "gradient"


@each_kind
@each_mode
def test_groups_and_their_schedules(kind, mode):
    results = []
    for make in (theirs, ours):
        model, mas = learned()
        groups = [
            {"params": model[0].parameters(), "lr": 0.03},
            {"params": [model[2].weight], "weight_decay": 0.3},
        ]
        optimizer = make(kind, groups, **({"mas": mas, "mode": mode} if make is ours else {}))
        if make is theirs:
            mas.attach(optimizer, mode)
        train(model, optimizer, 1)
        optimizer.add_param_group({"params": [model[2].bias], "lr": 0.01})
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            train(model, optimizer, 2)
            schedule.step()
        results.append(model)
    assert_near(*results)


def test_a_new_strength_takes_effect_at_the_next_step():
    model, mas = learned(0.0)
    optimizer = ours("SGD", model.parameters(), mas)
    train(model, optimizer, 2)
    assert optimizer.last_penalty == 0
    mas.lambda_reg = 5.0
    train(model, optimizer, 1)
    assert optimizer.last_penalty > 0


@each_state
@each_mode
def test_what_has_no_gradient_stays(kind, mode):
    """The head of another task, which weight decay and momentum would move."""
    model = nn.ModuleDict({"body": nn.Linear(6, 4), "old": nn.Linear(4, 2), "new": nn.Linear(4, 2)})
    mas = MAS(model, 5.0)
    mas.consolidate([X], forward=lambda m, x: m["old"](m["body"](x)))
    with torch.no_grad():
        model["old"].weight.add_(0.1)
    old = copy.deepcopy(model["old"])
    optimizer = ours(kind, model.parameters(), mas, weight_decay=0.5, mode=mode)
    for _ in range(3):
        optimizer.zero_grad()
        model["new"](model["body"](X)).pow(2).mean().backward()
        optimizer.step()
    assert_bits(model["old"], old)
    assert all(p not in optimizer.state for p in model["old"].parameters())
    # And when its gradient comes, it is its first step.
    model["old"](model["body"](X)).pow(2).mean().backward()
    optimizer.step()
    assert not torch.equal(model["old"].weight, old.weight)


def test_the_penalty_comes_after_clipping_and_grad_is_only_read():
    model, mas = learned()
    optimizer = ours("SGD", model.parameters(), mas)
    train(model, optimizer, 2)
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, g in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, g)


@each_mode
def test_maximize_ascends_the_loss_and_descends_the_penalty(mode):
    results = []
    for sign in (1, -1):
        model, mas = learned()
        optimizer = ours("AdamW", model.parameters(), mas, maximize=sign < 0, mode=mode)
        for _ in range(4):
            optimizer.zero_grad()
            (sign * task_loss(model)).backward()
            optimizer.step()
        results.append((model, optimizer.last_penalty))
    assert_bits(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_closure_is_called_once_and_hooks_run_once():
    model, mas = learned()
    theirs("AdamW", mlp().parameters())  # torch's class has its step hooked too, by then
    optimizer = ours("AdamW", model.parameters(), mas)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = task_loss(model)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert calls == ["before", "closure", "after"]
    assert loss == task_loss(mlp(torch.float32))


# ================================================================================================
# Loss scaling
# ================================================================================================
def scaled_step(model, optimizer, scaler, loss, unscale=False) -> None:
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


@each_kind
@each_mode
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_gives_the_same_training(kind, mode, unscale):
    plain, mas = learned()
    optimizer = ours(kind, plain.parameters(), mas, mode=mode)
    for _ in range(4):
        optimizer.zero_grad()
        task_loss(plain).backward()
        if unscale:
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()

    model, mas = learned()
    optimizer = ours(kind, model.parameters(), mas, mode=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    for _ in range(4):
        scaled_step(model, optimizer, scaler, task_loss(model), unscale)
    assert_near(model, plain)


@each_kind
@each_mode
def test_a_step_that_the_grad_scaler_skips_changes_nothing(kind, mode):
    """Of parameters that are held and of others, and with it the counts of Adam's steps."""
    model, mas = learned(params=["0.*"])
    optimizer = ours(kind, model.parameters(), mas, mode=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(model, optimizer, scaler, task_loss(model))
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    scaled_step(model, optimizer, scaler, task_loss(model) * float("inf"))
    assert_bits(model, before)
    for i, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert torch.equal(value, state[i][name]), name
    assert optimizer.last_penalty.isfinite()
    scaled_step(model, optimizer, scaler, task_loss(model))
    assert not torch.equal(model[0].weight, before[0].weight)


def test_a_first_step_that_is_skipped_leaves_a_momentum_of_zero():
    """(torch's own fused step leaves whatever was in that memory.)"""
    results = []
    for skipped in (False, True):
        model, mas = learned(params=["0.*"])
        optimizer = ours("nesterov", model.parameters(), mas)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        if skipped:
            scaled_step(model, optimizer, scaler, task_loss(model) * float("inf"))
            for values in optimizer.state.values():
                assert not values["momentum_buffer"].any()
        for _ in range(3):
            scaled_step(model, optimizer, scaler, task_loss(model))
        results.append(model)
    assert_near(*results)


# ================================================================================================
# Checkpoints, copies
# ================================================================================================
def reloaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_kind
@each_mode
def test_resuming_from_a_checkpoint_gives_the_same_bits(kind, mode):
    straight, mas = learned()
    train(straight, ours(kind, straight.parameters(), mas, mode=mode), 6)

    model, mas = learned()
    optimizer = ours(kind, model.parameters(), mas, mode=mode)
    train(model, optimizer, 3)
    saved = reloaded([model.state_dict(), mas.state_dict(), optimizer.state_dict()])

    model = mlp(torch.float32)
    mas = MAS(model)
    optimizer = ours(kind, model.parameters(), mas, mode=mode)
    for one, state in zip((model, mas, optimizer), saved, strict=True):
        one.load_state_dict(state)
    train(model, optimizer, 3)
    assert_bits(model, straight)


@each_kind
@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_checkpoints_of_torchs_and_ours_are_interchangeable(kind, implementation):
    if kind == "tensor lr":  # torch's others take one on a GPU only
        implementation = {"fused": True}
    straight, mas = learned()
    optimizer = theirs(kind, straight.parameters(), **implementation)
    mas.attach(optimizer)
    train(straight, optimizer, 6)
    layout = {i: set(values) for i, values in optimizer.state_dict()["state"].items()}

    for first, second in ((theirs, ours), (ours, theirs)):
        model, mas = learned()
        saved = None
        for make in (first, second):
            is_ours = make is ours
            more = {"mas": mas} if is_ours else implementation
            optimizer = make(kind, model.parameters(), **more)
            if saved is not None:
                assert set(optimizer.param_groups[0]) == set(saved["param_groups"][0])
                assert {i: set(values) for i, values in saved["state"].items()} == layout
                optimizer.load_state_dict(saved)
            handle = None if is_ours else mas.attach(optimizer)
            train(model, optimizer, 3)
            if handle:
                handle.remove()
            saved = reloaded(optimizer.state_dict())
        assert_near(model, straight)


@each_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_go_on_as_the_original(kind, copied):
    model, mas = learned()
    optimizer = ours(kind, model.parameters(), mas, mode="proximal")
    train(model, optimizer, 2)
    other, other_mas, other_optimizer = copied((model, mas, optimizer))
    assert other_optimizer.mas is other_mas
    assert other_optimizer.mode == "proximal"
    train(model, optimizer, 3)
    train(other, other_optimizer, 3)
    assert_bits(other, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled_step(other, other_optimizer, scaler, task_loss(other))
    scaled_step(model, optimizer, torch.amp.GradScaler("cpu", init_scale=8.0), task_loss(model))
    assert_bits(other, model)


# ================================================================================================
# What is refused
# ================================================================================================
REFUSED = {
    "amsgrad": ("AdamW", {"amsgrad": True}, "amsgrad=True is not available here; use torch's cl"),
    "differentiable": ("SGD", {"differentiable": True}, "differentiable=True: this step is not"),
    "foreach": ("SGD", {"foreach": True}, "foreach and fused: this step is always fused"),
    "not fused": ("Adam", {"fused": False}, "foreach and fused: this step is always fused"),
    "mode": ("SGD", {"mode": "newton"}, "mode: 'newton' is unknown; use 'gradient' or 'proximal'"),
    "lr": ("AdamW", {"lr": -1.0}, "Invalid learning rate"),
}


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_are_not_available(kind, options, message):
    model, mas = learned()
    with pytest.raises(ValueError, match=message):
        ours(kind, model.parameters(), mas, **options)


def test_bad_arguments():
    model, mas = learned()
    with pytest.raises(TypeError, match=r"mas is a Sequential; pass a mas_ext\.MAS"):
        ours("SGD", model.parameters(), model)
    with pytest.raises(ValueError, match="holds none of this model's parameters"):
        ours("SGD", mlp().parameters(), mas)
    optimizer = ours("AdamW", [model[0].weight], mas)
    for options in ({"amsgrad": True}, {"fused": False}):
        with pytest.raises(ValueError, match=r"amsgrad=True|always fused"):
            optimizer.add_param_group({"params": [model[0].bias], **options})
    assert len(optimizer.param_groups) == 1
    assert ours("AdamW", model.parameters(), mas, fused=True, foreach=False, capturable=True)


def test_attaching_the_same_mas_too_would_count_it_twice():
    model, mas = learned()
    optimizer = ours("SGD", model.parameters(), mas)
    with pytest.raises(ValueError, match=r"includes the penalty already.*leave attach\(\) out"):
        mas.attach(optimizer)
    MAS(model).attach(optimizer)  # another one may be


def test_a_checkpoint_with_amsgrad_is_refused_and_changes_nothing():
    model, mas = learned()
    amsgrad = theirs("AdamW", model.parameters(), amsgrad=True)
    train(model, amsgrad, 2)
    optimizer = ours("AdamW", model.parameters(), mas)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="amsgrad=True is not available here"):
        optimizer.load_state_dict(amsgrad.state_dict())
    for old, new in zip(
        before["state"].values(), optimizer.state_dict()["state"].values(), strict=True
    ):
        for name in old:
            assert torch.equal(old[name], new[name])


@each_state
def test_a_gradient_that_cannot_be_used_is_named_and_nothing_moves(kind):
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "head": nn.Linear(3, 2)})
    mas = MAS(model, 5.0)
    mas.consolidate([torch.arange(5)], forward=lambda m, x: m["head"](m["table"](x)))
    model["table"].sparse = True
    optimizer = ours(kind, model.parameters(), mas)
    model["head"](model["table"](torch.tensor([1, 2]))).sum().backward()
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"the gradient of 'table\.weight' is not dense"):
        optimizer.step()
    assert_bits(model, before)
    assert not optimizer.state


def test_an_operators_error_names_the_parameter():
    model, mas = learned()
    optimizer = ours("momentum", model.parameters(), mas)
    train(model, optimizer, 1)
    optimizer.state[model[2].weight]["momentum_buffer"] = torch.zeros(3)
    before = copy.deepcopy(model)
    with pytest.raises(
        RuntimeError, match=r"momentum_buffers\[2\] \('2\.weight'\) has shape \[3\]"
    ):
        optimizer.step()
    assert_bits(model, before)
