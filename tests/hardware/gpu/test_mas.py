"""MAS, its attachment to an optimizer and mas_ext.optim on a GPU, beside the CPU.

A neighbour of test_operators.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import mas_ext
from tests.hardware.gpu.test_operators import DEVICE
from tests.support.operators import MODES

each_mode = pytest.mark.parametrize("mode", MODES)


# ================================================================================================
# MAS from end to end
# ================================================================================================
def network(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Every rule that launches accumulate_abs_matmul_: convolution, positions, a plain layer."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Linear(36, 20),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(160, 5),
    ]
    return nn.Sequential(*layers).to(device, dtype)


def images(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@contextmanager
def no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def live_through_two_tasks(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All that MAS does, on one device; returns what can be looked at afterwards, on the CPU."""
    model, data = network(device, dtype), images(device, dtype)
    mas = mas_ext.MAS(model, lambda_reg=3.0)
    mas.update_importance([data[:7], data[7:]])
    mas.consolidate([data.flip(0)], estimator="batch")
    seen: dict[str, Tensor] = {f"omega 1 {n}": t.clone() for n, t in mas.importance.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        seen[f"penalty {step}"] = mas.add_penalty_grad_()
        optimizer.step()
        seen[f"penalty after {step}"] = mas.proximal_step_(0.01)
    optimizer.zero_grad()
    mas.penalty().backward()
    seen |= {f"gradient {n}": p.grad.clone() for n, p in model.named_parameters()}
    mas.consolidate([data])
    seen |= {f"omega 2 {n}": t for n, t in mas.importance.items()}
    seen |= {f"parameter {n}": p.detach() for n, p in model.named_parameters()}
    return {name: value.detach().cpu() for name, value in seen.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mas_on_the_device_is_mas_on_the_cpu(dtype: torch.dtype) -> None:
    with no_tf32():
        here = live_through_two_tasks(DEVICE, dtype)
    there = live_through_two_tasks("cpu", dtype)
    bound = {torch.float64: 1e-9, torch.float32: 2e-3}[dtype]
    for name, value in there.items():
        torch.testing.assert_close(
            here[name],
            value,
            rtol=bound,
            atol=bound * float(value.abs().max()),
            msg=f"{name} differs",
        )


def test_per_sample_importance_takes_the_fast_path_on_the_device() -> None:
    """With the defaults, where convolutions may run in TF32: no fallback, and no warning of one."""
    measured = mas_ext.estimate_importance(network(DEVICE), [images(DEVICE)])
    assert set(measured.coverage.values()) == {"direct"}


@pytest.mark.parametrize("source", ["cpu", "device"])
def test_a_state_goes_to_another_mas_and_device(source: str) -> None:
    place = DEVICE if source == "device" else "cpu"
    first = mas_ext.MAS(network(place), lambda_reg=0.5)
    first.consolidate([images(place)])
    first.update_importance([images(place)])
    model = network(DEVICE)
    second = mas_ext.MAS(model)
    second.load_state_dict(first.state_dict())
    for mine, theirs in ((second.importance, first.importance), (second.anchor, first.anchor)):
        assert all(t.device.type == DEVICE for t in mine.values())
        assert all(torch.equal(mine[name].cpu(), theirs[name].cpu()) for name in theirs)
    assert second.lambda_reg == 0.5
    assert float(second.add_penalty_grad_()) == 0.0  # the model is at its anchors
    second.consolidate()  # of what was measured before the state was taken
    assert second.num_tasks == 2


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
def test_mas_keeps_a_narrow_state_on_the_device(state_dtype: str) -> None:
    model = network(DEVICE)
    mas = mas_ext.MAS(model, lambda_reg=2.0, state_dtype=state_dtype)
    mas.consolidate([images(DEVICE)])
    assert all(t.device.type == torch.device(DEVICE).type for t in mas.importance.values())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    params = dict(model.named_parameters())
    seen = {name: mas.importance[name].cpu().double() for name in params}
    delta = {n: p.detach().cpu().double() - mas.anchor[n].cpu().double() for n, p in params.items()}
    expected = sum(float((seen[n] * delta[n] ** 2).sum()) for n in params)  # λ/2 is 1
    for p in params.values():
        p.grad = torch.zeros_like(p)
    assert float(mas.add_penalty_grad_()) == pytest.approx(expected, rel=1e-5)
    for name, p in params.items():
        exact = 2.0 * seen[name] * delta[name]
        torch.testing.assert_close(p.grad.cpu().double(), exact, rtol=1e-5, atol=1e-12)


# ================================================================================================
# Inside a fused optimizer, under a loss scaler
# ================================================================================================
RATE = 1e-3
SCALE = 2.0**10  # a power of two: scaling and unscaling change no bit


def prepared(mode: str) -> tuple[nn.Module, torch.optim.Optimizer, mas_ext.MAS]:
    """A network that has moved away from its anchors, and MAS attached to its fused optimizer."""
    model = network(DEVICE).eval()
    mas = mas_ext.MAS(model, lambda_reg=2.0)
    mas.consolidate([images(DEVICE)])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    mas.attach(optimizer, mode=mode)
    return model, optimizer, mas


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler=None, loss_factor=1.0) -> None:
    optimizer.zero_grad()
    loss = model(images(DEVICE)).square().mean() * loss_factor
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@each_mode
def test_a_scaled_step_of_a_fused_optimizer_is_an_unscaled_one(mode: str) -> None:
    (plain, plain_optimizer, _), (scaled, optimizer, _) = prepared(mode), prepared(mode)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE)
    for _ in range(3):
        step(plain, plain_optimizer)
        step(scaled, optimizer, scaler)
    for mine, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-2 * RATE)


@each_mode
def test_a_step_that_overflowed_is_skipped_with_all_of_mas(mode: str) -> None:
    model, optimizer, _ = prepared(mode)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, scaler, loss_factor=float("inf"))
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() < SCALE
    step(model, optimizer, scaler)
    assert not any(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


# ================================================================================================
# mas_ext.optim
# ================================================================================================
FAST = 1e-2
OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"weight_decay": 0.1},
    "AdamW": {},
}


def trained(name: str, mode: str, device: str, scaled: bool = False) -> list[Tensor]:
    """Penalty and parameters after three steps of a model that has moved away from its anchors.

    ``scaled``: under a loss scaler, with one more step that overflows and is skipped.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 4)).to(device)
    data = torch.randn(16, 20, generator=torch.Generator().manual_seed(1)).to(device)
    mas = mas_ext.MAS(model, lambda_reg=2.0)
    mas.consolidate([data])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    kind = getattr(mas_ext.optim, name)
    optimizer = kind(model.parameters(), lr=FAST, mas=mas, mode=mode, **OPTIMIZERS[name])
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, enabled=scaled)
    for factor in (1.0, math.inf, 1.0, 1.0) if scaled else (1.0, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale((model(data) - 1).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    return [t.detach().cpu() for t in (optimizer.last_penalty, *model.parameters())]


@each_mode
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_on_the_device_is_that_on_the_cpu(name: str, mode: str) -> None:
    here, there = (trained(name, mode, device) for device in (DEVICE, "cpu"))
    for mine, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-2 * FAST)


@each_mode
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_under_a_loss_scaler_skips_what_overflowed(name: str, mode: str) -> None:
    scaled, plain = (trained(name, mode, DEVICE, scaled) for scaled in (True, False))
    for mine, theirs in zip(scaled, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-2 * FAST)
