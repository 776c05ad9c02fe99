"""Merges models that share an ancestor: their average, weighted by the importance of each.

This merges parameters. How the importance of several *tasks* is merged is the ``merge=`` of
:class:`mas_ext.MAS`.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mas_ext._distributed.shards import is_sharded
from mas_ext._parameters import canonical_name, wrapping_modules
from mas_ext._state import checkpoint
from mas_ext._storage import model_files, tensor_file
from mas_ext._warnings import warn
from mas_ext.precision import accumulation_dtype, dequantize

Path = str | os.PathLike[str]
Model = nn.Module | Mapping[str, Any] | Path
ModelImportance = Mapping[str, Tensor] | Path


@overload
def merge(
    models: Sequence[Model],
    importances: Sequence[ModelImportance],
    *,
    weights: Sequence[float] | None = None,
    out: None = None,
) -> dict[str, Any]: ...


@overload
def merge(
    models: Sequence[Model],
    importances: Sequence[ModelImportance],
    *,
    weights: Sequence[float] | None = None,
    out: Path,
) -> None: ...


@torch.no_grad()
def merge(
    models: Sequence[Model],
    importances: Sequence[ModelImportance],
    *,
    weights: Sequence[float] | None = None,
    out: Path | None = None,
) -> dict[str, Any] | None:
    r"""The average of models that share an ancestor, weighted by importance, element by element.

    .. math:: \theta_i = \frac{\sum_m w_m \Omega_{mi}\,\theta_{mi}}{\sum_m w_m \Omega_{mi}}

    With the Fisher information as Ω (``criterion="fisher", reduction="square"``) this is Fisher
    merging. Where no model finds an element important (the denominator is 0), the result is the
    average without Ω, :math:`\sum_m w_m \theta_{mi} / \sum_m w_m`. So are all elements of

    - buffers, and parameters without an Ω in every model (pass ``{}`` for a model that was not
      measured);
    - parameters that have an Ω in some models only, with a warning: an Ω of 0 for the other models
      would discard what they learned.

    Integers and booleans count or select something, so they are not averaged. One that is alone in
    its tensor, such as ``num_batches_tracked``, is the first model's; longer ones must be equal in
    all models. This holds for complex numbers and for float8, which stores codes, too.

    The result has the names of the first model's state dictionary (also its ``module.`` and the
    like), its dtypes, and its devices, and can be loaded into it. Sums are float32, or float64 for
    float64 parameters. An element that all models have in common keeps its bits. Names that share
    one tensor, in any of the models, get the same values.

    Args:
        models: each a module; a state dictionary; a safetensors file, or a folder that
            ``save_pretrained`` wrote. Files are merged tensor by tensor, so none of the models has
            to fit in memory.
        importances: Ω of each model: a mapping from parameter name to Ω, such as what
            :func:`mas_ext.estimate_importance` returns or ``mas.importance``; or a file that
            ``save`` of :class:`mas_ext.MAS` or :class:`mas_ext.EWC` wrote.
        weights: w ≥ 0, one number per model. None: all are equal.
        out: a safetensors file to write, tensor by tensor. It is replaced in one step, when it is
            complete.

    Returns:
        A new state dictionary, or None with ``out``.

    Raises:
        ValueError: the models or their Ω do not fit together, a weight or an Ω is negative or not
            finite, or a file is damaged. Nothing is written.
        TypeError: a model, an Ω or a weight is something else.

    Source: Matena & Raffel, *Merging models with Fisher-weighted averaging*, NeurIPS 2022,
    https://arxiv.org/abs/2111.09832.
    """
    if out is not None and not os.path.isdir(os.path.dirname(os.path.abspath(out))):
        raise ValueError(f"out: the folder of {os.fspath(out)!r} does not exist; make it first")
    merging = _Merging(_sources(models, importances, weights))
    if out is None:
        return merging.state_dict()
    merging.write(out)
    return None


# -- What is merged --------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Source:
    """A model, its Ω and its weight.

    Attributes:
        label: what messages call it.
        entries: its state dictionary.
        keys: parameter or buffer name → its key in ``entries``; without what is no tensor.
        twins: pairs of names that share one tensor.
        omega: name → Ω.
        reduction: how gradients count in it, if its file says so.
        weight: w, of which the largest of all models' is 1.
        metadata: of its file.
    """

    label: str
    entries: Mapping[str, Any]
    keys: Mapping[str, str]
    twins: Sequence[tuple[str, str]]
    omega: Mapping[str, Tensor]
    reduction: str
    weight: float
    metadata: Mapping[str, str]

    def first_of(self, names: Iterable[str]) -> Tensor:
        """The tensor of the first of these names that the model has."""
        return next(self.entries[self.keys[name]] for name in names if name in self.keys)

    def is_measured(self, names: Iterable[str]) -> bool:
        """Whether there is an Ω under one of these names."""
        return any(name in self.omega for name in names)

    def omega_of(self, names: Iterable[str], theta: Tensor) -> Tensor:
        """Ω of the parameter with these names, in its device and dtype, and checked."""
        name = next(name for name in names if name in self.omega)
        omega = self.omega[name]
        if not isinstance(omega, Tensor) or omega.shape != theta.shape:
            found = list(omega.shape) if isinstance(omega, Tensor) else type(omega).__name__
            raise ValueError(
                f"the importance of parameter {name!r} of {self.label} has shape {found}, and the "
                f"parameter has {list(theta.shape)}; measure this model"
            )
        _check_readable(omega, f"the importance of {name!r} of {self.label}")
        omega = omega.detach().to(theta.device, theta.dtype)
        if not (omega >= 0).all() or not torch.isfinite(omega).all():
            raise ValueError(
                f"the importance of parameter {name!r} of {self.label} is negative or not finite; "
                "measure it again, or leave it out to average this parameter without importance"
            )
        return omega


def _sources(models: Any, importances: Any, weights: Any) -> list[_Source]:
    models, importances = _listed(models, "models"), _listed(importances, "importances")
    if not models:
        raise ValueError("models is empty; pass the models to merge")
    if len(importances) != len(models):
        raise ValueError(
            f"there are {len(models)} models and {len(importances)} importances; pass one for each "
            "model, {} if it was not measured"
        )
    sources = [
        _source(_label("model", i, model), model, _label("importance", i, omega), omega, weight)
        for i, (model, omega, weight) in enumerate(
            zip(models, importances, _checked_weights(weights, len(models)), strict=True)
        )
    ]
    if len(reductions := {source.reduction for source in sources} - {""}) > 1:
        raise ValueError(
            f"importances: they were measured with the reductions {sorted(reductions)}, whose "
            "sizes cannot be compared; measure all models in the same way"
        )
    return sources


def _listed(values: Any, what: str) -> list[Any]:
    if isinstance(values, (str, os.PathLike, Mapping, nn.Module)) or not isinstance(
        values, Iterable
    ):
        raise TypeError(f"{what} is a {type(values).__name__}; pass a list with one per model")
    return list(values)


def _checked_weights(weights: Any, count: int) -> list[float]:
    """The weights, of which the largest is 1."""
    weights = [1.0] * count if weights is None else _listed(weights, "weights")
    if not all(isinstance(weight, Real) for weight in weights):
        raise TypeError(f"weights: {weights!r} must be numbers, one per model")
    if len(weights) != count:
        raise ValueError(f"there are {count} models and {len(weights)} weights; pass one for each")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights: {weights!r} must be finite, not negative, and not all zero")
    return [float(weight / max(weights)) for weight in weights]


def _label(what: str, index: int, value: Any) -> str:
    is_path = isinstance(value, (str, os.PathLike))
    return f"{what} {os.fspath(value)!r}" if is_path else f"{what} {index}"


def _source(label: str, model: Any, omega_label: str, omega: Any, weight: float) -> _Source:
    modules, metadata, left_out = 0, {}, {}
    if isinstance(model, nn.Module):
        entries, modules = model.state_dict(), wrapping_modules(model)
    elif isinstance(model, Mapping):
        entries = dict(model)
    elif isinstance(model, (str, os.PathLike)):
        file = model_files.read(model)
        entries, metadata, left_out = file.tensors, file.metadata, file.left_out
    else:
        raise TypeError(
            f"{label} is a {type(model).__name__}; pass a module, a state dictionary, or the path "
            "of a safetensors file"
        )
    measured, reduction = _importance(omega_label, omega)
    modules = modules or _modules_left(entries, measured)
    keys = {canonical_name(k, modules): k for k, e in entries.items() if isinstance(e, Tensor)}
    for name, key in keys.items():
        _check_readable(entries[key], f"{name!r} of {label}")
    stored = [(canonical_name(a, modules), canonical_name(b, modules)) for a, b in left_out.items()]
    twins = [*stored, *_same_memory({name: entries[key] for name, key in keys.items()})]
    return _Source(label, entries, keys, twins, measured, reduction, weight, metadata)


def _modules_left(entries: Mapping[str, Any], omega: Mapping[str, Tensor]) -> int:
    """How many ``module.`` a state dictionary's names begin with that those of its Ω do not."""
    names = [canonical_name(key) for key in entries]
    if any(name in omega for name in names):
        return 0
    return int(any(name.removeprefix("module.") in omega for name in names))


