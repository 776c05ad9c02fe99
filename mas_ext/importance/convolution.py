"""The per-sample gradients of a convolution's weight.

A convolution is a matrix product with patches of its input, so sample k's gradient is
M_k = Σ_t g_kt · patch_ktᵀ, summed over the output's pixels t. For a transposed convolution, input
and output change places. On the CPU, patches are a view of the padded input. Elsewhere they are
laid out, for a few samples at a time, so that the buffer does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from torch import Tensor
from torch.nn import functional as F

from mas_ext.importance.contributions import (
    Contribution,
    Materialized,
    MatrixProduct,
    StackedMatrixProducts,
    upcast,
)
from mas_ext.importance.reductions import Reduction

_LAID_OUT = 1 << 20  # elements of the patches, or of the padded input, that are laid out
_GRADIENTS = 1 << 19  # elements of the gradients that are formed at a time


@dataclass
class Geometry:
    """How a convolution moves over its input: one number per dimension of space.

    Attributes:
        kernel: the size of the kernel.
        stride, padding, dilation: as for :class:`torch.nn.Conv2d`.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def patches(self, inputs: Tensor, out: tuple[int, ...]) -> Tensor:
        """[N, C, *space] → [N, C, *kernel, *out]: a view of the padded input."""
        if any(self.padding):
            inputs = F.pad(inputs, [p for p in reversed(self.padding) for _ in range(2)])
        steps = inputs.stride()[2:]
        within = [s * d for s, d in zip(steps, self.dilation, strict=True)]
        between = [s * d for s, d in zip(steps, self.stride, strict=True)]
        return inputs.as_strided(
            (*inputs.shape[:2], *self.kernel, *out),
            (*inputs.stride()[:2], *within, *between),
            inputs.storage_offset(),
        )


@dataclass
class ConvolutionWeight:
    """M_k of a convolution's weight [P, C / groups, *kernel]; m counts the rows of a sample.

    Attributes:
        pixels: [B, m, P, *out]: the tensor whose channels are the weight's first dimension (the
            output's gradient, or for a transposed convolution the input).
        inputs: [B, m, C, *space]: the tensor that patches are taken from.
        geometry: how patches are taken.
        groups: the number of groups that P and C are divided into.
    """

    pixels: Tensor
    inputs: Tensor
    geometry: Geometry
    groups: int

    def is_depthwise(self) -> bool:
        """Whether every channel is a group of its own."""
        return self.groups > 1 and self.pixels.shape[2] == self.groups == self.inputs.shape[2]

    def _chunks(self) -> Iterator[Contribution]:
        """The contributions of a few samples at a time."""
        part, step = self._way()
        for start in range(0, len(self.pixels), step):
            yield part(slice(start, start + step))

    def _way(self) -> tuple[Callable[[slice], Contribution], int]:
        """The fastest method for this shape, and the number of samples to use it for at a time."""
        kernel, pixels = prod(self.geometry.kernel), self.pixels.shape[3:].numel()
        m, channels = self.inputs.shape[1:3]
        if self.is_depthwise():
            return self._depthwise, _at_a_time(_GRADIENTS, m * channels * kernel)
        if self.pixels.is_cpu:
            return self._views, _at_a_time(_LAID_OUT, self.inputs[:1].numel())
        return self._blocks, _at_a_time(_LAID_OUT, m * channels * kernel * pixels)

    def _depthwise(self, chosen: slice) -> Materialized:
        """Forms the gradients [n, C, 1, *kernel] directly, since they are small."""
        pixels, inputs = upcast(self.pixels[chosen]), upcast(self.inputs[chosen])
        samples, m, kernel = len(pixels), pixels.shape[1], self.geometry.kernel
        flat = pixels.flatten(0, 1)
        patches = self.geometry.patches(inputs.flatten(0, 1), tuple(pixels.shape[3:]))
        values = pixels.new_empty(*flat.shape[:2], prod(kernel))
        for place, index in enumerate(product(*map(range, kernel))):
            window = patches.movedim((0, 1), (-2, -1))[index].movedim((-2, -1), (0, 1))
            values[:, :, place] = (window * flat).flatten(2).sum(2)
        summed = values.view(samples, m, *values.shape[1:]).sum(1)
        return Materialized(summed.view(samples, -1, 1, *kernel))

    def _views(self, chosen: slice) -> Contribution:
        """Patches that are views, with the dimensions that the output and the kernel have."""
        pixels, inputs = self.pixels[chosen], self.inputs[chosen]
        m, out = pixels.shape[1], tuple(pixels.shape[3:])
        patches = self.geometry.patches(inputs.flatten(0, 1).contiguous(), out)
        kernel = len(self.geometry.kernel)
        right = patches.movedim((*range(-kernel, 0),), (*range(1, 1 + kernel),))
        lefts = pixels.movedim(2, -1).chunk(self.groups, -1)
        rights = right.unflatten(0, (-1, m)).chunk(self.groups, 2 + kernel)
        parts = [MatrixProduct(*pair) for pair in zip(lefts, rights, strict=True)]
        return parts[0] if self.groups == 1 else GroupedMatrixProducts(parts)

    def _blocks(self, chosen: slice) -> Contribution:
        """Patches that are laid out, with one dimension of positions and one of columns."""
        pixels, inputs = self.pixels[chosen], self.inputs[chosen]
        samples, m, out = len(pixels), pixels.shape[1], tuple(pixels.shape[3:])
        patches = self.geometry.patches(inputs.flatten(0, 1), out)
        kernel = self.geometry.kernel
        shape = (pixels.shape[2] // self.groups, inputs.shape[2] // self.groups, *kernel)
        left = pixels.reshape(samples, m, self.groups, -1, prod(out))
        right = patches.reshape(samples, m, self.groups, -1, prod(out))
        parts = [
            MatrixProduct(_positions(left[:, :, g]), _positions(right[:, :, g]), shape)
            for g in range(self.groups)
        ]
        return parts[0] if self.groups == 1 else GroupedMatrixProducts(parts)

    def accumulate_(self, omega: Tensor, reduction: Reduction) -> None:
        """Ω += Σ_k f(M_k), for a few samples at a time."""
        for chunk in self._chunks():
            chunk.accumulate_(omega, reduction)

    def samples(self) -> Iterator[Tensor]:
        """M_k of each sample, formed for a few samples at a time."""
        for chunk in self._chunks():
            yield from chunk.samples()


@dataclass
class GroupedMatrixProducts(StackedMatrixProducts):
    """One matrix product per group; groups follow each other along the weight's first dimension."""

    def accumulate_(self, omega: Tensor, reduction: Reduction) -> None:
        """Ω += Σ_k f(M_k), group by group."""
        super().accumulate_(omega.unflatten(0, (len(self.parts), -1)), reduction)

    def samples(self) -> Iterator[Tensor]:
        """M_k of each sample, with the groups joined."""
        return (stacked.flatten(0, 1) for stacked in super().samples())


def _at_a_time(budget: int, elements: int) -> int:
    return max(1, budget // max(1, elements))


def _positions(values: Tensor) -> Tensor:
    """[B, m, n, pixels] → [B, m·pixels, n]; a view if m = 1."""
    return values.transpose(2, 3).flatten(1, 2)
