"""Nothing waits for the device: torch's own detector, and a device that is kept busy.

The detector sees what goes through torch; a call that waits by itself would return only after the
long kernel before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

import mas_ext
from tests.hardware.gpu import calls
from tests.hardware.gpu.checks import NeedsGpu, Session
from tests.hardware.gpu.graphs import Training

CYCLES = 400_000_000  # about a fifth of a second


def run(session: Session) -> None:
    session.check("the detectors detect", detectors_detect, session.device)
    for op in calls.ALL:
        for where in ("device", "cpu"):
            name = f"{op}, scalars on the {'device' if where == 'device' else 'CPU'}"
            session.check(name, operator_does_not_wait, session.device, op, where)
    for name, function in MAS_CALLS.items():
        session.check(name, mas_does_not_wait, session.device, function)
    for mode in ("gradient", "proximal"):
        name = f"optimizer.step() with MAS attached, mode={mode!r}"
        session.check(name, attached_step_does_not_wait, session.device, mode)
        name = f"the same, fused, under a GradScaler, mode={mode!r}"
        session.check(name, scaled_step_does_not_wait, session.device, mode)


@contextmanager
def nothing_waits(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        raise NeedsGpu("the calls ran, unwatched")
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(CYCLES)
    done.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        still_busy = not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert still_busy, "the call returned only after the kernel before it had ended"


def warmed_up(function: Callable[[], object], device: str) -> None:
    """The first calls may load kernels and allocate, which waits; in training that is once."""
    for _ in range(3):
        function()
    with nothing_waits(device):
        function()


def detectors_detect(device: str) -> str:
    """Each of the two, on a call that does wait."""
    if device == "cpu":
        raise NeedsGpu
    value = torch.ones((), device=device)
    late = partial(time.sleep, 2.0)  # the long kernel is over by then
    for wait, expected in ((value.item, RuntimeError), (late, AssertionError)):
        try:
            with nothing_waits(device):
                wait()
        except expected:
            continue
        raise AssertionError(f"{wait} was not noticed")
    return ""


def operator_does_not_wait(device: str, op: str, where: str) -> str:
    for dtype in (torch.float32, torch.bfloat16):
        call = calls.make(op, device, dtype, torch.float32, where)
        warmed_up(call.run, device)
    return ""


MAS_CALLS: dict[str, Callable[[mas_ext.MAS], object]] = {
    "MAS.penalty() and its backward pass": lambda mas: mas.penalty().backward(),
    "MAS.add_penalty_grad_()": lambda mas: mas.add_penalty_grad_(),
    "MAS.proximal_step_(0.1)": lambda mas: mas.proximal_step_(0.1),
}


def mas_does_not_wait(device: str, function: Callable[[mas_ext.MAS], object]) -> str:
    training = Training(device, "gradient")
    warmed_up(lambda: function(training.mas), device)
    return ""


def attached_step_does_not_wait(device: str, mode: str) -> str:
    training = Training(device, mode)
    warmed_up(training.step, device)
    return ""


def scaled_step_does_not_wait(device: str, mode: str) -> str:
    training = Training(device, mode)
    training.optimizer = torch.optim.Adam(training.model.parameters(), fused=True)
    training.mas.attach(training.optimizer, mode=mode)
    scaler = torch.amp.GradScaler(device)

    def step() -> None:
        training.optimizer.zero_grad()
        scaler.scale(training.model(training.data).square().mean()).backward()
        scaler.step(training.optimizer)
        scaler.update()

    warmed_up(step, device)
    return ""
