"""CUDA graphs: every operator captured once, and replayed with other values of its scalars."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mas_ext
from tests.hardware.gpu import calls
from tests.hardware.gpu.checks import NeedsGpu, Session

FACTORS = (1.0, 4.0, 0.25, 3.0)
RATE = 0.01


def run(session: Session) -> None:
    for op in calls.ALL:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            name = f"{op}, {str(dtype).removeprefix('torch.')}"
            session.check(name, replays_follow_the_scalars, session.device, op, dtype)
        session.check(f"{op}, scalars on the CPU", replays_keep_cpu_scalars, session.device, op)
    for mode in ("gradient", "proximal"):
        name = f"a whole training step with MAS attached, mode={mode!r}"
        session.check(name, captured_training_is_training, session.device, mode)


class Graph:
    """A function captured on a side stream after a warm-up, as PyTorch asks for.

    In a rehearsal ``replay`` calls the function.
    """

    def __init__(self, function: Callable[[], object], device: str, warm_up: int = 3) -> None:
        self.replay: Callable[[], object] = function
        if device == "cpu":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            function()
        self.replay = self.graph.replay


def rehearsed(device: str) -> str:
    if device == "cpu":
        raise NeedsGpu("all but the capture ran")
    return ""


def replays_follow_the_scalars(device: str, op: str, dtype: torch.dtype) -> str:
    for scalar_dtype in (torch.float32, torch.float64):
        call = calls.make(op, device, dtype, scalar_dtype, "device")
        graph = Graph(call.run, device)
        for factor in FACTORS:
            call.restore()
            call.set_scalars(factor)
            graph.replay()
            call.assert_right()
    return rehearsed(device)


def replays_keep_cpu_scalars(device: str, op: str) -> str:
    """What is on the CPU is read when the graph is captured."""
    call = calls.make(op, device, torch.float32, torch.float64, "cpu")
    graph = Graph(call.run, device)
    for _ in range(2):
        call.restore()
        graph.replay()
        call.assert_right()
    return rehearsed(device)


class Training:
    """A network, its optimizer with MAS attached, and a step that can be captured."""

    def __init__(self, device: str, mode: str) -> None:
        torch.manual_seed(0)
        layers = torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 4)
        self.model = torch.nn.Sequential(*layers).to(device)
        generator = torch.Generator().manual_seed(1)
        self.data = torch.randn(16, 20, generator=generator).to(device)
        self.mas = mas_ext.MAS(self.model, lambda_reg=2.0)
        self.mas.consolidate([self.data])
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=RATE, capturable=torch.device(device).type == "cuda"
        )
        self.handle = self.mas.attach(self.optimizer, mode=mode)

    def step(self) -> None:
        self.optimizer.zero_grad()
        (self.model(self.data) - 1).square().mean().backward()
        self.optimizer.step()


def captured_training_is_training(device: str, mode: str) -> str:
    """Warm-up steps count: they move the parameters as any others do. Capturing does not run."""
    warm_up, replays = 3, 5
    plain, captured = Training(device, mode), Training(device, mode)
    graph = Graph(captured.step, device, warm_up)
    for _ in range(warm_up + replays):
        plain.step()
    for _ in range(replays if device != "cpu" else warm_up + replays):
        graph.replay()
    for mine, theirs in zip(captured.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-2 * RATE)
    penalties = captured.handle.last_penalty, plain.handle.last_penalty
    torch.testing.assert_close(*penalties, rtol=1e-2, atol=0.0)
    assert float(penalties[0]) > 0
    return rehearsed(device)
