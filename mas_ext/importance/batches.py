"""Turns batches of any form into the model's output, whose dimension 0 is the sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mas_ext._distributed.shards import full_tensor

Forward = Callable[[nn.Module, Any], Tensor]

_LABELS = ("labels", "label")


class Batch(Protocol):
    """Some samples in a form that the model can be run on."""

    def forward(self, model: nn.Module) -> Any:
        """Runs the model on the samples and returns its output."""

    def check_rows(self, output: Tensor) -> Tensor:
        """Returns the output if it has one row per sample; raises otherwise."""

    def take(self, indices: Sequence[int], size: int) -> Batch:
        """The samples ``indices`` of this batch, which has ``size`` samples.

        Raises:
            CannotSplit: the batch cannot be divided into samples.
        """


class CannotSplit(Exception):
    """A batch cannot be divided into samples; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """A batch as the arguments of ``model(*args, **kwargs)``, without labels."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """Makes inputs of a batch: a tensor, a tuple or list (its first item), or a mapping.

        Raises:
            TypeError: the batch is none of these, or it is empty.
        """
        if isinstance(batch, Tensor):
            return cls((batch,), {})
        if isinstance(batch, (tuple, list)) and batch:
            return cls((batch[0],), {})
        if isinstance(batch, Mapping) and batch:
            return cls((), {key: value for key, value in batch.items() if key not in _LABELS})
        raise TypeError(
            f"data: a batch is {_describe(batch)}; yield a tensor, a non-empty tuple or list whose "
            "first item is the input, a mapping of keyword arguments, or pass forward="
        )

    def placed(self, device: torch.device) -> Inputs:
        """The inputs on a device, in tensors that autograd can use (not inference tensors)."""

        def place(tensor: Tensor) -> Tensor:
            moved = tensor.to(device, non_blocking=True)
            return _leaf(moved.clone() if moved.is_inference() else moved, tensor)

        return self._map(place)

    def size(self) -> int:
        """The number of samples: the size of dimension 0 of the first tensor that has one.

        Raises:
            TypeError: no tensor has a dimension.
        """
        sized = [tensor for tensor in tensors_in((self.args, self.kwargs)) if tensor.dim() > 0]
        if not sized:
            raise TypeError(
                "data: a batch holds no tensor with a sample dimension; pass forward= for batches "
                "of another form"
            )
        return len(sized[0])

    def forward(self, model: nn.Module) -> Any:
        """Calls the model with copies of the inputs, so that it cannot change them in place."""
        fresh = self._map(_fresh)
        return model(*fresh.args, **fresh.kwargs)

    def check_rows(self, output: Tensor) -> Tensor:
        """Returns the output if it has one row per sample; raises ValueError otherwise."""
        if len(output) != self.size():
            raise ValueError(
                f"the model's output has no sample dimension: {self.size()} samples gave an output "
                f"of shape {list(output.shape)}; dimension 0 must be the sample, or pass forward="
            )
        return output

    def take(self, indices: Sequence[int], size: int) -> Inputs:
        """The chosen samples; tensors without a sample dimension are passed on whole."""
        chosen = self._map(lambda tensor: _rows(tensor, indices, size))
        listed = {name: _items(v, indices, size) for name, v in chosen.kwargs.items()}
        return Inputs(chosen.args, listed)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        args, kwargs = _map_tensors(function, (self.args, self.kwargs))
        return Inputs(args, kwargs)


@dataclass(frozen=True)
class CustomBatch:
    """A batch that only the user's ``forward`` can read.

    Attributes:
        batch: the batch, as the data yielded it.
        function: the user's ``forward``.
        rows: the number of samples, if this is a part of a larger batch; otherwise None.
    """

    batch: Any
    function: Forward
    rows: int | None = None

    def forward(self, model: nn.Module) -> Any:
        """Calls the user's ``forward`` with a copy of the batch.

        Raises:
            CannotSplit: ``forward`` raised an error for a part of a batch.
        """
        fresh = _map_tensors(_fresh, self.batch)
        if self.rows is None:
            return self.function(model, fresh)
        try:
            return self.function(model, fresh)
        except Exception as problem:
            raise CannotSplit(f"forward fails for a part of it ({problem})") from problem

    def check_rows(self, output: Tensor) -> Tensor:
        """Returns the output. The number of samples in a whole batch is that of its output's rows.

        Raises:
            CannotSplit: the output for a part of a batch has another number of rows.
        """
        if self.rows is not None and len(output) != self.rows:
            raise CannotSplit(f"{self.rows} samples of it give {len(output)} rows")
        return output

    def take(self, indices: Sequence[int], size: int) -> CustomBatch:
        """The chosen rows of every tensor that has ``size`` rows; all else is passed on whole.

        Raises:
            CannotSplit: no tensor has ``size`` rows.
        """
        if not any(t.dim() > 0 and len(t) == size for t in tensors_in(self.batch)):
            raise CannotSplit("no tensor in it has as many rows as the output")
        chosen = _map_tensors(lambda tensor: _rows(tensor, indices, size), self.batch)
        return CustomBatch(chosen, self.function, len(indices))


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _rows(tensor: Tensor, indices: Sequence[int], size: int) -> Tensor:
    if tensor.dim() == 0 or len(tensor) != size:
        return tensor
    first, count = indices[0], len(indices)
    if list(indices) == list(range(first, first + count)):
        return _leaf(tensor[first : first + count], tensor)
    return _leaf(tensor[torch.tensor(indices, device=tensor.device)], tensor)


def _fresh(tensor: Tensor) -> Tensor:
    return _leaf(tensor.clone(), tensor)


def _leaf(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor detached, so that autograd stops at the model's inputs."""
    return tensor.detach().requires_grad_(like.requires_grad)


def _items(value: Any, indices: Sequence[int], size: int) -> Any:
    """The chosen items of a plain list with one value per sample (such as lengths)."""
    is_listed = isinstance(value, (list, tuple)) and len(value) == size
    if is_listed and not tensors_in(value):
        return type(value)([value[k] for k in indices])
    return value


def _describe(batch: Any) -> str:
    empty = isinstance(batch, (tuple, list, Mapping)) and not batch
    return f"an empty {type(batch).__name__}" if empty else f"a {type(batch).__name__}"


def output_tensor(output: Any) -> Tensor:
    """The tensor in a model's output: the output itself, its ``logits``, or its first item.

    Raises:
        TypeError: there is no such tensor, or it is not floating point.
        ValueError: it has no sample dimension.
    """
    is_mapping = isinstance(output, Mapping)
    found = output.get("logits", output) if is_mapping else getattr(output, "logits", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model returned a {type(output).__name__}; pass forward=callable(model, batch) "
            "that returns the output tensor"
        )
    if not found.is_floating_point():
        raise TypeError(f"the model's output has dtype {found.dtype}; it must be floating point")
    if found.dim() == 0:
        raise ValueError(
            "the model's output has no sample dimension (it is 0-dim); return one row per sample, "
            "or pass forward= that does"
        )
    return full_tensor(found)
