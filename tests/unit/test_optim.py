"""mas_ext.optim beside torch's optimizers: where they are the same, checkpoints, refusals.

That training is right is in ``tests/integration/test_loops.py``.
"""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import mas_ext
from mas_ext import MAS
from tests.integration.test_loops import KINDS as ALL
from tests.integration.test_loops import OURS
from tests.support.regularizers import (
    assert_bits,
    assert_refused,
    assert_states_equal,
    gradients,
    learned,
    refusal,
)
from tests.support.zoo.small import mlp, vectors

X = vectors(dtype=torch.float32)
KINDS = {kind: ALL[kind] for kind in OURS}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_mode = pytest.mark.parametrize("mode", ["gradient", "proximal"])
learned = partial(learned, 5.0, torch.float32)


def theirs(kind: str, params, **more):
    name, options = KINDS[kind]
    return getattr(torch.optim, name)(params, **{**copy.deepcopy(options), **more})


def ours(kind: str, params, mas: MAS, **more):
    name, options = KINDS[kind]
    return getattr(mas_ext.optim, name)(params, mas=mas, **{**copy.deepcopy(options), **more})


def task_loss(model: nn.Module) -> torch.Tensor:
    return (model(X.to(model[0].weight.dtype)) - 3).pow(2).mean()


def train(model, optimizer, steps: int = 3, scaler=None, factor: float = 1.0) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task_loss(model) * factor
        (scaler.scale(loss) if scaler else loss).backward()
        (scaler.step(optimizer) if scaler else optimizer.step())
        if scaler:
            scaler.update()


def scaler(scale: float = 64.0):
    return torch.amp.GradScaler("cpu", init_scale=scale)


# -- Where it is torch's step ----------------------------------------------------------------------
@each_kind
def test_before_the_first_task_it_is_torchs_step(kind):
    plain, model = mlp(torch.float32), mlp(torch.float32)
    train(plain, theirs(kind, plain.parameters(), fused=True))
    optimizer = ours(kind, model.parameters(), MAS(model))
    assert optimizer.last_penalty is None
    train(model, optimizer)
    assert_bits(model, plain)
    assert optimizer.last_penalty == 0


