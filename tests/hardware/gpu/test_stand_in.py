"""The steps of `make gpu` as they go on a card, over a stand-in for one.

Tensors are on "cpu:0", which no step takes for a rehearsal, and torch.cuda is replaced by as little
as the steps use of it. Nothing is shown about CUDA, but no line of theirs runs for the first time
on somebody's card.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.hardware.gpu import (
    bandwidth,
    calls,
    compiled,
    graphs,
    optimizers,
    products,
    sanitizer,
    syncs,
)
from tests.hardware.gpu.checks import FAILED, PASSED, Session

DEVICE = "cpu:0"
WITHOUT_ITEM = {"fused": True}  # on the CPU only this Adam reads no number back


class Card:
    """A device that is busy until someone waits for it, and a mode in which item() is refused."""

    def __init__(self) -> None:
        self.busy = False
        self.mode = "default"

    def sleep(self, cycles: int) -> None:
        self.busy = True

    def wait(self, seconds: float = 0.0) -> None:
        self.busy = False

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def item(self, tensor: torch.Tensor) -> Any:
        if self.mode == "error":
            raise RuntimeError("called a synchronizing operation")
        return torch._C.TensorBase.item(tensor)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


def event_of(card: Card) -> type:
    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.enable_timing = enable_timing

        def record(self) -> None:
            self.time = time.perf_counter()

        def query(self) -> bool:
            return not card.busy

        def synchronize(self) -> None:
            card.wait()

        def elapsed_time(self, end: Event) -> float:
            assert self.enable_timing
            return (end.time - self.time) * 1e3

    return Event


class CUDAGraph:
    function: Callable[[], object]

    def replay(self) -> None:
        self.function()


@contextmanager
def capture(graph: CUDAGraph) -> Iterator[None]:
    """Captures what graphs.Graph was given; training does not move by it."""
    graph.function = sys._getframe(2).f_locals["function"]
    owner = getattr(graph.function, "__self__", None)
    training = isinstance(owner, graphs.Training)
    stateful = (owner.model, owner.optimizer) if training else ()
    before = [deepcopy(thing.state_dict()) for thing in stateful]
    yield
    for thing, state in zip(stateful, before, strict=True):
        thing.load_state_dict(state)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    for name, stand_in in {
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": Stream,
        "Event": event_of(card),
        "CUDAGraph": CUDAGraph,
        "graph": capture,
        "synchronize": card.wait,
        "_sleep": card.sleep,
        "set_sync_debug_mode": card.set_mode,
        "mem_get_info": lambda: (bandwidth.BYTES_PER_PARAMETER * 10_000, 1 << 40),
        "empty_cache": lambda: None,
        "get_device_capability": lambda: (9, 0),
        "get_device_name": lambda: "NVIDIA H200",
        "current_device": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(syncs, "time", SimpleNamespace(sleep=card.wait))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: card.item(tensor), raising=False)
    adam, scaler = torch.optim.Adam, torch.amp.GradScaler
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: adam(*a, **{**WITHOUT_ITEM, **k}))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler("cpu"))
    return card


def assert_all_passed(session: Session) -> None:
    assert session.checks
    assert not [check for check in session.checks if check.status != PASSED]


def test_graphs(card: Card) -> None:
    session = Session(DEVICE)
    graphs.run(session)
    assert_all_passed(session)


def test_a_graph_that_keeps_its_first_scalars_is_noticed(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CUDAGraph, "replay", lambda graph: None)
    session = Session(DEVICE)
    graphs.run(session)
    changing = [check for check in session.checks if "on the CPU" not in check.name]
    assert {check.status for check in changing} == {FAILED}


def test_syncs(card: Card) -> None:
    session = Session(DEVICE)
    syncs.run(session)
    assert_all_passed(session)


def test_an_operator_that_waits_is_noticed(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    make = calls.make

    def waiting(*words: Any) -> calls.Call:
        call = make(*words)
        run = call.run
        call.run = lambda: (run(), card.wait())
        return call

    monkeypatch.setattr(calls, "make", waiting)
    with pytest.raises(AssertionError, match="only after the kernel before it had ended"):
        syncs.operator_does_not_wait(DEVICE, "penalty", "cpu")


def test_graphs_that_inductor_leaves_out_are_noticed(card: Card) -> None:
    """As it does on a CPU."""
    with pytest.raises(AssertionError, match="inductor left CUDA graphs out 1 times"):
        compiled.compiled_is_eager(DEVICE, "penalty")


def test_timings(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"few": lambda: [(64,)] * 3}
    monkeypatch.setattr(bandwidth, "LISTS", few)
    monkeypatch.setattr(optimizers, "SIZE", 192)
    monkeypatch.setattr(products, "LAYERS", products.LAYERS_OF_A_REHEARSAL)
    for step in (bandwidth, optimizers, products):
        session = Session(DEVICE)
        step.run(session)
        assert_all_passed(session)
        assert all(table.rows for table in session.tables)
    assert bandwidth.sizes_for(Session(DEVICE)) == [10, 1000, 9000]
    shapes = bandwidth.resnet50()
    assert (len(shapes), sum(map(math.prod, shapes))) == (161, 25_557_032)


def test_sanitizer(card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pretended sanitizer that finds a bug exactly where one was planted."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        "#!/bin/sh\n"
        "case $* in *planted*) n=1; code=86;; *) n=0; code=0;; esac\n"
        'echo "========= ERROR SUMMARY: $n errors"\n'
        'echo "========= RACECHECK SUMMARY: $n hazards displayed ($n errors, 0 warnings)"\n'
        "exit $code\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sanitizer, "compile_planted", lambda program, device: "")
    session = Session(DEVICE)
    sanitizer.run(session)
    assert_all_passed(session)
    assert len(session.checks) == 2 + 2 * len(sanitizer.TOOLS)
