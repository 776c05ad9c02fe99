"""The format of a state: checks of a state dictionary, and how it is written to a file.

A file is safetensors: tensors ``importance/NAME``, ``anchor/NAME``, ``earlier/NAME`` and
``open/NAME`` (the sums of the task that has not ended); ``importance_scales/NAME`` where Ω is
stored as uint8 codes; ``references/NAME`` of a drift budget (``_drift/stored.py``);
``adapters/NAME/...`` of weights that are trained through adapters, which have no ``anchor/NAME``
(``_adapters/anchors.py``); everything else as JSON in the metadata (``tensor_file.py``).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mas_ext._adapters import anchors
from mas_ext._adapters.lora import AdaptedWeight
from mas_ext._distributed.gathering import write_once
from mas_ext._storage import tensor_file
from mas_ext._strength.auto import DEFAULT_DRIFT, OutputEnergy
from mas_ext.importance.estimation import SampleStatistics
from mas_ext.precision import dequantize, in_memory_order, num_scales

FORMAT = "mas_ext"
# 2: open tasks weighted by batches, and "earlier" for the merge that needs it.
# 3: Ω in other dtypes than float32, and λ by name.
# 4: "drift", and "energy" and "seen" that λ is found from.
# 5: "control" and "references" of a drift budget.
# 6: "method" and "reduction".
# 7: "adapters".
VERSION = 7
GROUPS = ("importance", "anchor", "earlier", "open")
SCALES = {"importance": "importance_scales", "earlier": "earlier_scales"}
PER_PARAMETER = (*GROUPS, *SCALES.values())
TENSORS = (*PER_PARAMETER, "references", "adapters")

StateDict = dict[str, Any]


def check_format(state: Mapping[str, Any], source: str) -> None:
    """Raises ValueError unless it is a state of this format and of a version this code reads."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise ValueError(f"{source} is not a mas_ext state; pass what state_dict() or save() made")
    version = state.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ValueError(
            f"{source} has format version {version!r} and this mas_ext reads up to {VERSION}; "
            "install a newer mas_ext"
        )


def upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state as the present version would have written it."""
    added: StateDict = {}
    if state["version"] < 2:
        added |= {"weighting": "samples", "earlier": {}}
    if state["version"] < 3:
        added |= {scales: {} for scales in SCALES.values()}
    if state["version"] < 4:
        added |= {
            "drift": DEFAULT_DRIFT,
            "energy": asdict(OutputEnergy()),
            "seen": asdict(SampleStatistics()),
        }
    if state["version"] < 5:
        added |= {"control": {}, "references": {}}
    if state["version"] < 6:
        added |= {"method": "MAS", "reduction": "abs" if state["anchor"] or state["open"] else ""}
    if state["version"] < 7:
        added |= {"adapters": {}}
    return {**state, **added}


_CONTENTS: dict[str, Any] = {
    "lambda_reg": (int, float, str, Mapping),
    "drift": (int, float, Mapping),
    "energy": Mapping,
    "seen": Mapping,
    "control": Mapping,
    "state_dtype": str,
    "merge": (str, tuple, list),
    "num_tasks": int,
    "method": str,
    "reduction": str,
    "tasks": Mapping,
    "num_samples": Mapping,
    "weighting": str,
    **dict.fromkeys(TENSORS, Mapping),
}


def check_contents(state: Mapping[str, Any]) -> None:
    """Raises ValueError if an entry is missing or has the wrong type."""
    for key, kind in _CONTENTS.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"the state is damaged: {key!r} is {state.get(key)!r}")
    counts = {"tasks": _held(state, state["tasks"]), "num_samples": state["open"].keys()}
    for key, names in counts.items():
        if state[key].keys() != names:
            raise ValueError(f"the state is damaged: {key!r} counts other parameters than it has")
    for group, key in SCALES.items():
        _check_scales(state[group], state[key], key)


def _held(state: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Whose θ* the state has; of weights with adapters, those among ``names``."""
    return state["anchor"].keys() | anchors.names(state["adapters"]).intersection(names)


def _check_scales(omega: Mapping[str, Tensor], scales: Mapping[str, Tensor], key: str) -> None:
    """Raises ValueError unless codes have the scales they need, and nothing else has any."""
    needed = {n: num_scales(o.numel()) for n, o in omega.items() if o.dtype == torch.uint8}
    found = {name: tensor.numel() for name, tensor in scales.items()}
    if needed != found:
        raise ValueError(f"the state is damaged: {key!r} does not belong to its codes")


