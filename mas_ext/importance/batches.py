"""Batches of any form: how the model is run on them, and how they are divided into samples."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Forward = Callable[[nn.Module, Any], Tensor]
# How arguments are divided into samples, by position or keyword: see :meth:`Inputs.take`.
Division = Mapping[int | str, str]

_LABELS = ("labels", "label")
# What most batches consist of, by exact type; all else is left to torch's walk through containers.
_PLAIN, _LEAVES = (tuple, list, dict), (type(None), bool, int, float, str)


class Batch(Protocol):
    """Some samples in a form that the model can be run on."""

    @property
    def target(self) -> Target | None:
        """What the outputs are compared with; None where nothing is, or not yet."""

    def with_target(self, target: Target) -> Batch:
        """The same samples with a target."""

    @property
    def content(self) -> Any:
        """The samples in the form in which the data yielded them."""

    def forward(self, model: nn.Module) -> Any:
        """Runs the model on the samples and returns its output."""

    def check_rows(self, output: Tensor) -> Tensor:
        """Returns the output if it has one row per sample; raises otherwise."""

    def take(self, indices: Sequence[int], size: int, division: Division | None = None) -> Batch:
        """The samples ``indices`` of this batch, which has ``size`` samples.

        Raises:
            CannotSplit: the batch cannot be divided into samples.
        """


@dataclass(frozen=True)
class Target:
    """What the outputs of a batch are compared with, such as their labels.

    Attributes:
        values: [B, …].
        weight: [B], how much the target counts in Ω.
    """

    values: Tensor
    weight: Tensor

    def take(self, indices: Sequence[int]) -> Target:
        """The targets of the chosen samples."""
        rows = torch.tensor(indices, device=self.values.device)
        return Target(self.values[rows], self.weight[rows])


class CannotSplit(ValueError):
    """A batch cannot be divided into samples; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """A batch as the arguments of ``model(*args, **kwargs)``, without labels.

    Attributes:
        args, kwargs: the arguments.
        rows: the number of samples, if this is a part of a larger batch; otherwise None.
        taken: what was taken of the larger batch, in words.
        others: what the batch has beside the inputs, such as labels: the items of a tuple or list
            after the first, or of a mapping; None for a batch that is a tensor.
        target: see :class:`Batch`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int | None = None
    taken: str = ""
    others: Any = None
    target: Target | None = None

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

    @classmethod
    def with_others(cls, batch: Any) -> Inputs:
        """The same, with what the batch has beside the inputs."""
        others: Any = None
        if isinstance(batch, Mapping):
            others = {key: batch[key] for key in _LABELS if key in batch}
        elif isinstance(batch, (tuple, list)):
            others = tuple(batch[1:])
        return replace(cls.of(batch), others=others)

    @property
    def content(self) -> Any:
        """The batch: a tensor, a tuple or a mapping."""
        if not self.args:
            return {**self.kwargs, **(self.others or {})}
        return self.args[0] if self.others is None else (*self.args, *self.others)

    def with_target(self, target: Target) -> Inputs:
        """The same samples with a target."""
        return replace(self, target=target)

    @staticmethod
    def ignored(batch: Any, model: nn.Module) -> str:
        """The name of the first argument that the batch has a value for but that is not passed.

        Empty if there is none. Of a tuple or list, only the first item is passed, since the last is
        usually the labels. Any items between them count as inputs, and so does a second item that
        is a mask (booleans or integers, all 0 or 1, in the shape of the input).
        """
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            return ""
        if len(batch) == 2 and not _is_mask(batch[1], batch[0]):
            return ""
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):
            return ""
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        second = positional[1] if len(positional) > 1 else None
        if second is None or second.default not in (None, second.empty):
            return ""
        is_input = not re.search("label|target|return|output|^y$", second.name)
        return second.name if is_input else ""

    def placed(self, device: torch.device) -> Inputs:
        """The inputs on a device, in tensors that autograd can use (not inference tensors)."""

        def place(tensor: Tensor) -> Tensor:
            moved = tensor.to(device, non_blocking=True)
            return _leaf(moved.clone() if moved.is_inference() else moved, tensor)

        return self._map(place)

    def size(self) -> int:
        """The number of samples: the size of dimension 0 of the first tensor that has one.

        It is not, if the samples are the items of a list (:attr:`has_lists`).

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
        """Calls the model with copies of the inputs, so that it cannot change them in place.

        Raises:
            CannotSplit: the model raised an error for a part of a batch.
        """
        fresh = self._map(_fresh)
        if self.rows is None:
            return model(*fresh.args, **fresh.kwargs)
        try:
            return model(*fresh.args, **fresh.kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            raise CannotSplit(
                f"the model raised {type(problem).__name__} ({problem}) on {self.taken}. It was "
                "run on this part to find each sample's own gradient. If all samples share one of "
                "these inputs, give it a leading dimension of 1, or pass forward=; if the model "
                "keeps state from one call to the next, reset it at the beginning of its forward"
            ) from problem

    def check_rows(self, output: Tensor) -> Tensor:
        """Returns the output if it has one row per sample.

        Raises:
            ValueError: it has not.
            CannotSplit: it has not, and this is a part of a batch.
        """
        if self.rows is not None and len(output) != self.rows:
            raise CannotSplit(
                f"the model's output has no sample dimension: {len(output)} rows for {self.taken}; "
                "dimension 0 of inputs and output must be the sample, or pass forward="
            )
        if self.rows is None and len(output) not in (self.size(), *self._lengths_of_lists()):
            raise ValueError(
                f"the model's output has no sample dimension: {self.size()} samples gave an output "
                f"of shape {list(output.shape)}; dimension 0 must be the sample, or pass forward="
            )
        return output

    def take(self, indices: Sequence[int], size: int, division: Division | None = None) -> Inputs:
        """The chosen samples.

        Args:
            indices: which samples; one may be taken several times.
            size: the number of samples in this batch.
            division: the arguments that are passed on ``"whole"`` because all samples share them,
                and the lists of one tensor per sample, of which ``"items"`` are taken. Of all other
                arguments, rows are taken of the tensors that have ``size`` of them.
        """
        division = division or {}
        args = tuple(
            _divided(value, division.get(i), indices, size) for i, value in enumerate(self.args)
        )
        kwargs = {
            name: _items(_divided(value, division.get(name), indices, size), indices, size)
            for name, value in self.kwargs.items()
        }
        return Inputs(
            args,
            kwargs,
            len(indices),
            self._described(len(indices), size, division),
            _others(self.others, indices, size),
            self.target and self.target.take(indices),
        )

    def divisions(self, size: int) -> Iterator[Division]:
        """Other ways to divide the arguments into ``size`` samples, the likelier ones first."""
        arguments = [
            (key, value)
            for key, value in self._arguments().items()
            if _has_rows(value, size) or _is_list_of_tensors(value, size)
        ]
        shared: list[Division] = [{key: "whole"} for key, _ in arguments[1:]]
        yield from shared
        yield from ({k: "items"} for k, v in arguments if _is_list_of_tensors(v, size))
        if len(shared) > 1:
            yield {key: "whole" for key, _ in arguments[1:]}

    def shared_arguments(self, samples: int) -> list[int | str]:
        """The arguments with tensors of which none has a row per sample."""
        return [
            key
            for key, value in self._arguments().items()
            if any(t.dim() > 0 for t in tensors_in(value))
            and not _has_rows(value, samples)
            and not _is_list_of_tensors(value, samples)
        ]

    @property
    def has_lists(self) -> bool:
        """Whether an argument is a list of tensors, whose items may be the samples."""
        return bool(self._lengths_of_lists())

    def _arguments(self) -> dict[int | str, Any]:
        arguments: dict[int | str, Any] = dict(enumerate(self.args))
        return arguments | self.kwargs

    def _lengths_of_lists(self) -> list[int]:
        values = self._arguments().values()
        return [len(v) for v in values if isinstance(v, (tuple, list)) and tensors_in(v)]

    def _described(self, count: int, size: int, division: Division) -> str:
        taken = []
        for key, value in self._arguments().items():
            name = f"input {key}" if isinstance(key, int) else repr(key)
            shapes = [list(t.shape) for t in tensors_in(value) if _has_row_per_sample(t, size)]
            if shapes and key not in division:
                taken.append(f"{count} rows of {name}, {', '.join(map(str, shapes))}")
            elif division.get(key) == "items":
                taken.append(f"{count} items of {name}")
        return f"{count} of a batch's {size} samples ({'; '.join(taken)})"

    def _map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        args, kwargs, others = _map_tensors(function, (self.args, self.kwargs, self.others))
        return replace(self, args=args, kwargs=kwargs, others=others)


@dataclass(frozen=True)
class CustomBatch:
    """A batch that only the user's ``forward`` can read.

    Attributes:
        batch: the batch, as the data yielded it.
        function: the user's ``forward``.
        rows: the number of samples, if this is a part of a larger batch; otherwise None.
        target: see :class:`Batch`.
    """

    batch: Any
    function: Forward
    rows: int | None = None
    target: Target | None = None

    @property
    def content(self) -> Any:
        """The batch."""
        return self.batch

    def with_target(self, target: Target) -> CustomBatch:
        """The same samples with a target."""
        return replace(self, target=target)

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
            raise CannotSplit(f"forward fails for a part of the batch ({problem})") from problem

    def check_rows(self, output: Tensor) -> Tensor:
        """Returns the output. The number of samples in a whole batch is that of its output's rows.

        Raises:
            CannotSplit: the output for a part of a batch has another number of rows.
        """
        if self.rows is not None and len(output) != self.rows:
            raise CannotSplit(
                f"forward returns {len(output)} rows for {self.rows} samples of the batch"
            )
        return output

    def take(
        self, indices: Sequence[int], size: int, division: Division | None = None
    ) -> CustomBatch:
        """The chosen rows of every tensor that has ``size`` rows; all else is passed on whole.

        Raises:
            CannotSplit: no tensor has ``size`` rows.
        """
        if not _has_rows(self.batch, size):
            raise CannotSplit("no tensor in it has as many rows as the output")
        chosen = _map_tensors(lambda tensor: _rows(tensor, indices, size), self.batch)
        target = self.target and self.target.take(indices)
        return CustomBatch(chosen, self.function, len(indices), target)


def labels_in(content: Any) -> Any:
    """The labels of a batch: ``"labels"`` or ``"label"``, or the second of two items; or None."""
    if isinstance(content, Mapping):
        return next((content[key] for key in _LABELS if key in content), None)
    return content[1] if isinstance(content, (tuple, list)) and len(content) == 2 else None


def mask_in(content: Any, output: Tensor) -> Tensor | None:
    """The attention mask of sequences whose positions the output has, [B, T]; or None."""
    arguments = content if isinstance(content, Mapping) else {}
    is_decoder = any(str(key).startswith("decoder_") for key in arguments)
    mask = arguments.get("decoder_attention_mask" if is_decoder else "attention_mask")
    if isinstance(mask, Tensor) and output.dim() > 2 and mask.shape == output.shape[:2]:
        return mask.to(output.device)
    return None


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) in _PLAIN:  # as a walk of torch's would find them, in a tenth of the time
        values = tree.values() if type(tree) is dict else tree
        return [tensor for value in values for tensor in tensors_in(value)]
    if type(tree) in _LEAVES:
        return []
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) is dict:
        return {key: _map_tensors(function, value) for key, value in tree.items()}
    if type(tree) in _PLAIN:
        return type(tree)([_map_tensors(function, value) for value in tree])
    if type(tree) in _LEAVES:
        return tree
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _rows(tensor: Tensor, indices: Sequence[int], size: int) -> Tensor:
    if not _has_row_per_sample(tensor, size):
        return tensor
    first, count = indices[0], len(indices)
    if tensor.layout == torch.strided and list(indices) == list(range(first, first + count)):
        return _leaf(tensor[first : first + count], tensor)
    return _leaf(tensor.index_select(0, torch.tensor(indices, device=tensor.device)), tensor)


