"""Which tensors of what a model returns are measured.

A model may return more than one tensor: two heads, features and logits, a loss, a hidden state. All
floating-point tensors with one row per sample count, as though they were concatenated; where
``logits`` or ``last_hidden_state`` says which tensor is the output, only that one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mas_ext._distributed.shards import full_tensor
from mas_ext.importance.batches import Batch, CannotSplit, Inputs, tensors_in

Path = tuple[Any, ...]  # indices, keys and field names that lead to a tensor

# Where an output has one of these fields, that is what the model is for, and no other is.
NAMED = ("logits", "last_hidden_state")
REMEDY = (
    "pass forward=, a callable(model, batch) that returns the output tensor, one row per sample"
)


@dataclass(frozen=True)
class Outputs:
    """The tensors that are measured, found at the first batch and the same for all others.

    Attributes:
        paths: where they are in what the model returns.
        names: the same in Python, such as ``output[0]`` and ``output.logits``.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]

    def tensors(self, returned: Any) -> list[Tensor]:
        """The measured tensors."""
        return [_checked(_at(returned, path), _name(path)) for path in self.paths]

    def tensor(self, returned: Any) -> Tensor:
        """The measured tensor; of several, their rows side by side, [B, Σ numel of a row]."""
        found = self.tensors(returned)
        if len(found) == 1:
            return found[0]
        device = found[0].device
        rows = [t.reshape(len(t), -1).to(device) for t in found]
        if len({len(t) for t in rows}) > 1:
            raise ValueError(
                f"the model's outputs {', '.join(self.names)} have {[len(t) for t in rows]} rows; "
                f"dimension 0 of each must be the sample: {REMEDY}"
            )
        return torch.cat(rows, 1)


def at_least_float32(output: Tensor) -> Tensor:
    """Half precision as float32; all else as it is."""
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def classes_last(output: Tensor) -> Tensor:
    """[B, C] and [B, T, C] as they are, and [B, C, H, W] with the classes last."""
    if output.dim() == 1:
        return output.unsqueeze(1)
    return output if output.dim() < 4 else output.movedim(1, -1)


def find_outputs(returned: Any, batch: Batch, run: Callable[[Batch], Any]) -> Outputs:
    """The tensors that count in what a model returned for a batch.

    Args:
        returned: what the model returned.
        batch: what it was given.
        run: runs the model on a batch. If ``returned`` has several items, the model is run once
            more on another number of samples, which shows whose dimension 0 is the sample: those of
            a recurrent network's hidden state are its layers, of which there may be as many.

    Raises:
        TypeError: it is a tuple, list or mapping without any tensor.
        ValueError: no floating-point tensor in it has one row per sample, or it is unclear which
            of several count.
    """
    base: Path = ()
    while (name := _named_field(_at(returned, base))) is not None:
        base = (*base, name)
    value = _at(returned, base)
    if not isinstance(value, (tuple, list, Mapping)):
        paths = [base]
    else:
        paths = _items_with_samples(value, base, _Rows.of(returned, batch, run))
    return Outputs(tuple(paths), tuple(_name(path) for path in paths))


class _Rows:
    """Tells whether dimension 0 of a tensor is the sample."""

    def __init__(self, returned: Any, size: int | None, again: Any, samples: int) -> None:
        self._returned, self._size = returned, size
        self._again, self._samples = again, samples

    @classmethod
    def of(cls, returned: Any, batch: Batch, run: Callable[[Batch], Any]) -> _Rows:
        if not isinstance(batch, Inputs) or batch.has_lists:
            return cls(returned, None, None, 0)
        size = batch.size()
        chosen = [0, 1] if size > 2 else [0] * (size + 1)
        try:
            again = run(batch.take(chosen, size))
        except CannotSplit:  # then the sizes in this batch alone decide
            return cls(returned, size, None, 0)
        return cls(returned, size, again, len(chosen))

    def are_samples(self, path: Path) -> bool:
        found = _at(self._returned, path)
        if not _is_output(found):
            return False
        if self._size is None:
            return True
        if self._again is not None:
            other = _at(self._again, path)
            if not isinstance(other, Tensor) or other.shape[:1] != (self._samples,):
                return False
        return len(found) == self._size


def _items_with_samples(value: Any, base: Path, rows: _Rows) -> list[Path]:
    paths = [(*base, key) for key in _keys(value)]
    for path in paths:
        if any(rows.are_samples(inner) for inner in _inside(value[path[-1]], path)):
            raise ValueError(
                f"the model returned {_described(value)}, and {_name(path)} contains further "
                f"tensors with one row per sample; it is unclear which to measure: {REMEDY}"
            )
    found = [path for path in paths if rows.are_samples(path)]
    if not found:
        kind = ValueError if tensors_in(value) else TypeError
        raise kind(
            f"the model returned {_described(value)}, which has no sample dimension: no "
            f"floating-point tensor in it has one row per sample; {REMEDY}"
        )
    return found


def _inside(item: Any, path: Path) -> Iterator[Path]:
    """Paths of what a nested list, tuple or mapping holds."""
    if isinstance(item, (tuple, list, Mapping)):
        for key in _keys(item):
            yield (*path, key)
            yield from _inside(item[key], (*path, key))


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Mapping) else list(range(len(value)))


def _named_field(value: Any) -> str | None:
    if isinstance(value, Tensor):
        return None
    for name in NAMED:
        field = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        if field is not None:
            return name
    return None


def _at(value: Any, path: Path) -> Any:
    """What is at a path; None if there is nothing."""
    for key in path:
        try:
            by_name = key in NAMED and not isinstance(value, Mapping)
            value = getattr(value, key) if by_name else value[key]
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
    return value


def _name(path: Path) -> str:
    fields = (f".{key}" if key in NAMED else f"[{key!r}]" for key in path)
    return "output" + "".join(fields)


def _is_output(found: Any) -> bool:
    return isinstance(found, Tensor) and found.is_floating_point() and found.dim() > 0


def _checked(found: Any, name: str) -> Tensor:
    if not isinstance(found, Tensor):
        raise TypeError(f"the model's {name} is a {type(found).__name__}; {REMEDY}")
    if not found.is_floating_point():
        raise TypeError(
            f"the model's output has dtype {found.dtype}; it must be floating point: {REMEDY}"
        )
    if found.dim() == 0:
        raise ValueError(
            "the model's output has no sample dimension (it is 0-dim); return one row per sample, "
            "even for a batch of one (squeeze() without dim= removes that row), or pass a forward= "
            "that does"
        )
    return full_tensor(found)


def _described(value: Any) -> str:
    items = [f"{_name((key,)).removeprefix('output')}: {_kind(value[key])}" for key in _keys(value)]
    return (
        f"a {type(value).__name__} ({', '.join(items)})"
        if items
        else f"an empty {type(value).__name__}"
    )


def _kind(item: Any) -> str:
    is_tensor = isinstance(item, Tensor)
    return f"{item.dtype} {list(item.shape)}" if is_tensor else f"a {type(item).__name__}"
