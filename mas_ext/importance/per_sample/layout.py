"""Describes which rows of a gradient belong to which sample.

A linear layer on [B, T, d] sees B·T rows. Row r belongs to sample r // T if the batch comes first,
and to sample r % B if time comes first (recurrent layers, attention). The graph does not say which
is the case, so :mod:`.sample_assignment` finds out from the gradients themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mas_ext.importance.per_sample.graph import Shape

# In place of a sample's number: no gradient arrived, or the gradient is of several samples.
NO_GRADIENT, MIXED = -1, -2


@dataclass(frozen=True)
class Layout:
    """Dimension ``dim`` has outer × B × inner entries, with the sample's index in the middle."""

    dim: int
    outer: int
    inner: int

    def split(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """[…, outer·B·inner, …] → [B, …, outer, inner, …], a view."""
        dim = self.dim if dim is None else dim
        before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
        parts = tensor.view(*before, self.outer, self._samples(tensor, dim), self.inner, *after)
        return parts.movedim(dim + 1, 0)

    def _samples(self, tensor: Tensor, dim: int) -> int:
        return tensor.shape[dim] // (self.outer * self.inner)

    def rows(self, matrix: Tensor) -> Tensor:
        """[outer·B·inner, n] → [B, T, n] with T = outer·inner."""
        if self.outer == 1:  # one call instead of three, as small models notice
            return matrix.view(self._samples(matrix, 0), self.inner, *matrix.shape[1:])
        return self.split(matrix, 0).flatten(1, 2)

    def positions(self, tensor: Tensor) -> Tensor:
        """[…, outer·B·inner, …, n] → [B, T, n]: all dimensions but the last are positions."""
        return self.split(tensor).flatten(1, -2)

    def sample_indices(self, samples: int) -> Tensor:
        """The sample that each entry belongs to: [outer·B·inner], for B = ``samples``."""
        sample = torch.arange(samples, device="cpu").view(1, samples, 1)
        return sample.expand(self.outer, samples, self.inner).flatten()

    def agrees_with(self, assignment: Tensor) -> bool:
        """Whether this layout gives every entry with a gradient to the sample it is assigned to."""
        known = assignment != NO_GRADIENT
        samples = len(assignment) // (self.outer * self.inner)
        return torch.equal(self.sample_indices(samples)[known], assignment[known])

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
        """The shape ``like``, with the size that this dimension has for ``samples`` samples."""
        return (*like[: self.dim], self.per_sample * samples, *like[self.dim + 1 :])


def extent(small: Shape, small_size: int, large: Shape, large_size: int) -> Extent | None:
    """The dimension that grows in proportion to the batch; None if anything else changes, too."""
    if len(small) != len(large):
        return None
    changed = [d for d in range(len(small)) if small[d] != large[d]]
    if len(changed) != 1:
        return None
    d = changed[0]
    if small[d] * large_size != large[d] * small_size or small[d] % small_size:
        return None
    return Extent(d, small[d] // small_size)


def find_layout(extent: Extent, assignment: Tensor) -> Layout | None:
    """The layout that agrees with an assignment; None if there is none, or if it is ambiguous.

    Batch-first is tried first and batch-last last. If at least three samples have a gradient, the
    first layout that agrees is the right one; with fewer, it must be the only one that agrees.

    Args:
        extent: the dimension that grows with the batch.
        assignment: the sample that each entry of that dimension belongs to, or NO_GRADIENT.
    """
    layouts = (Layout(extent.dim, *sizes) for sizes in _factorings(extent.per_sample))
    fitting = [layout for layout in layouts if layout.agrees_with(assignment)]
    is_clear = len(fitting) == 1 or has_enough_samples(assignment)
    return fitting[0] if fitting and is_clear else None


def has_enough_samples(assignment: Tensor) -> bool:
    """Whether enough samples have a gradient to determine their order."""
    return len(assignment[assignment != NO_GRADIENT].unique()) >= 3


def _factorings(size: int) -> Iterator[tuple[int, int]]:
    return ((outer, size // outer) for outer in range(1, size + 1) if size % outer == 0)
