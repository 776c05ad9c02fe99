"""Numbers for a reader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def significant(value: float) -> str:
    """Two decimals, or two significant digits where that would show nothing."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def three(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def milliseconds(spread: dict[str, float]) -> str:
    """The median, with the quartiles."""
    digits = 1 if spread["median"] > 0.01 else 2 if spread["median"] > 0.001 else 4
    low, middle, high = (f"{spread[k] * 1e3:.{digits}f}" for k in ("q1", "median", "q3"))
    return f"{middle} ({low}–{high})"


def duration(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    if seconds >= 0.01:
        return f"{seconds * 1e3:.0f} ms"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} µs" if seconds >= 9.95e-6 else f"{seconds * 1e6:.1f} µs"


def took(runs: Iterable[dict[str, Any]]) -> str:
    """The time of some runs, if all of it was noted down."""
    seconds = [run["seconds"] for run in runs]
    if None in seconds:
        return "a time that was not noted down"
    total = sum(seconds)
    return f"{total / 60:.0f} minutes" if total >= 120 else f"{total:.0f} s"


def times(ratio: float) -> str:
    if ratio < 1.995:
        return f"{ratio:.2f}×"
    return f"{ratio:.1f}×" if ratio < 10 else f"{ratio:,.0f}×"


def mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{round(count / 2**20):,}".replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %".replace("-", "−")


def count(number: int) -> str:
    """10, 270 k, 25.6 M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
