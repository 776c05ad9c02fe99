"""Numbers that were read from a file: whatever JSON can hold, until they are checked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

_LARGEST = 2**63 - 1  # of a whole number; PyTorch has no larger ones
T = TypeVar("T")


def is_whole(value: Any, least: int = 0) -> bool:
    """Whether a value is a whole number of at least ``least``, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def is_finite(value: Any) -> bool:
    """Whether a value is a number other than NaN and Inf, and not a bool."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -sys.float_info.max <= value <= sys.float_info.max


def are_finite(tensor: Tensor, *, may_be_negative: bool = False) -> bool:
    """Whether all numbers of a tensor are finite, and not negative; takes no memory."""
    if tensor.numel() == 0:
        return True
    least, most = torch.aminmax(tensor.detach())  # NaN, if there is one
    is_in_range = torch.isfinite(least) & torch.isfinite(most)
    return bool(is_in_range if may_be_negative else is_in_range & (least >= 0))


def restored(kind: type[T], values: Any, what: str) -> T:
    """A dataclass of numbers from their values by name.

    Raises:
        ValueError: there are others, a number is not finite, or a count is negative.
    """
    counts = {field.name: isinstance(field.default, int) for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, Mapping) or values.keys() != counts.keys():
        raise ValueError(f"the state is damaged: {what} must have {', '.join(counts)}")
    for name, is_count in counts.items():
        if not (is_whole(values[name]) if is_count else is_finite(values[name])):
            raise ValueError(f"the state is damaged: {name!r} of {what} is {values[name]!r}")
    return kind(**{name: values[name] if counts[name] else float(values[name]) for name in counts})
