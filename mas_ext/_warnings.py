"""Warnings that point at the user's code."""

from __future__ import annotations

import inspect
import warnings

_INSIDE = ("mas_ext.", "torch.", "contextlib")


def warn(message: str) -> None:
    """Warns about the line that called this package, however many frames up that is."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)