@pytest.mark.parametrize("kind", ["decay", "momentum", "nesterov"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_scaled", [False, True])
def test_half_precision_on_the_cpu_takes_torchs_plain_step(kind, dtype, is_scaled):
    """torch's fused one gives other results before torch 2.14."""
    plain, model = mlp(torch.float32).to(dtype), mlp(torch.float32).to(dtype)
    train(plain, theirs(kind, plain.parameters()))
    optimizer, amp = ours(kind, model.parameters(), MAS(model)), scaler() if is_scaled else None
    train(model, optimizer, scaler=amp)
    assert_bits(model, plain)
    if amp:
        train(model, optimizer, 1, amp, torch.inf)
        assert_bits(model, plain)


@each_mode
def test_gradients_are_only_read_and_what_is_not_protected_takes_torchs_step(mode):
    for kind in KINDS:
        plain = mlp(torch.float32)
        model, mas = learned(moved=False, params=["0.*"])
        train(plain, theirs(kind, plain.parameters(), fused=True), 1)
        optimizer = ours(kind, model.parameters(), mas, mode=mode)
        train(model, optimizer, 1)
        assert_bits(model[2], plain[2])
        before = gradients(model)
        optimizer.step()
        assert_states_equal(gradients(model), before)


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

    expected = task_loss(model)
    assert optimizer.step(closure) == expected
    assert calls == ["before", "closure", "after"]


# -- Checkpoints, copies ---------------------------------------------------------------------------
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
    train(model, optimizer)
    saved = reloaded([model.state_dict(), mas.state_dict(), optimizer.state_dict()])

    model = mlp(torch.float32)
    mas = MAS(model)
    optimizer = ours(kind, model.parameters(), mas, mode=mode)
    for one, state in zip((model, mas, optimizer), saved, strict=True):
        one.load_state_dict(state)
    train(model, optimizer)
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
            more = {"mas": mas} if make is ours else implementation
            optimizer = make(kind, model.parameters(), **more)
            if saved is not None:
                assert set(optimizer.param_groups[0]) == set(saved["param_groups"][0])
                assert {i: set(values) for i, values in saved["state"].items()} == layout
                optimizer.load_state_dict(saved)
            handle = None if make is ours else mas.attach(optimizer)
            train(model, optimizer)
            if handle:
                handle.remove()
            saved = reloaded(optimizer.state_dict())
        torch.testing.assert_close(
            list(model.parameters()), list(straight.parameters()), rtol=1e-5, atol=1e-6
        )


@each_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_go_on_as_the_original(kind, copied):
    model, mas = learned()
    optimizer = ours(kind, model.parameters(), mas, mode="proximal")
    train(model, optimizer, 2)
    other, other_mas, other_optimizer = copied((model, mas, optimizer))
    assert other_optimizer.mas is other_mas
    for one, steps in ((model, optimizer), (other, other_optimizer)):
        train(one, steps)
        train(one, steps, 1, scaler(8.0))
    assert other_optimizer.mode == "proximal"
    assert_bits(other, model)


# -- Refusals --------------------------------------------------------------------------------------
def sgd(model, mas, **options):
    return mas_ext.optim.SGD(model.parameters(), mas=mas, **options)


def adamw(model, mas, **options):
    return mas_ext.optim.AdamW(model.parameters(), mas=mas, **options)


def with_group(model, mas, **options):
    optimizer = mas_ext.optim.AdamW([model[0].weight], mas=mas)
    try:
        optimizer.add_param_group({"params": [model[0].bias], **options})
    finally:
        assert len(optimizer.param_groups) == 1


def loading_amsgrad(model, mas):
    other = theirs("AdamW", model.parameters(), amsgrad=True)
    optimizer = ours("AdamW", model.parameters(), mas)
    before = copy.deepcopy(optimizer.state_dict())
    try:
        optimizer.load_state_dict(other.state_dict())
    finally:
        assert_states_equal(optimizer.state_dict(), before)


def wrong_buffer(model, mas):
    optimizer = ours("momentum", model.parameters(), mas)
    task_loss(model).backward()
    for p in model.parameters():
        buffer = torch.zeros(3) if p is model[2].weight else torch.zeros_like(p)
        optimizer.state[p]["momentum_buffer"] = buffer
    optimizer.step()


REFUSALS = {
    "amsgrad": (lambda *a: adamw(*a, amsgrad=True), ValueError, "amsgrad", "torch's class"),
    "group amsgrad": (lambda *a: with_group(*a, amsgrad=True), ValueError, "amsgrad", "attach"),
    "group fused": (lambda *a: with_group(*a, fused=False), ValueError, "fused", "leave"),
    "loaded amsgrad": (loading_amsgrad, ValueError, "amsgrad", "attach"),
    "differentiable": (lambda *a: sgd(*a, differentiable=True), ValueError, "differentiable"),
    "foreach": (lambda *a: sgd(*a, foreach=True), ValueError, "foreach", "leave"),
    "not fused": (lambda *a: adamw(*a, fused=False), ValueError, "fused", "leave"),
    "mode": (lambda *a: sgd(*a, mode="newton"), ValueError, "mode", "'proximal'"),
    "lr": (lambda *a: adamw(*a, lr=-1.0), ValueError, "learning rate"),
    "mas": (lambda model, mas: sgd(model, model), TypeError, "mas", "MAS"),
    "another model": (lambda model, mas: sgd(mlp(), mas), ValueError, "optimizer", "none"),
    "another model, AdamW": (lambda model, mas: adamw(mlp(), mas), ValueError, "none"),
    "an operator's": (wrong_buffer, RuntimeError, "momentum_buffers[2]", "'2.weight'", "shape"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    model, mas = learned()
    assert_refused(refusal(*REFUSALS[case]), model, mas, unchanged=(model, mas))
    assert adamw(model, mas, fused=True, foreach=False, capturable=True)


@pytest.mark.parametrize("kind", ["momentum", "AdamW"])
def test_a_gradient_that_cannot_be_used_is_named_and_nothing_moves(kind):
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "head": nn.Linear(3, 2)})
    mas = MAS(model, 5.0)
    mas.consolidate([torch.arange(5)], forward=lambda m, x: m["head"](m["table"](x)))
    model["table"].sparse = True
    optimizer = ours(kind, model.parameters(), mas)
    model["head"](model["table"](torch.tensor([1, 2]))).sum().backward()
    case = refusal(optimizer.step, RuntimeError, "'table.weight'", "to_dense()")
    assert_refused(case, unchanged=(model, mas, optimizer))
    assert not optimizer.state
