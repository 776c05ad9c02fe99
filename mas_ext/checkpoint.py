"""The state as a dictionary and as a file: named, versioned, checksummed, written atomically.

A file is safetensors: tensors ``importance/NAME``, ``anchor/NAME``, ``earlier/NAME`` and
``open/NAME``, everything else as JSON in the metadata, with a SHA-256 over all of it (safetensors
itself loads a flipped bit without a word). The libraries that files need are imported with the
first file: everything else here needs only torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "mas_ext"
# 2: open tasks weighted by batches, and "earlier" for the merge that needs it.
VERSION = 2
GROUPS = ("importance", "anchor", "earlier", "open")

StateDict = dict[str, Any]


def check_format(state: Mapping[str, Any], source: str) -> None:
    """A state dictionary of this format and of a version that this code can read."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise ValueError(f"{source} is not a mas_ext state; pass what state_dict() or save() made")
    version = state.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(
            f"{source} has format version {version!r} and this mas_ext reads up to {VERSION}; "
            "install a newer mas_ext"
        )


def upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state as this version would have written it."""
    return state if state["version"] > 1 else {**state, "weighting": "samples", "earlier": {}}


_CONTENTS: dict[str, Any] = {
    "lambda_reg": (int, float),
    "merge": (str, tuple, list),
    "num_tasks": int,
    "tasks": Mapping,
    "num_samples": Mapping,
    "weighting": str,
    **dict.fromkeys(GROUPS, Mapping),
}


def check_contents(state: Mapping[str, Any]) -> None:
    """Everything is there, and of its kind."""
    for key, kind in _CONTENTS.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"the state is damaged: {key!r} is {state.get(key)!r}")
    counts = {"tasks": state["anchor"], "num_samples": state["open"]}
    for key, tensors in counts.items():
        if state[key].keys() != tensors.keys():
            raise ValueError(f"the state is damaged: {key!r} counts other parameters than it has")


def known_parameters(state: Mapping[str, Any], named: Mapping[str, Tensor]) -> StateDict:
    """The state without the parameters that the model lacks."""
    per_parameter = (*GROUPS, "tasks", "num_samples")
    known = {k: {n: v for n, v in state[k].items() if n in named} for k in per_parameter}
    return {**state, **known}


def check_parameters(
    state: Mapping[str, Any],
    named: Mapping[str, Tensor],
    selected: Iterable[str],
    strict: bool,
) -> None:
    """A state of this model: ``named`` its parameters, ``selected`` the names that MAS is about."""
    importance, anchor, earlier, in_progress = (state[group] for group in GROUPS)
    for name, tensor in [item for group in GROUPS for item in state[group].items()]:
        if name not in named:
            raise ValueError(
                f"the state has parameter {name!r}, which this model lacks; pass strict=False to "
                "leave it out"
            )
        if tensor.shape != named[name].shape:
            raise ValueError(
                f"parameter {name!r} has shape {list(named[name].shape)} in this model and "
                f"{list(tensor.shape)} in the state; load before the model grows"
            )
    if importance.keys() != anchor.keys() or (earlier and earlier.keys() != anchor.keys()):
        raise ValueError(
            "the state is damaged: importance, anchor and earlier name other parameters"
        )
    known = anchor.keys() | in_progress.keys()
    missing = [name for name in selected if name not in known]
    if strict and known and missing:
        raise ValueError(
            f"the state lacks parameter {missing[0]!r} ({len(missing)} in all), which is "
            "selected in this model; pass strict=False if it is new"
        )


def write(state: StateDict, path: str | os.PathLike[str]) -> None:
    """Writes a state to ``path``, all or nothing: a crash leaves what was there before."""
    from safetensors.torch import save

    target = Path(path).resolve()  # a link stays one
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group in GROUPS
        for name, tensor in state[group].items()
    }
    settings = json.dumps({k: v for k, v in state.items() if k not in GROUPS}, sort_keys=True)
    metadata = {"state": settings, "sha256": _digest(settings, tensors)}
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read(path: str | os.PathLike[str]) -> StateDict:
    """Reads what :func:`write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, altered, of another format or of a future version.
    """
    from safetensors import SafetensorError, safe_open

    source = f"{os.fspath(path)!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{source} does not exist or is not a file")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings = metadata["state"]
        state = json.loads(settings)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{source} cannot be read ({error}): it is truncated, corrupted, or no mas_ext state; "
            "use another copy"
        ) from error
    check_format(state, source)
    if metadata.get("sha256") != _digest(settings, tensors):
        raise ValueError(f"{source} is corrupted: its checksum does not match; use another copy")
    return {**state, **{group: _group(tensors, group) for group in GROUPS}}


def _group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    prefix = f"{group}/"
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _digest(settings: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(settings.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"\0{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Makes the new name itself survive a power cut; not every system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
