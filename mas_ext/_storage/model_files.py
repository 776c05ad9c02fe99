"""A model's tensors in safetensors files, as safetensors and Hugging Face libraries write them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mas_ext._storage.tensor_file import UNREADABLE

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFile:
    """What :func:`read` found.

    Attributes:
        tensors: by name, on the CPU. They are mapped from the files: the system reads what is used,
            when it is used.
        metadata: of the file, or of the first of several.
        left_out: names that were left out because their tensor is stored under another name → that
            name. ``safetensors.torch.save_model`` writes this down.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    left_out: dict[str, str]


def read(path: str | os.PathLike[str]) -> ModelFile:
    """Reads a safetensors file, or a folder that ``save_pretrained`` wrote, of one or many files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, or another kind of file.
    """
    files = _files(Path(path))
    read_files = [_read_file(file) for file in files]
    for (found, _), (file, listed) in zip(read_files, files.items(), strict=True):
        _check_has(file, found, listed)
    tensors = {name: t for found, _ in read_files for name, t in found.items()}
    metadata = {key: text for _, found in reversed(read_files) for key, text in found.items()}
    left_out = {k: v for k, v in metadata.items() if v in tensors and k not in tensors}
    return ModelFile(tensors, metadata, left_out)


def _files(path: Path) -> dict[Path, list[str]]:
    """The files of a model, each with the tensors that an index says it has."""
    if not path.is_dir():
        return {path: []}
    if (path / _INDEX).is_file() and not (path / _WHOLE).is_file():
        return {path / name: listed for name, listed in _indexed(path / _INDEX).items()}
    return {path / _WHOLE: []}


def _indexed(path: Path) -> dict[str, list[str]]:
    """The names of the files that an index lists, all in its own folder, and of their tensors."""
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{outside[0]!r} is not in its folder")
        return {name: [key for key, file in weight_map.items() if file == name] for name in names}
    except (AttributeError, *UNREADABLE) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is not the index of a model in several files ({error}); use "
            "another copy"
        ) from error


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    source = f"{os.fspath(path)!r}"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{source} does not exist or is not a file")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, *UNREADABLE) as error:
        raise ValueError(
            f"{source} cannot be read ({error}): it is truncated or not a safetensors file; use "
            "another copy, or pass the state dictionary that torch.load() returns"
        ) from error


def _check_has(path: Path, tensors: dict[str, Tensor], listed: list[str]) -> None:
    if missing := [name for name in listed if name not in tensors]:
        raise ValueError(
            f"{os.fspath(path)!r} has no {missing[0]!r}, which the index of its folder says it "
            "has; use another copy of the folder"
        )
