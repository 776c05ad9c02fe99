"""References and controller as JSON and named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mas_ext._drift.controller import RANGE, Controller
from mas_ext._drift.metrics import Comparison
from mas_ext._drift.references import (
    Reference,
    References,
    TaskReferences,
    batch_of,
    leaves_of,
    tree_of,
)
from mas_ext._drift.sampling import ReferenceSampler
from mas_ext._storage.stored_numbers import is_whole, restored
from mas_ext._storage.tensor_file import DTYPES, under
from mas_ext._warnings import warn
from mas_ext.importance.batches import CustomBatch, Forward
from mas_ext.importance.outputs import Outputs

Tensors = dict[str, Tensor]


@dataclass
class DriftState:
    """What is remembered for a drift budget.

    Attributes:
        references: what the drift of the present task is measured on; None before the first task
            has ended, and without a budget.
        sampler: keeps references of the task that has not ended.
        controller: of λ.
    """

    references: References | None = None
    sampler: ReferenceSampler | None = None
    controller: Controller = field(default_factory=Controller)

    def begin_task(self, references: References | None) -> DriftState:
        """For the next task."""
        return DriftState(references, None, self.controller.begin_task())

    # -- state dictionaries ------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, Any], Tensors]:
        """Copies: what JSON can store, and tensors by name.

        References that it cannot store are left out, with a warning.
        """
        tensors: Tensors = {}
        references, sampler = self.references, self.sampler
        if references is None and sampler is None and self.controller == Controller():
            return {}, {}  # there is no budget, or nothing has been learned under it
        settings: dict[str, Any] = {"controller": asdict(self.controller)}
        settings["tasks"] = [] if references is None else _tasks(references.tasks, tensors)
        if references is not None:
            tensors |= {f"buffers/{n}": b.clone() for n, b in references.buffers.items()}
        if sampler is not None:
            about = {"batches": sampler.batches, "largest": sampler.largest, "seed": sampler.seed}
            parts = _parts(sampler.kept, "open", "the task that has not ended", tensors)
            settings["open"] = {**about, "parts": parts or []}
        return {**settings, "tensors": sorted(tensors)}, tensors

    @classmethod
    def from_state_dict(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        comparison: Comparison,
        count: int,
        forward: Forward | None,
    ) -> DriftState:
        """What :meth:`state_dict` returned.

        Args:
            comparison, count, forward: of the budget: a file has no functions.

        Raises:
            ValueError: it is damaged, or needs a ``forward``.
        """
        if not settings:  # of a MAS without a budget
            return cls()
        try:
            _check(settings["tensors"] == sorted(tensors), "tensors")
            state = cls(None, None, _controller(settings["controller"]))
            tasks = [_task(one, tensors, forward) for one in settings["tasks"]]
            if tasks:
                state.references = References(comparison, tasks, under("buffers", tensors))
            if (about := settings.get("open")) is not None:
                state.sampler = _sampler(about, tensors, count, forward)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"the state is damaged: its references lack {error}") from error
        return state


def without_references(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What remains of a stored state without its tensors: a few numbers."""
    return {**settings, "tasks": [], "open": None, "tensors": []} if settings else {}


def _tasks(tasks: list[TaskReferences], tensors: Tensors) -> list[dict[str, Any]]:
    stored = []
    for number, task in enumerate(tasks):
        parts = _parts(task.parts, str(number), f"task {number + 1}", tensors)
        if parts is None:
            continue
        stored.append({"parts": parts, "batch_size": task.batch_size})
    return stored


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise TypeError(f"a {what} that makes sense")


def _controller(numbers: Mapping[str, Any]) -> Controller:
    numbers = {"log_start": 0.0, **numbers}  # an earlier mas_ext did not have it
    controller = restored(Controller, numbers, "the controller")
    _check(controller.log_factor <= RANGE, "log_factor")
    _check(controller.log_start <= 0, "log_start")
    _check(min(controller.size, controller.last_size) >= 0, "size")
    return controller


def _sampler(
    about: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    count: int,
    forward: Forward | None,
) -> ReferenceSampler:
    _check(is_whole(about["batches"]) and is_whole(about["largest"], 1), "number of batches")
    _check(all(map(is_whole, about["seed"])), "seed")
    sampler = ReferenceSampler(count, forward, tuple(about["seed"]))
    sampler.batches, sampler.largest = about["batches"], about["largest"]
    sampler.kept = [_reference(part, tensors, forward) for part in about["parts"]]
    return sampler


def _parts(
    parts: list[Reference], prefix: str, whose: str, tensors: Tensors
) -> list[dict[str, Any]] | None:
    """None, with a warning, if one of them cannot be stored."""
    own: Tensors = {}
    try:
        stored = [_part(part, f"{prefix}/{k}", own) for k, part in enumerate(parts)]
    except _Unstorable as problem:
        warn(
            f"the references of {whose} have {problem}, which a state cannot hold: they are left "
            "out, and after loading the drift is measured without them. Keep batches of tensors, "
            "numbers and strings, or pass DriftBudget(reference=...)"
        )
        return None
    tensors |= own
    return stored


