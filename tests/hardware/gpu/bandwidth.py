"""Every operator, on one tensor of 10 parameters and more and on lists as models have them."""

from __future__ import annotations

from itertools import product

import torch

from tests.hardware.gpu import clock, jobs
from tests.hardware.gpu.checks import Session, Table
from tests.support.operators import OPS, PENALTY_OPS
from tests.support.tensors import KEPT, State

Shapes = list[tuple[int, ...]]
FIGURES = ["µs", "GB/s", "of a copy"]
NOTE = f"{', '.join(jobs.OTHERS)}: their time over ours"
SIZES = (10, 1_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
SIZES_OF_A_REHEARSAL = (10, 8193)
# The parameters' dtype, and Ω's if it is not float32.
NARROW = [(torch.bfloat16, None), *product((torch.float32, torch.bfloat16), KEPT)]
KEPT_SIZE = 100_000_000  # of these, at most
COMPILED_AT = 1_000_000  # and the largest: compiling takes seconds each time
BYTES_PER_PARAMETER = 44  # all lists in float32, with what eager mode and the checks need


def run(session: Session) -> None:
    sizes = sizes_for(session)
    tables = {
        op: session.table(f"{op}, float32", ["parameters", *FIGURES, *jobs.OTHERS], NOTE)
        for op in OPS
    }
    for size in sizes:
        with_compile = size in (COMPILED_AT, sizes[-1])
        session.check(f"{size:,} parameters", every_operator, session, size, with_compile, tables)
    columns = ["operator", "parameters in", "Ω in", "bytes per parameter", *FIGURES]
    size = min(sizes[-1], KEPT_SIZE)
    table = session.table(f"{size:,} parameters, in fewer bytes", columns)
    for dtype, kept in NARROW:
        name = f"{size:,} parameters in {title(dtype)}, Ω in {kept or 'float32'}"
        session.check(name, stored, session, size, dtype, kept, table)
    for name, shapes in (LISTS_OF_A_REHEARSAL if session.rehearsal else LISTS).items():
        table = session.table(name, ["operator", *FIGURES, *jobs.OTHERS], NOTE)
        session.check(name, on_a_list, session, shapes(), table)


def title(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sizes_for(session: Session) -> list[int]:
    if session.rehearsal:
        return list(SIZES_OF_A_REHEARSAL)
    free, _ = torch.cuda.mem_get_info()
    most = int(0.9 * free) // BYTES_PER_PARAMETER
    return sorted({min(size, most) for size in SIZES})


def every_operator(
    session: Session, size: int, with_compile: bool, tables: dict[str, Table]
) -> str:
    state = jobs.make_state([(size,)], session.device)
    for op, table in tables.items():
        compare(session, table, f"{size:,}", op, jobs.ways(op, with_compile), state)
    return clock.timed(session)


def on_a_list(session: Session, shapes: Shapes, table: Table) -> str:
    state = jobs.make_state(shapes, session.device)
    for op in OPS:
        compare(session, table, op, op, jobs.ways(op, with_compile=True), state)
    return clock.timed(session)


def compare(
    session: Session,
    table: Table,
    row: str,
    op: str,
    ways: dict[str, jobs.Job],
    state: State,
) -> None:
    """Verifies all ways, then times them. torch.compile does best with one tensor per list."""
    torch.compiler.reset()  # the last size's graph would count against the recompilation limit
    flat = jobs.flattened(state) if len(state.params) > 1 else state
    calls = {}
    for name, job in ways.items():
        given = flat if name == jobs.COMPILED else state
        jobs.assert_right(op, job, given, f"{op}, {name}")
        calls[name] = lambda job=job, given=given: job(given)
    clock.beside_a_copy(session, table, [row], calls, jobs.bytes_moved(op, state))


def stored(session: Session, size: int, dtype: torch.dtype, kept: str | None, table: Table) -> str:
    """Parameters in 16 bits, and Ω stored in bfloat16 or in codes."""
    state = jobs.make_state([(size,)], session.device, dtype, kept)
    for op in OPS if kept is None else PENALTY_OPS:
        job = jobs.ours(op)
        jobs.assert_right(op, job, state, op)
        moved = jobs.bytes_moved(op, state)
        row = [op, title(dtype), kept or "float32", f"{moved / size:.3g}"]
        clock.beside_a_copy(session, table, row, {clock.OURS: lambda job=job: job(state)}, moved)
    return clock.timed(session)


# ================================================================================================
# Lists
# ================================================================================================
def small_tensors(count: int = 1000) -> Shapes:
    return [(64,)] * count


def resnet50() -> Shapes:
    """Its parameters: a stem, bottlenecks of three convolutions, a head; two vectors per norm."""
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
# As many parameters as one of the sizes of a rehearsal: inductor's cache has that compiled.
LISTS_OF_A_REHEARSAL = {"129 small tensors": lambda: [*small_tensors(128), (1,)]}
