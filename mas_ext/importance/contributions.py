"""What one operation adds to a parameter's per-sample gradients M_k, in the form it comes in.

Each form knows how to add Σ_k f(M_k) without a buffer of B × the parameter's size, where f is the
reduction, |·| or (·)², and how to give one sample's M_k where several uses of a parameter have to
be summed before f is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mas_ext.importance.reductions import Reduction
from mas_ext.reference import accumulation_dtype

_SMALL = 4096  # elements for which the call of an operator costs more than a temporary


class Contribution(Protocol):
    """M_k of every sample of a batch, in the shape of the tensor that the operation used."""

    def accumulate_(self, omega: Tensor, reduction: Reduction) -> None:
        """Ω += Σ_k f(M_k); Ω may be any view."""

    def samples(self) -> Iterator[Tensor]:
        """M_1, …, M_B, one at a time."""


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in the accumulation dtype; complex tensors stay as they are."""
    return tensor if tensor.is_complex() else tensor.to(accumulation_dtype(tensor.dtype))


@dataclass
class Materialized:
    """M as it is: small, or made by the backward pass anyway.

    Attributes:
        values: [B, *shape].
    """

    values: Tensor

    def accumulate_(self, omega: Tensor, reduction: Reduction) -> None:
        """Σ over the first dimension."""
        if omega.numel() <= _SMALL:
            omega += reduction.of(upcast(self.values)).sum(0)
            return
        for value in self.values:
            if accumulation_dtype(value.dtype) == omega.dtype:
                reduction.add_([omega], [value])
            else:
                omega += reduction.of(upcast(value))

    def samples(self) -> Iterator[Tensor]:
        """As they are."""
        return iter(upcast(self.values))


@dataclass
class MatrixProduct:
    """M_k = Σ_t left_kt right_ktᵀ: a matrix multiplied at T positions.

    T and d may be several dimensions each, as for the patches of a convolution.

    Attributes:
        left: [B, T, p], of any strides.
        right: [B, T, d], of any strides.
        shape: of the tensor, where it is not [p, d] itself.
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, ...] | None = None

    def accumulate_(self, omega: Tensor, reduction: Reduction) -> None:
        """Ω += Σ_k f(Σ_t …), by the kernel that works in tiles of Ω."""
        if self.shape is None:
            _add_product_(omega, self.left, self.right, reduction)
        elif omega.is_contiguous():
            matrix = omega.view(self.left.shape[2], -1)
            _add_product_(matrix, self.left, self.right, reduction)
        else:
            matrix = omega.new_zeros(self.left.shape[2], self.right.shape[2])
            _add_product_(matrix, self.left, self.right, reduction)
            omega += matrix.view(self.shape)

    def samples(self) -> Iterator[Tensor]:
        """M_k of each sample, by one matrix product per sample."""
        columns = self.right.shape[self.left.dim() - 1 :]
        shape = self.shape or (self.left.shape[-1], *columns)
        for left, right in zip(self.left, self.right, strict=True):
            rows = upcast(left).flatten(0, -2)
            product = rows.t() @ upcast(right).reshape(len(rows), columns.numel())
            yield product.view(shape)

    def transposed(self) -> MatrixProduct:
        """The contribution to the transposed matrix."""
        return MatrixProduct(self.right, self.left)

    @staticmethod
    def joined(parts: Sequence[MatrixProduct]) -> MatrixProduct:
        """Several uses of one matrix: more positions."""
        if len(parts) == 1:
            return parts[0]
        left = torch.cat([part.left for part in parts], 1)
        return MatrixProduct(left, torch.cat([part.right for part in parts], 1))


def _add_product_(omega: Tensor, left: Tensor, right: Tensor, reduction: Reduction) -> None:
    """Ω [p, *d] += Σ_k f(Σ_t left_kt right_ktᵀ), for left [B, *T, p] and right [B, *T, *d]."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    left, right = left.to(dtype), right.to(dtype)
    if accumulation_dtype(dtype) != omega.dtype:  # part of the model computes in another dtype
        total = torch.zeros_like(omega, dtype=accumulation_dtype(dtype))
        _add_product_(total, left, right, reduction)
        omega += total
    elif left.shape[1] == 1 and left.dtype == omega.dtype and not left.is_cpu:
        # One position: f(l·r) = f(l)·f(r), an ordinary product, which a device's BLAS does best.
        omega.addmm_(reduction.of(left[:, 0]).t(), reduction.of(right[:, 0]))
    else:
        reduction.add_outer_(omega, left, right)


