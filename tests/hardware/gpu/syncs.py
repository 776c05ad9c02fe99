"""Nothing waits for the device: torch's own detector, and a device that is kept busy.

The detector sees what goes through torch; a call that waits by itself would return only after the
long kernel before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import mas_ext
from tests.hardware.gpu import calls
from tests.hardware.gpu.device import DEVICE, REHEARSAL
from tests.hardware.gpu.graphs import Training
from tests.support.operators import MODES

CYCLES = 400_000_000  # about a fifth of a second


@contextmanager
def nothing_waits() -> Iterator[None]:
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


def assert_does_not_wait(function: Callable[[], object]) -> None:
    """The first calls may load kernels and allocate, which waits; in training that is once."""
    for _ in range(3):
        function()
    with nothing_waits():
        function()


def test_the_detectors_detect() -> None:
    """Each of the two, on a call that does wait."""
    value = torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError, match="synchronizing"), nothing_waits():
        value.item()
    with pytest.raises(AssertionError, match="only after the kernel"), nothing_waits():
        time.sleep(2.0)  # the long kernel is over by then


@pytest.mark.parametrize("scalars_on", ["cpu", DEVICE], ids=["cpu", "device"])
@pytest.mark.parametrize("op", calls.ALL)
def test_operator(op: str, scalars_on: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_does_not_wait(calls.make(op, dtype, scalars_on=scalars_on).run)


MAS_CALLS: dict[str, Callable[[mas_ext.MAS], object]] = {
    "penalty() and its backward pass": lambda mas: mas.penalty().backward(),
    "add_penalty_grad_()": lambda mas: mas.add_penalty_grad_(),
    "proximal_step_(0.1)": lambda mas: mas.proximal_step_(0.1),
}


@pytest.mark.parametrize("name", MAS_CALLS)
def test_mas(name: str) -> None:
    mas = Training("gradient").mas
    assert_does_not_wait(lambda: MAS_CALLS[name](mas))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_with_mas_attached(mode: str, scaled: bool) -> None:
    """On the CPU, of Adam's implementations only the fused one reads no number back."""
    how = {"fused": True} if scaled or REHEARSAL else {"capturable": True}
    training = Training(mode, **how)
    training.scaler = torch.amp.GradScaler(DEVICE, enabled=scaled)
    assert_does_not_wait(training.step)
