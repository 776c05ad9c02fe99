"""Calling the operators on parameters that have names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def near(scalar: Any, tensor: Tensor) -> Any:
    """A scalar of another device, where a model spans several, on the tensor's."""
    elsewhere = isinstance(scalar, Tensor) and scalar.device.type != "cpu"
    return scalar.to(tensor.device, non_blocking=True) if elsewhere else scalar


@contextmanager
def naming(names: list[str]) -> Iterator[None]:
    """Gives an operator's error the parameter's name beside its place in the list."""
    try:
        yield
    except RuntimeError as error:
        text = re.sub(r"\[(\d+)\] (has|is)", _place_named(names), str(error))
        if text == str(error):
            raise
        raise RuntimeError(text) from None


def _place_named(names: list[str]) -> Callable[[re.Match[str]], str]:
    return lambda found: f"[{found[1]}] ({names[int(found[1])]!r}) {found[2]}"