def known_parameters(state: Mapping[str, Any], named: Mapping[str, Tensor]) -> StateDict:
    """The state without the parameters that the model lacks."""
    per_parameter = (*PER_PARAMETER, "tasks", "num_samples")
    known = {k: {n: v for n, v in state[k].items() if n in named} for k in per_parameter}
    return {**state, **known}


def dequantized(state: Mapping[str, Any], names: Iterable[str]) -> StateDict:
    """The state with these parameters' Ω in float32 instead of uint8 codes.

    Blocks of codes end where a shard ends, so other shards cannot be cut out of them.
    """
    changed: StateDict = {}
    for group, key in SCALES.items():
        omega, scales = dict(state[group]), dict(state[key])
        for name in set(names) & scales.keys():
            omega[name] = dequantize(omega[name], scales.pop(name))
        changed |= {group: omega, key: scales}
    return {**state, **changed}


@torch.no_grad()
def with_anchors_of_base(
    state: Mapping[str, Any],
    named: Mapping[str, Tensor],
    adapted: Mapping[str, AdaptedWeight],
) -> StateDict:
    """The state with θ* where this model needs it, if the model is the base it was measured with.

    Weights that are trained through adapters need none. Without adapters, θ* of those that were is
    the model itself.

    Raises:
        ValueError: it is another base.
    """
    kept = dict(state["anchor"])
    for name, one in adapted.items():
        if (anchor := kept.pop(name, None)) is not None:
            anchors.check_base(name, anchors.fingerprint(one), anchors.elements(anchor))
    for name in state["importance"].keys() - state["anchor"].keys() - adapted.keys():
        if name in named:
            anchors.check_without_adapters(state["adapters"], name, named[name])
            kept[name] = named[name].detach()
    return {**state, "anchor": kept}


def check_parameters(
    state: Mapping[str, Any],
    named: Mapping[str, Tensor],
    selected: Iterable[str],
    strict: bool,
) -> None:
    """Raises ValueError if the state is of another model.

    Args:
        state: a state dictionary whose contents have been checked.
        named: the model's parameters.
        selected: the names of those that the MAS protects.
        strict: whether the state must have all of ``selected``, unless it has none.
    """
    importance, earlier, in_progress = (state[g] for g in ("importance", "earlier", "open"))
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
    held = _held(state, importance)
    if importance.keys() != held or (earlier and earlier.keys() != held):
        raise ValueError(
            "the state is damaged: importance, anchor and earlier name other parameters"
        )
    known = importance.keys() | in_progress.keys()
    missing = [name for name in selected if name not in known]
    if strict and known and missing:
        raise ValueError(
            f"the state lacks parameter {missing[0]!r} ({len(missing)} in all), which is "
            "selected in this model; pass strict=False if it is new"
        )


def write(state: StateDict, path: str | os.PathLike[str]) -> None:
    """Writes a state to ``path`` atomically: a crash leaves the file that was there before.

    With DTensors all processes must call this; one of them writes.
    """
    settings = {key: value for key, value in state.items() if key not in TENSORS}
    settings["strides"] = _strides(state)
    tensors = {f"{g}/{n}": _written(t) for g in TENSORS for n, t in state[g].items()}
    write_once(tensors, lambda fetch: tensor_file.write(path, settings, tensors, fetch))


def read(path: str | os.PathLike[str]) -> StateDict:
    """Reads what :func:`write` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, altered, of another format or of a future version.
    """
    source = f"{os.fspath(path)!r}"
    settings, tensors = tensor_file.read(path, lambda settings: check_format(settings, source))
    for key, stride in settings.pop("strides", {}).items():
        tensors[key] = _laid_out(tensors[key], stride)
    return {**settings, **{group: tensor_file.under(group, tensors) for group in TENSORS}}


# A file holds contiguous tensors, and blocks of codes follow the order in memory. So codes with
# other strides are written as if they were contiguous, and get their strides back when read.
def _written(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.uint8:
        return tensor
    return in_memory_order(tensor).view(tensor.shape)


def _strides(state: StateDict) -> dict[str, list[int]]:
    return {
        f"{group}/{name}": list(tensor.stride())
        for group in SCALES
        for name, tensor in state[group].items()
        if tensor.dtype == torch.uint8 and not tensor.is_contiguous()
    }


def _laid_out(tensor: Tensor, stride: list[int]) -> Tensor:
    return tensor.as_strided(tensor.shape, stride)
