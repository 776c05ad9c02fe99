"""The benchmarks, in the order in which they run and are shown."""

from __future__ import annotations

from benchmarks import (
    abs_matmul,
    compression,
    demo,
    drift,
    lists,
    narrow,
    per_sample,
    scaling,
    training,
)
from benchmarks.entry import Entry

_EVERY: tuple[Entry, ...] = (
    *lists.ENTRIES,
    scaling.ENTRY,
    training.ENTRY,
    per_sample.ENTRY,
    abs_matmul.ENTRY,
    demo.ENTRY,
    compression.ENTRY,
    narrow.ENTRY,
    drift.ENTRY,
)
ENTRIES = {entry.name: entry for entry in _EVERY}
ALONE = [entry.name for entry in _EVERY if entry.alone]