def _part(part: Reference, name: str, tensors: Tensors) -> dict[str, Any]:
    tensors[f"{name}/keys"] = part.keys
    for k, output in enumerate(part.before):
        tensors[f"{name}/before/{k}"] = output
    return {
        "name": name,
        "inputs": _encoded(tree_of(part.batch), f"{name}/inputs", tensors),
        "custom": isinstance(part.batch, CustomBatch),
        "samples": part.samples,
        "rowwise": part.rowwise,
        "accelerated": part.accelerated,
        "outputs": None if part.outputs is None else asdict(part.outputs),
        "before": len(part.before),
    }


def _task(
    stored: Mapping[str, Any], tensors: Mapping[str, Tensor], forward: Forward | None
) -> TaskReferences:
    parts = [_reference(part, tensors, forward) for part in stored["parts"]]
    _check(bool(parts) and is_whole(stored["batch_size"], 1), "batch size")
    return TaskReferences(parts, stored["batch_size"])


def _reference(
    stored: Mapping[str, Any], tensors: Mapping[str, Tensor], forward: Forward | None
) -> Reference:
    name, custom = stored["name"], stored["custom"]
    _check(isinstance(name, str) and isinstance(custom, bool), "name")
    before = tuple(tensors[f"{name}/before/{k}"] for k in range(stored["before"]))
    if custom and forward is None:
        raise ValueError(
            "the state's references were measured with forward=, and a state cannot hold a "
            "function: pass the same one as DriftBudget(limit, forward=...)"
        )
    tree = _decoded(stored["inputs"], tensors)
    _check(custom or _is_call(tree), "batch")
    keys, rowwise = tensors[f"{name}/keys"], stored["rowwise"]
    about = (stored["samples"], rowwise and tuple(rowwise), stored["accelerated"])
    batch = batch_of(tree, forward if custom else None)
    reference = Reference(batch, keys, *about, _outputs(stored["outputs"]), before)
    _check_reference(reference)
    return reference


def _is_call(tree: Any) -> bool:
    """Whether it is the positional and the named arguments of a call."""
    kinds = (tuple, dict)
    return type(tree) is tuple and tuple(map(type, tree)) == kinds


def _outputs(found: Mapping[str, Any] | None) -> Outputs | None:
    if found is None:
        return None
    paths, names = tuple(map(tuple, found["paths"])), tuple(found["names"])
    keys = [key for path in paths for key in path]
    _check(all(isinstance(key, (str, int)) for key in (*keys, *names)), "name of an output")
    _check(len(paths) == len(names), "number of outputs")
    return Outputs(paths, names)


def _check_reference(one: Reference) -> None:
    """Raises TypeError unless its tensors have a row for each of its samples."""
    _check(is_whole(one.samples, 1) and isinstance(one.accelerated, bool), "number of samples")
    _check(len(one.before) == (0 if one.outputs is None else len(one.outputs.paths)), "output")
    _check(one.keys.dtype == torch.float64 and one.keys.dim() == 1, "key")
    _check(len(one.keys) == (1 if one.rowwise is None else one.samples), "number of keys")
    finite = (one.keys, *one.before)
    _check(all(t.is_floating_point() and bool(t.isfinite().all()) for t in finite), "number")
    if one.rowwise is None:
        return
    leaves = leaves_of(one.batch)
    _check([type(has_rows) for has_rows in one.rowwise] == [bool] * len(leaves), "batch")
    rows = [leaf for leaf, has_rows in zip(leaves, one.rowwise, strict=True) if has_rows]
    _check(all(isinstance(leaf, Tensor) for leaf in rows), "tensor of a batch")
    _check(all(t.dim() > 0 and len(t) == one.samples for t in (*rows, *one.before)), "row")


class _Unstorable(Exception):
    """A batch holds something that neither JSON nor tensors can represent."""


_CONTAINERS: dict[str, type] = {"tuple": tuple, "list": list}


def _encoded(value: Any, name: str, tensors: Tensors) -> dict[str, Any]:
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES:
            raise _Unstorable(f"a tensor of {value.dtype}")
        tensors[name] = value
        return {"tensor": name}
    for kind, container in _CONTAINERS.items():
        if type(value) is container and isinstance(value, (tuple, list)):
            return {kind: [_encoded(v, f"{name}.{k}", tensors) for k, v in enumerate(value)]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        items = enumerate(value.items())  # a name by the key could be that of another item
        return {"dict": {key: _encoded(v, f"{name}.{k}", tensors) for k, (key, v) in items}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise _Unstorable(f"a {type(value).__name__}")


def _decoded(stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    _check(len(stored) == 1, "batch")
    ((kind, content),) = stored.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decoded(value, tensors) for key, value in content.items()}
    if kind in _CONTAINERS:
        return _CONTAINERS[kind](_decoded(value, tensors) for value in content)
    _check(kind == "value" and not isinstance(content, (list, dict)), "value")
    return content