def _has_row_per_sample(tensor: Tensor, size: int) -> bool:
    return not tensor.is_nested and tensor.dim() > 0 and len(tensor) == size


def _has_rows(value: Any, size: int) -> bool:
    return any(_has_row_per_sample(tensor, size) for tensor in tensors_in(value))


def _is_list_of_tensors(value: Any, size: int) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == size and bool(tensors_in(value))


def _divided(value: Any, how: str | None, indices: Sequence[int], size: int) -> Any:
    """The chosen samples of one argument; see :meth:`Inputs.take`."""
    if how == "whole":
        return value
    if how == "items":
        return type(value)([value[k] for k in indices])
    return _map_tensors(lambda tensor: _rows(tensor, indices, size), value)


def _others(others: Any, indices: Sequence[int], size: int) -> Any:
    """The chosen samples of what a batch has beside the inputs, which may be lists of items."""

    def of(value: Any) -> Any:
        is_listed = isinstance(value, (list, tuple)) and len(value) == size
        if is_listed and not all(_has_row_per_sample(t, size) for t in tensors_in(value)):
            return _divided(value, "items", indices, size)
        return _items(_divided(value, None, indices, size), indices, size)

    if isinstance(others, Mapping):
        return {key: of(value) for key, value in others.items()}
    return None if others is None else tuple(of(value) for value in others)


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


def _is_mask(item: Any, like: Any) -> bool:
    if not isinstance(item, Tensor) or not isinstance(like, Tensor) or item.is_nested:
        return False
    if item.shape != like.shape:
        return False
    return not item.is_floating_point() and bool(((item == 0) | (item == 1)).all())


def _describe(batch: Any) -> str:
    empty = isinstance(batch, (tuple, list, Mapping)) and not batch
    return f"an empty {type(batch).__name__}" if empty else f"a {type(batch).__name__}"
