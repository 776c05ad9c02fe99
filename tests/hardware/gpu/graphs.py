"""CUDA graphs: every operator captured once, and replayed with other values of its scalars."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import mas_ext
from tests.hardware.gpu import calls
from tests.hardware.gpu.device import DEVICE, REHEARSAL
from tests.support.operators import MODES

FACTORS = (1.0, 4.0, 0.25, 3.0)
RATE = 0.01
WARM_UP = 3

each_operator = pytest.mark.parametrize("op", calls.ALL)


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """Its replay, captured on a side stream after a warm-up, as PyTorch asks for."""
    if REHEARSAL:
        for _ in range(WARM_UP):
            function()
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@each_operator
def test_replays_follow_the_scalars(op: str, dtype: torch.dtype) -> None:
    for scalar_dtype in (torch.float32, torch.float64):
        call = calls.make(op, dtype, scalar_dtype)
        replay = captured(call.run)
        for factor in FACTORS:
            call.restore()
            call.set_scalars(factor)
            replay()
            call.assert_right()


@each_operator
def test_replays_keep_scalars_on_the_cpu(op: str) -> None:
    """What is on the CPU is read when the graph is captured."""
    call = calls.make(op, torch.float32, torch.float64, "cpu")
    replay = captured(call.run)
    for _ in range(2):
        call.restore()
        replay()
        call.assert_right()


class Training:
    """A network, its optimizer with MAS attached, and a step that can be captured."""

    def __init__(self, mode: str, **options: bool) -> None:
        torch.manual_seed(0)
        layers = torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 4)
        self.model = torch.nn.Sequential(*layers).to(DEVICE)
        generator = torch.Generator().manual_seed(1)
        self.data = torch.randn(16, 20, generator=generator).to(DEVICE)
        self.mas = mas_ext.MAS(self.model, lambda_reg=2.0)
        self.mas.consolidate([self.data])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE, **options)
        self.handle = self.mas.attach(self.optimizer, mode=mode)
        self.scaler = torch.amp.GradScaler(DEVICE, enabled=False)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale((self.model(self.data) - 1).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("mode", MODES)
def test_captured_training_is_training(mode: str) -> None:
    """Warm-up steps count: they move the parameters as any others do. Capturing does not run."""
    plain, other = (Training(mode, capturable=not REHEARSAL) for _ in range(2))
    replay = captured(other.step)
    for _ in range(5):
        replay()
    for _ in range(WARM_UP + 5):
        plain.step()
    for mine, theirs in zip(other.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-2 * RATE)
    penalties = other.handle.last_penalty, plain.handle.last_penalty
    torch.testing.assert_close(*penalties, rtol=1e-2, atol=0.0)
    assert float(penalties[0]) > 0
