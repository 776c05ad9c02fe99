"""The operators on lists as models have them: many small tensors, and a ResNet-50's."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from tests import cases
from tests.hardware.gpu import clock, jobs
from tests.hardware.gpu.bandwidth import COPY, ROUNDS, ROUNDS_OF_A_REHEARSAL, make_copy, over
from tests.hardware.gpu.checks import NeedsGpu, Session, Table

Shapes = list[tuple[int, ...]]


def small_tensors(count: int = 1000) -> Shapes:
    return [(64,)] * count


def resnet50() -> Shapes:
    """Its parameters: a stem, bottlenecks of three convolutions, a head; two vectors a norm."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, into, side in (
                (width, channels, 1),
                (width, width, 3),
                (4 * width, width, 1),
                *([(4 * width, channels, 1)] if block == 0 else []),
            ):
                shapes += [(out, into, side, side), (out,), (out,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


LISTS = {"1,000 tensors of 64": small_tensors, "ResNet-50": resnet50}
# As many parameters as bandwidth.py has rehearsed with: inductor's cache has that compiled.
LISTS_OF_A_REHEARSAL = {"129 small tensors": lambda: [*small_tensors(128), (1,)]}


def run(session: Session) -> None:
    lists = LISTS_OF_A_REHEARSAL if session.rehearsal else LISTS
    for title, shapes in lists.items():
        columns = ["operator", "µs", "of a copy", *jobs.OTHERS]
        note = "eager, foreach, compile: their time over ours; compile is given one flat tensor"
        state = jobs.make_state(shapes(), session.device, torch.float32)
        count = sum(t.numel() for t in state.params)
        heading = f"{title}: {len(state.params):,} tensors, {count:,} parameters"
        table = session.table(heading, columns, note)
        for op in cases.OPS:
            session.check(f"{op}, {title}", beside_others, session, op, state, table)


def beside_others(session: Session, op: str, state: cases.State, table: Table) -> str:
    seconds = measure(session, op, state)
    session.figures[f"{op}, {table.title}"] = {"seconds": seconds}
    ours = statistics.median(seconds[jobs.OURS])
    fraction = clock.ratio(seconds, COPY, jobs.OURS)
    others = [over(seconds, name) for name in jobs.OTHERS]
    table.rows.append([op, f"{ours * 1e6:.1f}", f"{fraction:.2f}", *others])
    if session.rehearsal:
        raise NeedsGpu("timed on the CPU")
    return "every provider right, then timed"


def measure(session: Session, op: str, state: cases.State) -> dict[str, list[float]]:
    torch.compiler.reset()
    flat = jobs.flattened(state)
    calls: dict[str, Callable[[], object]] = {
        COPY: make_copy(jobs.bytes_moved(op, flat), session.device)
    }
    for name, job in jobs.providers(op, with_compile=True).items():
        given = flat if name == jobs.COMPILED else state
        jobs.assert_right(op, job, given, f"{op}, {name}")
        calls[name] = lambda job=job, given=given: job(given)
    rounds = ROUNDS_OF_A_REHEARSAL if session.rehearsal else ROUNDS
    return clock.interleaved(calls, rounds, session.device)
