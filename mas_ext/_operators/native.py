"""Loads the compiled kernels, and reports what was loaded or why nothing was."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mas_ext._version import __version__

_MINIMUM_TORCH = (2, 13)
_REMEDY = (
    "mas_ext runs in plain PyTorch: same results, several times slower. For the kernels, install "
    "torch>=2.13 and a C++20 compiler, then reinstall mas_ext from its source with "
    "pip install --no-build-isolation. MAS_EXT_DISABLE_NATIVE=1 silences this warning."
)

try:
    _C: Any = import_module("mas_ext._C")
except ImportError:  # not built; build_info() and the warning below say so
    _C = None


def _library() -> Path | None:
    return next(iter(sorted(Path(__file__).parents[1].glob("_kernels*.so"))), None)


def _where() -> str:
    """For a clone, whose folder Python prefers to what is installed."""
    folder = Path(__file__).parents[2]
    if not (folder / "setup.py").is_file():
        return ""
    return f" in the clone {folder}; run Python elsewhere, or install with pip's --editable"


def _reason_not_to_load() -> str | None:
    running = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if _library() is None:
        return "the kernels were not built" + _where()
    if running < _MINIMUM_TORCH:
        return f"the kernels need torch>=2.13 and this is torch {torch.__version__}"
    return None


def load() -> str | None:
    """Registers the compiled kernels with PyTorch's dispatcher.

    Without them everything still works, since the reference is every operator's default kernel.

    Returns:
        None, or the reason why they were not loaded. Any reason but ``MAS_EXT_DISABLE_NATIVE=1``
        also gives a warning, once.
    """
    if os.environ.get("MAS_EXT_DISABLE_NATIVE") == "1":
        return "MAS_EXT_DISABLE_NATIVE=1"
    reason = _reason_not_to_load()
    if reason is None:
        try:
            torch.ops.load_library(str(_library()))
        except OSError as error:
            reason = f"the kernels do not load: {error}"
    if reason is not None:
        warnings.warn(f"{reason}. {_REMEDY}", stacklevel=2)
    return reason


NOT_NATIVE_BECAUSE = load()
_IS_NATIVE = NOT_NATIVE_BECAUSE is None and _C is not None


class FixedList(list[Tensor]):
    """Tensors whose memory stays where it is for as long as the list exists."""

    @cached_property
    def packed(self) -> bytearray | None:
        return _packed(self)


def pack(lists: Iterable[list[Tensor]]) -> bytearray | None:
    """Lists of tensors as the kernels read them, during one call.

    None if there are no kernels, or for a tensor that its memory alone does not describe.
    """
    parts = [one.packed if isinstance(one, FixedList) else _packed(one) for one in lists]
    return None if None in parts else bytearray().join(parts)  # type: ignore[arg-type]


def _packed(tensors: list[Tensor]) -> bytearray | None:
    return _C.pack(tensors) if _IS_NATIVE else None


def are_as_before(
    entries: list[tuple[dict[str, Any], str, Any]], sizes: list[tuple[dict[str, Any], int]]
) -> bool:
    """Whether dictionaries have the same objects under these keys, and no others."""
    if _IS_NATIVE and not torch.compiler.is_compiling():
        as_before: bool = _C.are_as_before(entries, sizes)
        return as_before
    return all(owner.get(key) is value for owner, key, value in entries) and all(
        len(owner) == size for owner, size in sizes
    )


# The only place that says which kernels were verified where. `make gpu` updates the second line.
_VERIFIED = {
    "cpu": "run by every test",
    "cuda": (
        "compiled for sm_80, sm_90, sm_100 and sm_120, and run thread by thread on the host "
        "(tests/hardware/simt); never run on a GPU: `make gpu` is the test that is left"
    ),
}


def build_info() -> dict[str, Any]:
    """What was compiled, what runs, and how far that has been tested.

    Returns:
        A dictionary: ``version``, ``torch``, ``python``, ``platform``; ``native`` (whether the
        compiled kernels serve the operators) and, if not, ``reason``; ``simd`` (the instruction
        set of the CPU kernels on this machine); ``cuda_kernels`` and ``cuda_architectures``;
        ``compiler`` and ``built_with_torch``; ``verified`` (by device, how the developers have
        tested this version's kernels, which says nothing about this machine).
    """
    config: dict[str, str] = _C.build_config() if _C is not None else {}
    native = NOT_NATIVE_BECAUSE is None
    architectures = config.get("cuda_architectures", "")
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "native": native,
        "reason": NOT_NATIVE_BECAUSE,
        "simd": _C.simd_level() if _C is not None and native else None,
        "cuda_kernels": native and bool(architectures),
        "cuda_architectures": [arch for arch in architectures.split(";") if arch],
        "compiler": config.get("compiler"),
        "built_with_torch": config.get("built_with_torch"),
        "verified": dict(_VERIFIED),
    }
