"""What was found: a line for each kernel and dtype, with columns for every architecture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.hardware.sass.expectations import (
    ARCHITECTURES,
    DTYPES,
    KEPT,
    VECTOR_BYTES,
    Expectation,
    Product,
    Streams,
)
from tests.hardware.sass.occupancy import bytes_that_saturate, occupancy, shared_bytes
from tests.hardware.sass.proof import Proof

NEEDED = ", ".join(f"{bytes_that_saturate(a) / 1024:.0f} on sm_{a}" for a in ARCHITECTURES)
NOTES = f"""\
hot loop   of 16 bytes each, the loads + stores of global memory in one turn, and behind them the
           loads of fewer bytes, of an Ω that is kept in less than the parameters; of a product,
           the loads of shared memory, and the multiplications they serve
in flight  bytes that a thread of that loop loads before it waits for any of them
shared     bytes of shared memory a block
spills     bytes of stack, loads and stores of local memory
sm_...     registers a thread, the share of a multiprocessor's threads that there is room for, and
           KiB in flight on one; to keep the memory busy takes {NEEDED}
Where architectures differ, a column has a value for each, in their order."""


def same_or_each(values: Iterable[object]) -> str:
    listed = [str(value) for value in values]
    return listed[0] if len(set(listed)) == 1 else " / ".join(listed)


def hot_loop(proof: Proof) -> str:
    wanted = proof.expectation.hot
    if isinstance(wanted, Streams):
        widths = proof.reads.widths.items()
        narrow = [f"{n} of {w}" for w, n in sorted(widths, reverse=True) if w < VECTOR_BYTES]
        return ", ".join([f"{proof.reads.vectors} + {proof.writes.vectors}", *narrow])
    if isinstance(wanted, Product):
        return f"{len(proof.shared_reads.found)} for {proof.products} {wanted.instruction}"
    return ""


def on_an_architecture(proof: Proof) -> str:
    together = proof.in_flight_together // 1024
    share = f"{occupancy(proof.kernel):.0%}"
    return f"{proof.kernel.registers:3} {share:>4} {together or '':>3}".rstrip()


def lines(proofs: Sequence[Proof]) -> tuple[list[str], list[list[str]]]:
    """The head and the body. A kernel that several files instantiate takes one line."""
    by_kernel: dict[Expectation, dict[int, Proof]] = {}
    for proof in proofs:
        by_kernel.setdefault(proof.expectation, {})[proof.kernel.architecture] = proof
    architectures = [a for a in ARCHITECTURES if any(a in found for found in by_kernel.values())]
    head = ["kernel", "dtype", "hot loop", "in flight", "shared", "spills"]
    head += [f"sm_{architecture}" for architecture in architectures]
    body = []
    for expectation, by_architecture in sorted(by_kernel.items(), key=order):
        found = [by_architecture[a] for a in architectures if a in by_architecture]
        line = [
            expectation.title,
            expectation.dtype_title,
            same_or_each(hot_loop(proof) for proof in found),
            same_or_each(proof.in_flight or "" for proof in found),
            same_or_each(shared_bytes(proof.kernel) for proof in found),
            same_or_each(proof.spills for proof in found),
        ]
        cells = {a: on_an_architecture(proof) for a, proof in by_architecture.items()}
        body.append(line + [cells.get(a, "") for a in architectures])
    return head, body


def order(item: tuple[Expectation, object]) -> tuple[str, int, int]:
    expectation = item[0]
    kept = ["", *KEPT].index(expectation.kept)
    return expectation.title, list(DTYPES).index(expectation.dtype), kept


def text(proofs: Sequence[Proof]) -> str:
    head, body = lines(proofs)
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    rows = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *body]
    )
    return "\n".join(rows)
