"""Named tensors and settings in one safetensors file, with a checksum.

safetensors itself loads a flipped bit without an error, and its writer needs all tensors in memory
at once. This writer takes them one by one, so a state that is spread over devices or processes is
never in one place. safetensors is imported with the first file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mas_ext._storage.atomic_write import replacing

Settings = dict[str, Any]

DTYPES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNKNOWN = "0" * 64  # where the checksum will be
_DEPTH = 100  # of containers in settings; far more than anyone's batches have
# What safetensors, PyTorch and JSON raise where a file makes no sense, beside SafetensorError.
UNREADABLE = (LookupError, OSError, OverflowError, RuntimeError, TypeError, ValueError)


def write(
    path: str | os.PathLike[str],
    settings: Settings,
    tensors: Mapping[str, Tensor],
    fetch: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes a file atomically: a crash leaves the file that was there before.

    Args:
        settings: anything that JSON can represent.
        tensors: by name, on any device; copied to the CPU one by one, in the order of names.
        fetch: returns the tensor of a name, if ``tensors`` only have shapes and dtypes.
    """
    text = json.dumps(settings)
    digest = _Digest(text)
    header, places = _layout({"state": text, "sha256": _UNKNOWN}, tensors)
    with replacing(path) as file:
        _put(file, header, places, fetch or tensors.__getitem__, digest.add)
        _put_checksum(file, header, digest)


def write_model(
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    fetch: Callable[[str], Tensor],
) -> None:
    """Like :func:`write`, a file as other programs expect it: without settings and checksum."""
    header, places = _layout(metadata, tensors)
    with replacing(path) as file:
        _put(file, header, places, fetch)


def _put(
    file: BinaryIO,
    header: bytes,
    places: Mapping[str, int],
    fetch: Callable[[str], Tensor],
    written: Callable[[str, Tensor], None] = lambda name, tensor: None,
) -> None:
    """Writes the header and the tensors, in the order of names; reports each to ``written``."""
    file.write(header)
    for name in sorted(places):
        tensor = fetch(name).detach().cpu().contiguous()
        written(name, tensor)
        file.seek(len(header) + places[name])
        file.write(_content(tensor))


def read(
    path: str | os.PathLike[str], check: Callable[[Settings], None]
) -> tuple[Settings, dict[str, Tensor]]:
    """Reads what :func:`write` wrote.

    Args:
        check: called with the settings; raises if they are of another format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or altered, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    source = f"{os.fspath(path)!r}"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{source} does not exist or is not a file")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata["state"]
        settings = _settings(text)
        _check_dtypes(tensors)
    except (SafetensorError, *UNREADABLE) as error:
        raise ValueError(
            f"{source} cannot be read ({error}): it is truncated, corrupted, or not a mas_ext "
            "state; use another copy"
        ) from error
    check(settings)
    digest = _Digest(text)
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    if metadata.get("sha256") != digest.hex():
        raise ValueError(f"{source} is corrupted: its checksum does not match; use another copy")
    return settings, tensors


def _settings(text: str) -> Settings:
    """Settings from their JSON. Whoever walks through them need not fear how deep they are."""
    settings = json.loads(text)
    if not isinstance(settings, dict):
        raise ValueError("its settings are not an object")
    level: list[Any] = [settings]
    for _ in range(_DEPTH):
        level = [item for value in level for item in _items(value)]
    if level:
        raise ValueError("its settings are nested too deeply")
    return settings


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name!r} is {tensor.dtype}, which is never written")


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix/``, under the rest of their names."""
    start = f"{prefix}/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


class _Digest:
    """SHA-256 over the settings, then over every tensor in the order of names."""

    def __init__(self, text: str) -> None:
        self._hash = hashlib.sha256(text.encode())

    def add(self, name: str, tensor: Tensor) -> None:
        self._hash.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        self._hash.update(_content(tensor))

    def hex(self) -> str:
        return self._hash.hexdigest()


def _content(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _layout(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and each tensor's offset after it."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    places, end = {}, 0
    for name in _by_alignment(tensors):
        tensor = tensors[name]
        places[name], end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [places[name], end],
        }
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head, places


def _by_alignment(tensors: Mapping[str, Tensor]) -> Iterable[str]:
    """Widest dtype first, so that every tensor is aligned without gaps."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _put_checksum(file: BinaryIO, header: bytes, digest: _Digest) -> None:
    # The settings are JSON within JSON, in which a quote has a backslash before it.
    file.seek(header.index(f'"sha256":"{_UNKNOWN}"'.encode()) + len('"sha256":"'))
    file.write(digest.hex().encode())
