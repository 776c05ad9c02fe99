"""Every operator at sizes from 10 parameters on, beside its prediction and a copy of its bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from tests import cases
from tests.hardware.gpu import clock, jobs, predicted
from tests.hardware.gpu.checks import NeedsGpu, Session, Table

COPY = "copy"
ROUNDS, ROUNDS_OF_A_REHEARSAL = 7, 2
SIZES = (10, 1_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
SIZES_OF_A_REHEARSAL = (10, 8193)
KEPT_SIZE = 100_000_000  # at most, where Ω is kept in less
COMPILED_AT = 1_000_000  # and the largest: compiling takes seconds each time
COPY_BUFFER = 512 << 20  # bytes; larger than any cache
BYTES_A_PARAMETER = 44  # all lists in float32, with what eager mode and the checks need beside them


def run(session: Session) -> None:
    sizes = sizes_for(session)
    everything = [(torch.float32, size) for size in sizes] + [(torch.bfloat16, sizes[-1])]
    tables: dict[tuple[str, torch.dtype], Table] = {}
    for op in cases.OPS:
        for dtype in (torch.float32, torch.bfloat16):
            tables[op, dtype] = new_table(session, op, dtype)
    for dtype, size in everything:
        name = f"{size:,} parameters in {name_of(dtype)}"
        session.check(name, every_operator, session, dtype, size, size == sizes[-1], tables)
    of_fewer_bytes(session, min(sizes[-1], KEPT_SIZE))


def of_fewer_bytes(session: Session, size: int) -> None:
    """An Ω that is kept in bfloat16 or in codes."""
    columns = ["operator", "parameters in", "Ω in", "bytes each", "µs", "GB/s", "of a copy"]
    table = session.table(f"{size:,} parameters, Ω in fewer bytes", columns, "")
    for dtype in (torch.float32, torch.bfloat16):
        for kept in cases.KEPT:
            name = f"{size:,} parameters in {name_of(dtype)}, Ω in {kept}"
            session.check(name, every_operator_of, session, dtype, kept, size, table)


def every_operator_of(
    session: Session, dtype: torch.dtype, kept: str, size: int, table: Table
) -> str:
    state = jobs.make_state([(size,)], session.device, dtype, kept)
    for op in cases.PENALTY_OPS:
        seconds, moved = measure(session, op, {jobs.OURS: jobs.ours(op)}, state)
        figures = {"bytes": moved, "seconds": seconds}
        session.figures[f"{op}, {size} {name_of(dtype)}, Ω in {kept}"] = figures
        each = f"{moved / size:.3g}"
        table.rows.append([op, name_of(dtype), kept, each, *row(seconds, moved)])
    if session.rehearsal:
        raise NeedsGpu("timed on the CPU")
    return "every operator right, then timed"


def every_operator(
    session: Session,
    dtype: torch.dtype,
    size: int,
    is_largest: bool,
    tables: dict[tuple[str, torch.dtype], Table],
) -> str:
    state = jobs.make_state([(size,)], session.device, dtype)
    for op in cases.OPS:
        providers = {jobs.OURS: jobs.ours(op)}
        if dtype == torch.float32:
            providers = jobs.providers(op, with_compile=is_largest or size == COMPILED_AT)
        seconds, moved = measure(session, op, providers, state)
        session.figures[f"{op}, {size} {name_of(dtype)}"] = {"bytes": moved, "seconds": seconds}
        expected = predicted.operator(session, op, name_of(dtype), size)
        tables[op, dtype].rows.append([f"{size:,}", expected, *row(seconds, moved)])
    if session.rehearsal:
        raise NeedsGpu("timed on the CPU")
    return "every provider right, then timed"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sizes_for(session: Session) -> list[int]:
    if session.rehearsal:
        return list(SIZES_OF_A_REHEARSAL)
    free, _ = torch.cuda.mem_get_info()
    most = int(0.9 * free) // BYTES_A_PARAMETER
    return sorted({min(size, most) for size in SIZES})


def new_table(session: Session, op: str, dtype: torch.dtype) -> Table:
    columns = ["parameters", predicted.column(session), "µs", "GB/s", "of a copy", *jobs.OTHERS]
    note = f"{', '.join(jobs.OTHERS)}: their time over ours"
    if dtype != torch.float32:
        columns, note = columns[: -len(jobs.OTHERS)], ""
    return session.table(f"{op}, {name_of(dtype)}", columns, note)


def measure(
    session: Session, op: str, providers: dict[str, jobs.Job], state: cases.State
) -> tuple[dict[str, list[float]], int]:
    """Seconds a call of each round, and the bytes that a call moves."""
    torch.compiler.reset()  # the last size's graph would count against the recompilation limit
    if not session.rehearsal:
        torch.cuda.empty_cache()
    for name, job in providers.items():
        jobs.assert_right(op, job, state, f"{op}, {name}")
    moved = jobs.bytes_moved(op, state)
    calls: dict[str, Callable[[], object]] = {COPY: make_copy(moved, session.device)}
    for name, job in providers.items():
        calls[name] = lambda job=job: job(state)
    rounds = ROUNDS_OF_A_REHEARSAL if session.rehearsal else ROUNDS
    return clock.interleaved(calls, rounds, session.device), moved


def row(seconds: dict[str, list[float]], moved: int) -> list[str]:
    ours = statistics.median(seconds[jobs.OURS])
    fraction = clock.ratio(seconds, COPY, jobs.OURS)
    others = [over(seconds, name) for name in jobs.OTHERS] if len(seconds) > 2 else []
    return [f"{ours * 1e6:.1f}", f"{moved / ours / 1e9:.3g}", f"{fraction:.2f}", *others]


def over(seconds: dict[str, list[float]], name: str) -> str:
    return f"{clock.ratio(seconds, name, jobs.OURS):.2f}" if name in seconds else "–"


def make_copy(moved: int, device: str) -> Callable[[], None]:
    """Reads half of the bytes and writes the other half; again and again where they are many."""
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
