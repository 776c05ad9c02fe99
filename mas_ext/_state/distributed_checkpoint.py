"""The state for torch.distributed.checkpoint: only tensors, and always the same ones.

That library pickles what is not a tensor, and loads only what already has a tensor to load into. So
settings are stored as the bytes of their JSON and counts as a matrix, and a parameter that has not
been measured has Ω = 0 and its present value as its anchor: a new MAS has room for everything that
a used one saves. Entries without a count are left out when the state is loaded. Ω in uint8 codes is
stored in float32, which can be sharded in any way; quantized again it gives the same codes. There
is no room for the references of a drift budget in a new MAS: loaded in place, they are left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mas_ext._drift.stored import without_references
from mas_ext._state.checkpoint import GROUPS, SCALES, TENSORS, StateDict, dequantized
from mas_ext.precision import stored_dtype

_PAGE = 4096  # bytes that settings are a multiple of, so that they seldom change their size
_ABOUT = "about"  # the JSON that says what the tensors of the references are
_TASKS, _SAMPLES = 0, 1  # columns of the counts
_COUNTED = {"tasks": _TASKS, "num_samples": _SAMPLES}


def packed(
    state: StateDict, unmeasured: Mapping[str, Tensor], adapted: Collection[str] = ()
) -> StateDict:
    """The state as tensors, with room for parameters that have not been measured."""
    state = dequantized(state, state["importance"])
    tensors = {group: dict(state[group]) for group in GROUPS}
    for name, p in unmeasured.items():
        if name not in adapted:
            tensors["anchor"][name] = p.detach().clone()
        tensors["importance"][name] = _zeros(p, state["state_dtype"])
    if state["merge"] == "sum_of_sums":
        for name, omega in tensors["importance"].items():
            tensors["earlier"].setdefault(name, torch.zeros_like(omega))
    settings = {k: v for k, v in state.items() if k not in (*TENSORS, *_COUNTED)}
    settings["control"] = without_references(state["control"])
    counts = _counts(state, _names(tensors))
    packed_state = {"settings": _bytes(settings), "counts": counts, **tensors}
    if state["adapters"]:
        packed_state["adapters"] = dict(state["adapters"])
    if state["references"]:
        packed_state["references"] = {**state["references"], _ABOUT: _bytes(state["control"])}
    return packed_state


def is_packed(state: Any) -> bool:
    """Whether :func:`packed` made it."""
    return isinstance(state, Mapping) and isinstance(state.get("settings"), Tensor)


def unpacked(state: Mapping[str, Any]) -> StateDict:
    """The state that :func:`packed` was given.

    Raises:
        ValueError: a part of it was not loaded, or it is damaged.
    """
    try:
        settings = json.loads(bytes(state["settings"].tolist()))
        names, counts = _names(state), state["counts"].tolist()
        known = {
            key: {n: row[column] for n, row in zip(names, counts, strict=True) if row[column] >= 0}
            for key, column in _COUNTED.items()
        }
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"the state is damaged: {error}; use another copy") from error
    groups = dict.fromkeys(GROUPS, known["tasks"]) | {"open": known["num_samples"]}
    _check_loaded(state, settings, groups)
    tensors = {g: {n: t for n, t in state[g].items() if n in groups[g]} for g in GROUPS}
    scales: StateDict = {group: {} for group in SCALES.values()}
    adapters = dict(state.get("adapters", {}))
    references = _references(state, settings)
    return {**settings, **known, **tensors, **scales, "adapters": adapters, **references}


def _references(state: Mapping[str, Any], settings: StateDict) -> StateDict:
    """The references of a drift budget, if all were loaded."""
    tensors = dict(state.get("references", {}))
    if (about := tensors.pop(_ABOUT, None)) is not None:
        control = json.loads(bytes(about.tolist()))
        if control["tensors"] == sorted(tensors):
            return {"control": control, "references": tensors}
    return {"control": settings.get("control", {}), "references": {}}


def _check_loaded(state: Mapping[str, Any], settings: StateDict, groups: StateDict) -> None:
    """Raises ValueError if loading in place has silently left something out for lack of room."""
    if any(name not in state["open"] for name in groups["open"]):
        raise ValueError(
            "the state was saved in the middle of a task, and there is no room for its sums; "
            "call update_importance() with one batch before you load: it makes room, and its sums "
            "are replaced"
        )
    earlier = settings.get("merge") == "sum_of_sums"
    if earlier and any(name not in state["earlier"] for name in groups["earlier"]):
        raise ValueError(
            "the state was merged by 'sum_of_sums', and there is no room for its earlier sums; "
            "load it into a MAS with merge='sum_of_sums'"
        )


def _names(tensors: Mapping[str, Any]) -> list[str]:
    return sorted({*tensors["importance"], *tensors["open"]})


def _zeros(p: Tensor, state_dtype: str) -> Tensor:
    """In the dtype that the parameter's Ω is packed in."""
    dtype = stored_dtype(p.dtype, state_dtype)
    dtype = torch.float32 if dtype == torch.uint8 else dtype
    return torch.zeros_like(p, dtype=dtype, requires_grad=False)


def _counts(state: StateDict, names: Iterable[str]) -> Tensor:
    """One row per parameter: how many tasks it was measured in, how many samples in this one."""
    rows = [[state[key].get(name, -1) for key in _COUNTED] for name in names]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, len(_COUNTED))


def _bytes(settings: StateDict) -> Tensor:
    text = json.dumps(settings).encode()
    text += b" " * (-len(text) % _PAGE)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
