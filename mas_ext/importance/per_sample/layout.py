"""Which rows of a gradient belong to which sample.

A linear layer on [B, T, d] sees B·T rows: row // T is the sample where the batch comes first, and
row % B where time does (recurrent layers, attention). Nothing in the graph says which, so it is
found out: with all but one sample's output gradient set to zero, the rows that are not zero are
that sample's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mas_ext.importance.per_sample.graph import Shape


@dataclass(frozen=True)
class Layout:
    """Dimension ``dim`` has outer × B × inner entries, the sample's index in the middle."""

    dim: int
    outer: int
    inner: int

    def split(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """[…, outer·B·inner, …] → [B, …, outer, inner, …], a view."""
        dim = self.dim if dim is None else dim
        samples = tensor.shape[dim] // (self.outer * self.inner)
        parts = tensor.unflatten(dim, (self.outer, samples, self.inner))
        return parts.movedim(dim + 1, 0)

    def rows(self, matrix: Tensor) -> Tensor:
        """[outer·B·inner, n] → [B, T, n] with T = outer·inner."""
        return self.split(matrix, 0).flatten(1, 2)

    def positions(self, tensor: Tensor) -> Tensor:
        """[…, outer·B·inner, …, n] → [B, T, n], all but the last dimension being positions."""
        return self.split(tensor).flatten(1, -2)

    def masked(self, tensor: Tensor, sample: int) -> Tensor:
        """The tensor with the rows of all other samples set to zero."""
        result = torch.zeros_like(tensor)
        self.split(result)[sample].copy_(self.split(tensor)[sample])
        return result


@dataclass(frozen=True)
class Extent:
    """How one dimension of a shape grows with the batch: ``per_sample`` · B entries."""

    dim: int
    per_sample: int

    def shape(self, like: Shape, samples: int) -> Shape:
        """``like`` for another number of samples."""
        return (*like[: self.dim], self.per_sample * samples, *like[self.dim + 1 :])


def extent(small: Shape, small_size: int, large: Shape, large_size: int) -> Extent | None:
    """The one dimension that grows in proportion to the batch, if that is all that changes."""
    if len(small) != len(large):
        return None
    changed = [d for d in range(len(small)) if small[d] != large[d]]
    if len(changed) != 1:
        return None
    d = changed[0]
    if small[d] * large_size != large[d] * small_size or small[d] % small_size:
        return None
    return Extent(d, small[d] // small_size)


def find_layout(extent: Extent, patterns: Sequence[Tensor]) -> Layout | None:
    """The layout in which every entry that is not zero belongs to the sample that caused it.

    Args:
        extent: the dimension that grows with the batch.
        patterns: for each sample, which entries of that dimension are not zero when only its
            output gradient is not.

    Batch-first is tried first and batch-last last: with three samples no other order of the data
    can pass for the first, however few entries are not zero.
    """
    samples = len(patterns)
    for outer, inner in _factorings(extent.per_sample):
        layout = Layout(extent.dim, outer, inner)
        owners = layout.split(torch.arange(extent.per_sample * samples), 0)
        if all(_only(pattern, owners[k]) for k, pattern in enumerate(patterns)):
            return layout
    return None


def _factorings(size: int) -> Iterator[tuple[int, int]]:
    return ((outer, size // outer) for outer in range(1, size + 1) if size % outer == 0)


def _only(pattern: Tensor, owned: Tensor) -> bool:
    """Whether all that is set lies at the owned entries."""
    return int(pattern.sum()) == int(pattern[owned.flatten()].sum())


def pattern(grad: Tensor, dim: int) -> Tensor:
    """Which entries along a dimension have anything but zeros."""
    nonzero = grad.detach().ne(0).movedim(dim, 0)
    return nonzero.flatten(1).any(1).cpu() if nonzero.dim() > 1 else nonzero.cpu()
