"""Seconds per call, by CUDA events or in a rehearsal the clock; ways to do one job compared."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

import torch

from tests.hardware.gpu.checks import NeedsGpu, Session, Table

Call = Callable[[], object]
Seconds = dict[str, list[float]]  # of each round, by the name of the way
OURS, COPY = "mas_ext", "copy"
NONE = "–"
SHORTEST_SAMPLE = 0.002  # seconds; shorter calls are repeated within a sample
COPY_BUFFER = 512 << 20  # bytes; larger than any cache
ROUNDS, ROUNDS_OF_A_REHEARSAL = 7, 2


def sample(call: Call, calls: int, device: str) -> float:
    """Seconds per call, averaged over so many calls in a row."""
    if device == "cpu":
        begin = perf_counter()
        for _ in range(calls):
            call()
        return (perf_counter() - begin) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def calls_in_a_sample(call: Call, device: str) -> int:
    sample(call, 1, device)
    return max(1, min(1000, round(SHORTEST_SAMPLE / sample(call, 1, device) + 0.5)))


def measure(session: Session, name: str, ways: Mapping[str, Call], **figures: int) -> Seconds:
    """Times all ways in a new order each round, so that none always follows the same other."""
    inner = {way: calls_in_a_sample(call, session.device) for way, call in ways.items()}
    seconds: Seconds = {way: [] for way in ways}
    order, shuffle = list(ways), random.Random(0).shuffle
    gc.disable()
    try:
        for _ in range(ROUNDS_OF_A_REHEARSAL if session.rehearsal else ROUNDS):
            shuffle(order)
            for way in order:
                seconds[way].append(sample(ways[way], inner[way], session.device))
    finally:
        gc.enable()
    session.figures[name] = {**figures, "seconds": seconds}
    return seconds


def ours(seconds: Seconds) -> float:
    return statistics.median(seconds[OURS])


def ratio(seconds: Seconds, way: str, to: str = OURS) -> str:
    """The median of the rounds' ratios: what disturbs the machine for a while disturbs both."""
    if way not in seconds:
        return NONE
    pairs = zip(seconds[way], seconds[to], strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.2f}"


def beside_a_copy(
    session: Session, table: Table, first: list[str], ways: Mapping[str, Call], moved: int
) -> None:
    """A row: µs and GB/s, how fast that is relative to a copy of as many bytes, other ways' times.

    The columns behind "of a copy" name those ways.
    """
    every = {COPY: copy_of(moved, session.device), **ways}
    seconds = measure(session, ", ".join([table.title, *first]), every, bytes=moved)
    mine = ours(seconds)
    others = table.columns[table.columns.index("of a copy") + 1 :]
    figures = [f"{mine * 1e6:.1f}", f"{moved / mine / 1e9:.3g}", ratio(seconds, COPY)]
    table.rows.append([*first, *figures, *(ratio(seconds, way) for way in others)])


def timed(session: Session) -> str:
    if session.rehearsal:
        raise NeedsGpu("timed on the CPU")
    return "every way verified, then timed"


def copy_of(moved: int, device: str) -> Call:
    """Reads half of the bytes and writes the other half, through a buffer where they are many."""
    half = max(1, moved // 2)
    size = min(half, COPY_BUFFER)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    whole, rest = divmod(half, size)

    def copy() -> None:
        for _ in range(whole):
            target.copy_(source)
        if rest:
            target[:rest].copy_(source[:rest])

    return copy
