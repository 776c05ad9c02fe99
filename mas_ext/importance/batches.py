"""From a batch of whatever form to a model's output, dimension 0 of which is the sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Forward = Callable[[nn.Module, Any], Tensor]

_LABELS = ("labels", "label")


@dataclass(frozen=True)
class Inputs:
    """A batch as the arguments of ``model(*args, **kwargs)``; labels are never among them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """Reads a batch: a tensor, a tuple or list (its first item), or a mapping.

        Raises:
            TypeError: it is none of these, or it is empty.
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

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with every tensor replaced."""

        def apply(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = tree_map(apply, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def size(self) -> int:
        """The number of samples: the first tensor's dimension 0."""
        sized = [tensor for tensor in self.tensors() if tensor.dim() > 0]
        if not sized:
            raise TypeError(
                "data: a batch holds no tensor with a sample dimension; pass forward= for batches "
                "of another form"
            )
        return len(sized[0])

    def samples(self, count: int) -> Iterator[Inputs]:
        """The first ``count`` samples as batches of one; what has no sample dimension is shared."""
        size = self.size()

        def is_batched(tensor: Tensor) -> bool:
            return tensor.dim() > 0 and len(tensor) == size

        for k in range(count):
            sample = self.map(lambda t, k=k: t[k : k + 1] if is_batched(t) else t)  # type: ignore[misc]
            yield Inputs(sample.args, {n: _item(v, k, size) for n, v in sample.kwargs.items()})


def _item(value: Any, k: int, size: int) -> Any:
    """Of a plain list with a value a sample (lengths, say) the k-th, as a list of one."""
    is_listed = isinstance(value, (list, tuple)) and len(value) == size
    if is_listed and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
        return value[k : k + 1]
    return value


def _describe(batch: Any) -> str:
    empty = isinstance(batch, (tuple, list, Mapping)) and not batch
    return f"an empty {type(batch).__name__}" if empty else f"a {type(batch).__name__}"


def placed(inputs: Inputs, device: torch.device) -> Inputs:
    """On the model's device, and usable by autograd when made in inference mode."""

    def place(tensor: Tensor) -> Tensor:
        moved = tensor.to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() else moved

    return inputs.map(place)


def output_tensor(output: Any) -> Tensor:
    """The tensor in what a model returned: itself, its ``.logits``, or a tuple's first item.

    Raises:
        TypeError: there is none, or it is not of a floating dtype.
        ValueError: it has no sample dimension.
    """
    found = getattr(output, "logits", output)
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
            "the model's output has no sample dimension (it is 0-dim); return one row a sample, "
            "or pass forward= that does"
        )
    return found


def check_rows(output: Tensor, samples: int) -> Tensor:
    """The output, if it has one row a sample."""
    if len(output) != samples:
        raise ValueError(
            f"the model's output has no sample dimension: {samples} samples gave an output of "
            f"shape {list(output.shape)}; dimension 0 must be the sample, or pass forward="
        )
    return output
