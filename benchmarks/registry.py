"""The benchmarks, in the order in which they run and are shown."""

from __future__ import annotations

from benchmarks import abs_matmul, demo, lists, per_sample, scaling, training
from benchmarks.entry import Entry

_EVERY: tuple[Entry, ...] = (
    *lists.ENTRIES,
    scaling.ENTRY,
    training.ENTRY,
    per_sample.ENTRY,
    abs_matmul.ENTRY,
    demo.ENTRY,
)
ENTRIES = {entry.name: entry for entry in _EVERY}
