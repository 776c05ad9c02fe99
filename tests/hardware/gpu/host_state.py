"""state_device="cpu": Ω and θ* in pinned memory, beside the same on the device.

In a rehearsal everything is on the CPU, and pieces are forced.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import mas_ext
from mas_ext._penalty import streaming
from tests.hardware.gpu.device import DEVICE, REHEARSAL, needs_gpu
from tests.hardware.gpu.graphs import captured
from tests.hardware.gpu.syncs import assert_does_not_wait
from tests.support.operators import MODES

RATE, PIECE = 0.01, 2**16
each_state_dtype = pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "uint8"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PIECE", PIECE)
    if REHEARSAL:
        monkeypatch.setattr(streaming, "is_elsewhere", lambda state, device: True)


def network(dtype: torch.dtype, width: int = 500) -> nn.Module:
    """Of many pieces, with channels last and small parameters in between."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 64, 3).to(memory_format=torch.channels_last)
    layers = [conv, nn.Flatten(), nn.Linear(256, width), nn.Tanh(), nn.Linear(width, 4)]
    return nn.Sequential(*layers).to(DEVICE, dtype)


def images(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 16, 4, 4, generator=generator).to(DEVICE, dtype)


Learned = tuple[nn.Module, mas_ext.MAS]


def both(dtype: torch.dtype, state_dtype: str, width: int = 500) -> tuple[Learned, Learned]:
    """With the state in host memory, and on the device; measured once."""
    models = network(dtype, width), network(dtype, width)
    host, plain = (
        mas_ext.MAS(model, 2.0, state_dtype=state_dtype, state_device=state_device)
        for model, state_device in zip(models, ("cpu", None), strict=True)
    )
    host.consolidate([images(dtype)], estimator="batch")
    plain.load_state_dict(host.state_dict())
    for model in models:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)
                p.grad = torch.zeros_like(p)
    return (models[0], host), (models[1], plain)


def seen(model: nn.Module, value: Tensor) -> list[Tensor]:
    params = list(model.parameters())
    return [*params, *(p.grad for p in params), value]  # type: ignore[list-item]


def assert_same(ours: list[Tensor], plain: list[Tensor]) -> None:
    """The same bits, except for the penalty, which is a sum of sums here."""
    for a, b in zip(ours[:-1], plain[:-1], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(ours[-1], plain[-1], rtol=1e-6, atol=0)


@each_dtype
@each_state_dtype
@pytest.mark.parametrize("call", ["add_penalty_grad_", "proximal_step_", "penalty"])
def test_a_call_in_pieces_has_the_same_bits(
    call: str, state_dtype: str, dtype: torch.dtype
) -> None:
    found = []
    for model, mas in both(dtype, state_dtype):
        for _ in range(3):
            value = getattr(mas, call)(*[RATE] * (call == "proximal_step_"))
        if call == "penalty":
            value.backward()
        found.append(seen(model, value))
    assert_same(*found)


@pytest.mark.parametrize("mode", MODES)
@each_state_dtype
def test_training_has_the_same_bits(state_dtype: str, mode: str) -> None:
    def attached(model: nn.Module, mas: mas_ext.MAS) -> tuple[Optimizer, Any]:
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        return optimizer, mas.attach(optimizer, mode, every=1)

    assert_same_training(state_dtype, attached, steps=4)


def assert_same_training(
    state_dtype: str, make: Callable[[nn.Module, mas_ext.MAS], tuple[Optimizer, Any]], steps: int
) -> None:
    """With an optimizer, and what has its last penalty, made for each."""
    found = []
    for model, mas in both(torch.float32, state_dtype):
        optimizer, handle = make(model, mas)
        for _ in range(steps):
            optimizer.step()
        assert handle.last_penalty is not None
        found.append(seen(model, handle.last_penalty))
    assert_same(*found)


@each_state_dtype
def test_tasks_are_merged_where_the_state_is(state_dtype: str) -> None:
    (_, host), (_, plain) = both(torch.float32, state_dtype)
    host.update_importance([images(torch.float32)], estimator="batch")
    plain.load_state_dict(host.state_dict())  # with the sums of the task
    for mas in (host, plain):
        mas.consolidate()
    for name, p in plain.protected.index.named().items():
        stored, _ = host.protected.state.consolidated.importance.stored(name)
        for tensor in (stored, host.anchor[name]):
            assert tensor.device.type == "cpu"
            assert REHEARSAL or tensor.is_pinned()
        assert torch.equal(host.anchor[name].to(DEVICE), p)
        ours, theirs = host.importance[name].to(DEVICE), plain.importance[name]
        largest = float(theirs.max())
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=largest * 2**-7)


@pytest.mark.parametrize("mode", MODES)
def test_our_optimizer_in_pieces_has_the_same_bits(mode: str) -> None:
    def ours(model: nn.Module, mas: mas_ext.MAS) -> tuple[Optimizer, Any]:
        optimizer = mas_ext.optim.AdamW(model.parameters(), RATE, mas=mas, mode=mode)
        return optimizer, optimizer

    assert_same_training("uint8", ours, steps=3)


@needs_gpu
def test_a_copy_is_pinned_when_it_is_used() -> None:
    for again in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        (_, mas), _ = both(torch.float32, "uint8")
        other = again(mas)
        assert not other.anchor["2.weight"].is_pinned()
        assert torch.equal(other.proximal_step_(RATE), mas.proximal_step_(RATE))
        for tensor in (*other.protected.state.consolidated.importance.stored("2.weight"),):
            assert tensor is not None
            assert tensor.is_pinned()
        assert other.anchor["2.weight"].is_pinned()


def test_nothing_waits_for_the_device() -> None:
    (_, mas), _ = both(torch.bfloat16, "uint8")
    assert_does_not_wait(lambda: mas.proximal_step_(RATE))
    assert_does_not_wait(mas.add_penalty_grad_)


def test_a_graph_replays_the_copies() -> None:
    """A replay reads what is in host memory by then."""
    (model, host), (other, plain) = both(torch.float32, "float32")
    replay = captured(lambda: host.proximal_step_(RATE))
    with torch.no_grad():
        for anchor in host.anchor.values():
            anchor.add_(0.5)
    plain.load_state_dict(host.state_dict())
    other.load_state_dict(model.state_dict())
    plain.proximal_step_(RATE)
    replay()
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


@needs_gpu
@each_state_dtype
def test_two_pieces_are_all_that_is_ever_on_the_device(state_dtype: str) -> None:
    (model, mas), _ = both(torch.bfloat16, state_dtype, width=40_000)
    per_parameter = 2 + {"float32": 4, "bfloat16": 2, "uint8": 1 + 4 / 256}[state_dtype]
    for _ in range(2):  # what is allocated once, is
        mas.proximal_step_(RATE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mas.proximal_step_(RATE)
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    assert used <= 2 * PIECE * per_parameter + 2**20
    assert used < sum(p.numel() for p in model.parameters()) * per_parameter / 4
    assert torch.cuda.memory_allocated() - before <= 512