def _importance(label: str, omega: Any) -> tuple[Mapping[str, Tensor], str]:
    """Ω by name, and how gradients count in it if that is known."""
    if isinstance(omega, Mapping):
        return omega, ""
    if not isinstance(omega, (str, os.PathLike)):
        raise TypeError(
            f"{label} is a {type(omega).__name__}; pass a mapping from parameter name to "
            "importance, such as mas.importance, or the path of a file that mas.save() wrote"
        )
    state = checkpoint.read(omega)
    if not state["importance"]:
        raise ValueError(f"{label} has none yet; save after consolidate()")
    return _Dequantized(state["importance"], state["importance_scales"]), state["reduction"]


class _Dequantized(Mapping[str, Tensor]):
    """Ω by name; each is brought from its codes, if it has any, when it is asked for."""

    def __init__(self, stored: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
        self._stored, self._scales = stored, scales

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        return dequantize(stored, self._scales[name]) if name in self._scales else stored

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Any:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _check_readable(tensor: Tensor, what: str) -> None:
    """Raises ValueError unless a tensor has all its values, in plain memory."""
    if is_sharded(tensor):
        raise ValueError(
            f"{what} is a DTensor; pass full state dictionaries, such as those of "
            "torch.distributed.checkpoint.state_dict with full_state_dict=True"
        )
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(
            f"{what} has no values, or not as a dense tensor; load or convert it, or leave it out "
            "of the state dictionaries"
        )


def _same_memory(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Pairs of names whose tensors are the same memory, such as tied weights."""
    first: dict[Any, str] = {}
    twins = []
    for name, t in tensors.items():
        if t.numel():
            place = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride())
            twins.append((first.setdefault(place, name), name))
    return [(a, b) for a, b in twins if a != b]


# -- How they fit together -------------------------------------------------------------------------
Names = list[str]  # of one tensor


def _united(sources: Sequence[_Source]) -> list[Names]:
    """The names of every tensor, of all models; several if they share it in any of them."""
    groups = {name: [name] for source in sources for name in source.keys}
    for a, b in (twins for source in sources for twins in source.twins):
        one, other = groups.setdefault(a, [a]), groups.setdefault(b, [b])
        if one is not other:
            one += other
            groups.update(dict.fromkeys(other, one))
    return list({id(names): names for names in groups.values()}.values())


def _check_fit(names: Names, sources: Sequence[_Source]) -> None:
    """Raises ValueError unless all models have this tensor, in the same shape and dtype."""
    for source in sources:
        if not any(name in source.keys for name in names):
            raise ValueError(
                f"{source.label} has no {names[0]!r}, which another model has; merge models of the "
                "same architecture, or leave it out of the state dictionaries"
            )
        found, expected = source.first_of(names), sources[0].first_of(names)
        for what, a, b in [
            ("shape", list(found.shape), list(expected.shape)),
            ("dtype", found.dtype, expected.dtype),
        ]:
            if a != b:
                raise ValueError(
                    f"{names[0]!r} has {what} {a} in {source.label} and {b} in {sources[0].label}; "
                    "convert the models, or leave it out of the state dictionaries"
                )
        _check_twins(names, source)


def _check_twins(names: Names, source: _Source) -> None:
    """Raises ValueError if names that share a tensor elsewhere have other values here."""
    first = source.first_of(names)
    for name in [name for name in names if name in source.keys]:
        tensor = source.entries[source.keys[name]]
        if tensor.data_ptr() != first.data_ptr() and not torch.equal(tensor, first):
            raise ValueError(
                f"{name!r} and {names[0]!r} are tied in one model and differ in {source.label}; "
                "tie them in all models or in none (clone() them in the state dictionaries)"
            )


def _check_names_of_omega(sources: Sequence[_Source], known: set[str]) -> None:
    for source in sources:
        for name in source.omega:
            if name not in known:
                raise ValueError(
                    f"there is an importance of parameter {name!r}, which {source.label} lacks; "
                    "pass the importance of this model, under the model's names"
                )


class _Merging:
    """Models that fit together, and the tensors of the model that they become."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        groups = _united(sources)
        for names in groups:
            _check_fit(names, sources)
        self._names = {name: names for names in groups for name in names}
        _check_names_of_omega(sources, set(self._names))
        self._first = sources[0]
        self._counted = [source for source in sources if source.weight > 0]
        self._warn_partly_measured(groups)

    def _warn_partly_measured(self, groups: Sequence[Names]) -> None:
        counts = {names[0]: sum(s.is_measured(names) for s in self._counted) for names in groups}
        partly = [name for name, count in counts.items() if 0 < count < len(self._counted)]
        if partly:
            others = f" and {len(partly) - 1} more" if len(partly) > 1 else ""
            warn(
                f"the importance of {partly[0]!r}{others} is known for some of the models only, so "
                "it is averaged without importance; measure it in all models, with the same "
                "params= and requires_grad"
            )

    def state_dict(self) -> dict[str, Any]:
        """The merged model, under the keys of the first. Tied names share one tensor."""
        merged: dict[int, Tensor] = {}
        keys = {key: self._names[name] for name, key in self._first.keys.items()}
        result: dict[str, Any] = {}
        for key, entry in self._first.entries.items():
            if key not in keys:
                result[key] = copy.deepcopy(entry)
                continue
            names = keys[key]
            if id(names) not in merged:
                merged[id(names)] = self._merged(names)
            result[key] = merged[id(names)]
        return result

    def write(self, path: Path) -> None:
        """Writes the merged model, one tensor at a time."""
        for key, entry in self._first.entries.items():
            if not isinstance(entry, Tensor) or entry.dtype not in tensor_file.DTYPES:
                kind = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
                raise TypeError(
                    f"{key!r} of {self._first.label} is {kind}, which cannot be written; call "
                    "merge() without out= and save the state dictionary that it returns"
                )
        names = {key: self._names[name] for name, key in self._first.keys.items()}
        tensor_file.write_model(
            path,
            {"format": "pt", **self._first.metadata},
            self._first.entries,
            lambda key: self._merged(names[key]),
        )

    def _merged(self, names: Names) -> Tensor:
        like = self._first.first_of(names)
        if not _is_averaged(like.dtype):
            return self._common(names, like)
        average, weighted = _Mean(), _Mean()
        is_measured = all(source.is_measured(names) for source in self._counted)
        for source in self._counted:
            theta = source.first_of(names).detach().to(like.device, accumulation_dtype(like.dtype))
            average.add(theta, theta.new_tensor(source.weight))
            if is_measured:
                weighted.add(theta, source.omega_of(names, theta) * source.weight)
        mean = average.mean
        if is_measured:
            mean = torch.where(weighted.total > 0, weighted.mean, mean)
        return mean.to(like.dtype, copy=True)

    def _common(self, names: Names, like: Tensor) -> Tensor:
        """A tensor that cannot be averaged: the first model's."""
        for source in self._counted:
            other = source.first_of(names).to(like.device)
            if like.numel() > 1 and not torch.equal(_bytes(like), _bytes(other)):
                raise ValueError(
                    f"{names[0]!r} is {like.dtype}, which cannot be averaged, and differs in "
                    f"{source.label}; convert quantized weights to floating point first, or make "
                    "it equal in all models"
                )
        return like.detach().clone()


# -- The mean --------------------------------------------------------------------------------------
class _Mean:
    """A weighted mean of tensors, element by element, that takes one tensor at a time.

    It moves from the mean so far towards each new tensor by the share of its weight in the total.
    So where all are equal, nothing moves, and where only one has a weight, the mean is that one, to
    the bit. Until an element has a weight, its mean is without meaning.
    """

    def __init__(self) -> None:
        self.mean = self.total = torch.zeros(())
        self._is_empty = True

    def add(self, value: Tensor, weight: Tensor) -> None:
        if self._is_empty:
            self.mean, self.total, self._is_empty = value, weight, False
            return
        self.total = self.total + weight
        share = (weight / self.total).nan_to_num_(0)  # 0/0
        moved = torch.lerp(self.mean, value, share)
        self.mean = torch.where(value == self.mean, self.mean, moved)  # also -0.0 and Inf


def _is_averaged(dtype: torch.dtype) -> bool:
    """Whether these are numbers that can be averaged, and not codes or counts."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
