"""Named tensors and settings in one safetensors file, with a checksum over all of it.

safetensors itself loads a flipped bit without a word. Its own writer wants every tensor in memory
at once, and a copy of it; this one takes them one after another, so that a state that is spread
over devices or processes never has to be in one place. The libraries that files need are imported
with the first file: the package needs only torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mas_ext._state.atomic_write import replacing

Settings = dict[str, Any]

DTYPES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_UNKNOWN = "0" * 64  # where the checksum will be


def write(
    path: str | os.PathLike[str],
    settings: Settings,
    tensors: Mapping[str, Tensor],
    fetch: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes a file, all or nothing: a crash leaves what was there before.

    Args:
        settings: anything that JSON can say.
        tensors: by name, of any device; each is copied to memory when it is its turn, in the order
            of names.
        fetch: gives the tensor of a name, if ``tensors`` only have its shape and dtype.
    """
    text = json.dumps(settings)
    fetch = fetch or tensors.__getitem__
    header, places = _layout(text, tensors)
    digest = _Digest(text)
    with replacing(path) as file:
        file.write(header)
        for name in sorted(tensors):
            tensor = fetch(name).detach().cpu().contiguous()
            digest.add(name, tensor)
            file.seek(len(header) + places[name])
            file.write(_content(tensor))
        _put_checksum(file, header, digest)


def read(
    path: str | os.PathLike[str], check: Callable[[Settings], None]
) -> tuple[Settings, dict[str, Tensor]]:
    """Reads what :func:`write` wrote.

    Args:
        check: raises what is to be raised for settings of another format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, altered, or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    source = f"{os.fspath(path)!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{source} does not exist or is not a file")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata["state"]
        settings = json.loads(text)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{source} cannot be read ({error}): it is truncated, corrupted, or no mas_ext state; "
            "use another copy"
        ) from error
    check(settings)
    digest = _Digest(text)
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    if metadata.get("sha256") != digest.hex():
        raise ValueError(f"{source} is corrupted: its checksum does not match; use another copy")
    return settings, tensors


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix/``, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


class _Digest:
    """SHA-256 over the settings and then every tensor, in the names' order."""

    def __init__(self, text: str) -> None:
        self._hash = hashlib.sha256(text.encode())

    def add(self, name: str, tensor: Tensor) -> None:
        self._hash.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        self._hash.update(_content(tensor))

    def hex(self) -> str:
        return self._hash.hexdigest()


def _content(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _layout(text: str, tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where after it each tensor begins."""
    entries: dict[str, Any] = {"__metadata__": {"state": text, "sha256": _UNKNOWN}}
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
    """Widest dtype first, so that without gaps each tensor starts at a multiple of its own."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _put_checksum(file: BinaryIO, header: bytes, digest: _Digest) -> None:
    # The settings are JSON within JSON, in which a quote has a backslash before it.
    file.seek(header.index(f'"sha256":"{_UNKNOWN}"'.encode()) + len('"sha256":"'))
    file.write(digest.hex().encode())
