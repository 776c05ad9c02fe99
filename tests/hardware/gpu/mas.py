"""MAS, its attachment to an optimizer and mas_ext.optim on the device, beside the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import mas_ext
from tests.hardware.gpu.device import DEVICE
from tests.support.operators import MODES


# ================================================================================================
# MAS from end to end
# ================================================================================================
def network(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Every rule that launches accumulate_outer_: convolution, positions, a plain layer."""
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


def live_through_two_tasks(device: str, dtype: torch.dtype, state_dtype: str) -> dict[str, Tensor]:
    """All that MAS does, on one device; returns what can be looked at afterwards, on the CPU."""
    model, data = network(device, dtype), images(device, dtype)
    mas = mas_ext.MAS(model, lambda_reg=3.0, state_dtype=state_dtype)
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


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "bound"),
    [
        (torch.float64, "float32", 1e-9),
        (torch.float32, "float32", 2e-3),
        (torch.float32, "bfloat16", 2e-2),
        (torch.float32, "uint8", 2e-2),
    ],
)
def test_mas_on_the_device_is_mas_on_the_cpu(
    dtype: torch.dtype, state_dtype: str, bound: float
) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        here = live_through_two_tasks(DEVICE, dtype, state_dtype)
    there = live_through_two_tasks("cpu", dtype, state_dtype)
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


# ================================================================================================
# Optimizers, also under a loss scaler
# ================================================================================================
RATE = 1e-2
SCALE = 2.0**10  # a power of two: scaling and unscaling change no bit
OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"weight_decay": 0.1},
    "AdamW": {},
    "attached": {"fused": True},
}
each_mode = pytest.mark.parametrize("mode", MODES)
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def trained(name: str, mode: str, device: str, scaled: bool = False) -> list[Tensor]:
    """Penalty and parameters after three steps of a model that has moved away from its anchors.

    ``name``: of a class in mas_ext.optim, or "attached" for torch's Adam with MAS attached.
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
    options = {"lr": RATE, **OPTIMIZERS[name]}
    if name == "attached":
        optimizer = torch.optim.Adam(model.parameters(), **options)
        handle = mas.attach(optimizer, mode=mode, every=1)
    else:
        kind = getattr(mas_ext.optim, name)
        optimizer = handle = kind(model.parameters(), mas=mas, mode=mode, **options)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE, enabled=scaled)
    for factor in (1.0, math.inf, 1.0, 1.0) if scaled else (1.0, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale((model(data) - 1).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    return [t.detach().cpu() for t in (handle.last_penalty, *model.parameters())]


@each_mode
@each_optimizer
def test_optimizer_on_the_device_is_that_on_the_cpu(name: str, mode: str) -> None:
    here, there = (trained(name, mode, device) for device in (DEVICE, "cpu"))
    for mine, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-2 * RATE)


@each_mode
@each_optimizer
def test_optimizer_under_a_loss_scaler_skips_what_overflowed(name: str, mode: str) -> None:
    scaled, plain = (trained(name, mode, DEVICE, scaled) for scaled in (True, False))
    for mine, theirs in zip(scaled, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-2 * RATE)
