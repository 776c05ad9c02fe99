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
from mas_ext._distributed.shards import is_sharded
from mas_ext._operators.checks import is_dense
from mas_ext._storage import tensor_file
from mas_ext._storage.stored_numbers import are_finite, is_whole, restored
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
# 8: "pending" proximal steps.
VERSION = 8
GROUPS = ("importance", "anchor", "earlier", "open")
SCALES = {"importance": "importance_scales", "earlier": "earlier_scales"}
PER_PARAMETER = (*GROUPS, *SCALES.values())
TENSORS = (*PER_PARAMETER, "references", "adapters")
REDUCTIONS = ("", "abs", "square", "none")  # none: nothing was measured

StateDict = dict[str, Any]


def check_format(state: Mapping[str, Any], source: str) -> None:
    """Raises ValueError unless it is a state of this format and of a version this code reads."""
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise ValueError(f"{source} is not a mas_ext state; pass what state_dict() or save() made")
    version: Any = state.get("version")
    if not is_whole(version, 1) or version > VERSION:
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
        is_measured = state.get("anchor") or state.get("open")
        added |= {"method": "MAS", "reduction": "abs" if is_measured else ""}
    if state["version"] < 7:
        added |= {"adapters": {}}
    if state["version"] < 8:
        added |= {"pending": {}}
    return {**state, **added}


_CONTENTS: dict[str, Any] = {
    "lambda_reg": (int, float, str, Mapping),
    "drift": (int, float, Mapping),
    "energy": Mapping,
    "seen": Mapping,
    "control": Mapping,
    "pending": Mapping,
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
    """Raises ValueError if an entry is missing, or has a wrong type or an impossible value."""
    for key, kind in _CONTENTS.items():
        if not isinstance(state.get(key), kind):
            raise ValueError(f"the state is damaged: {key!r} is {state.get(key)!r}")
    _check_numbers(state)
    for group in TENSORS:
        for name, tensor in state[group].items():
            _check_tensor(group, name, tensor)
    counts = {"tasks": _held(state, state["tasks"]), "num_samples": state["open"].keys()}
    for key, names in counts.items():
        if state[key].keys() != names:
            raise ValueError(f"the state is damaged: {key!r} counts other parameters than it has")
    for group, key in SCALES.items():
        _check_scales(state[group], state[key], key)


def _check_numbers(state: Mapping[str, Any]) -> None:
    restored(OutputEnergy, state["energy"], "'energy'")
    restored(SampleStatistics, state["seen"], "'seen'")
    if not is_whole(state["num_tasks"]):
        raise ValueError(f"the state is damaged: 'num_tasks' is {state['num_tasks']!r}")
    if state["reduction"] not in REDUCTIONS:
        raise ValueError(f"the state is damaged: 'reduction' is {state['reduction']!r}")
    for name, tasks in state["tasks"].items():
        if not is_whole(tasks) or tasks > state["num_tasks"]:
            raise ValueError(
                f"the state is damaged: 'tasks' of {name!r} is {tasks!r}, and 'num_tasks' is "
                f"{state['num_tasks']}"
            )
    for name, samples in state["num_samples"].items():
        if not is_whole(samples, 1):
            raise ValueError(f"the state is damaged: 'num_samples' of {name!r} is {samples!r}")


def _check_tensor(group: str, name: str, tensor: Any) -> None:
    """Raises ValueError unless a tensor has values that it can have: Ω is finite and not < 0."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"the state is damaged: {group} of {name!r} is no tensor")
    if group == "references" or is_sharded(tensor) or tensor.is_meta:
        return
    is_code = tensor.dtype == torch.uint8 and group in SCALES
    if not (is_code or tensor.is_floating_point()):
        raise ValueError(f"the state is damaged: {group} of {name!r} is {tensor.dtype}")
    if not is_code and not are_finite(tensor, may_be_negative=group in ("anchor", "adapters")):
        raise ValueError(
            f"the state is damaged: {group} of {name!r} has NaN, Inf or negative numbers"
        )


def _held(state: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Whose θ* the state has; of weights with adapters, those among ``names``."""
    return state["anchor"].keys() | anchors.names(state["adapters"]).intersection(names)


def _check_scales(omega: Mapping[str, Tensor], scales: Mapping[str, Tensor], key: str) -> None:
    """Raises ValueError unless codes have the scales they need, and nothing else has any."""
    needed = {n: num_scales(o.numel()) for n, o in omega.items() if o.dtype == torch.uint8}
    found = {name: tensor.numel() for name, tensor in scales.items()}
    are_plain = all(s.dim() == 1 and s.dtype == torch.float32 for s in scales.values())
    if needed != found or not are_plain:
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
                f"the state has parameter {name!r}, which this model lacks; if it was measured "
                'with adapters="merged", pass that to MAS, too; otherwise pass strict=False to '
                "leave the parameter out"
            )
        if tensor.shape != named[name].shape:
            raise ValueError(
                f"parameter {name!r} has shape {list(named[name].shape)} in this model and "
                f"{list(tensor.shape)} in the state; load before the model grows, or load the "
                "state of this model"
            )
    held = _held(state, importance)
    if not importance.keys() == held == state["tasks"].keys() or (
        earlier and earlier.keys() != held
    ):
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
    """Reads what :func:`write` wrote, as the present version would have written it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, altered, damaged, of another format or of a future version.
    """
    source = f"{os.fspath(path)!r}"
    settings, tensors = tensor_file.read(path, lambda settings: check_format(settings, source))
    try:
        _lay_out(tensors, settings.pop("strides", {}))
        groups = {group: tensor_file.under(group, tensors) for group in TENSORS}
        state = upgraded({**settings, **groups})
        check_contents(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}; use another copy") from error
    return {**state}


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


def _lay_out(tensors: dict[str, Tensor], strides: Any) -> None:
    """Gives tensors their strides back; raises ValueError if they cannot have had them."""
    if not isinstance(strides, Mapping):
        raise ValueError(f"the state is damaged: 'strides' is {strides!r}")
    for key, stride in strides.items():
        tensor = tensors.get(key)
        fits = isinstance(stride, list) and all(map(is_whole, stride))
        if tensor is None or not fits or len(stride) != tensor.dim():
            raise ValueError(f"the state is damaged: 'strides' of {key!r} is {stride!r}")
        # On the meta device first: there, strides that lead out of the memory do no harm.
        if not is_dense(torch.empty_strided(tensor.shape, stride, device="meta")):
            raise ValueError(f"the state is damaged: 'strides' of {key!r} is {stride!r}")
        tensors[key] = tensor.as_strided(tensor.shape, stride)