@dataclass
class StackedMatrixProducts:
    """A stack of matrices, each used by itself: M_k[h] = Σ_t left_kht right_khtᵀ.

    Attributes:
        parts: for each matrix of the stack, its MatrixProduct.
    """

    parts: list[MatrixProduct]

    def accumulate_(self, omega: Tensor, reduction: Reduction) -> None:
        """Ω += Σ_k f(M_k), matrix by matrix."""
        for block, part in zip(omega, self.parts, strict=True):
            part.accumulate_(block, reduction)

    def samples(self) -> Iterator[Tensor]:
        """Materialized again."""
        return map(torch.stack, zip(*(part.samples() for part in self.parts), strict=True))


@dataclass
class EmbeddingRows:
    r"""M_k[i] = Σ over the positions t with index_kt = i of values_kt: a table looked up.

    Attributes:
        index: [B, T], which row; negative where nothing is looked up.
        values: [B, T, \*row shape].
        shape: that of the table.
    """

    index: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def accumulate_(self, omega: Tensor, reduction: Reduction) -> None:
        """Ω += Σ_k f(M_k): sums the values of equal rows within each sample, then adds by row."""
        _, rows, sums = self.summed()
        omega.index_add_(0, rows, reduction.of(sums).to(omega.dtype))

    def summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums M_k[i] that are not zero: samples k in order, rows i, values."""
        numbers = torch.arange(len(self.index), device=self.index.device)
        keys = (numbers[:, None] * self.shape[0] + self.index).flatten()
        used = self.index.flatten() >= 0
        values = upcast(self.values).flatten(0, 1)
        keys, places = torch.unique(keys[used], return_inverse=True)
        sums = values.new_zeros(len(keys), *values.shape[1:]).index_add_(0, places, values[used])
        return keys // self.shape[0], keys % self.shape[0], sums

    def samples(self) -> Iterator[Tensor]:
        """M_k of each sample: a table that is zero except in the rows that were looked up."""
        for index, values in zip(self.index, upcast(self.values), strict=True):
            used = index >= 0
            yield values.new_zeros(self.shape).index_add_(0, index[used], values[used])

    @staticmethod
    def joined(parts: Sequence[EmbeddingRows]) -> EmbeddingRows:
        """Several uses of one table: more positions."""
        index = torch.cat([part.index for part in parts], 1)
        return EmbeddingRows(
            index, torch.cat([upcast(part.values) for part in parts], 1), parts[0].shape
        )


@dataclass
class TiedEmbedding:
    """A matrix that is used in a product and also looked up row by row, as a tied embedding.

    A sample looks up few rows. Σ_k f(H_k + E_k), for the product's H and the look-up's E, is
    therefore computed as Σ_k f(H_k), and then corrected in the rows that were looked up.
    """

    matrix: MatrixProduct
    table: EmbeddingRows

    def accumulate_(self, omega: Tensor, reduction: Reduction) -> None:
        """Σ_k f(H_k), then f(H_k[i] + E_k[i]) − f(H_k[i]) for every row that was looked up."""
        self.matrix.accumulate_(omega, reduction)
        samples, rows, looked_up = self.table.summed()
        counts = torch.bincount(samples, minlength=len(self.matrix.left)).tolist()
        products = [
            upcast(left[:, chosen]).t() @ upcast(right)
            for left, right, chosen in zip(
                self.matrix.left, self.matrix.right, rows.split(counts), strict=True
            )
        ]
        product = torch.cat(products)
        change = reduction.of(product + looked_up) - reduction.of(product)
        omega.index_add_(0, rows, change.to(omega.dtype))

    def samples(self) -> Iterator[Tensor]:
        """Both."""
        return map(torch.add, self.matrix.samples(), self.table.samples())
