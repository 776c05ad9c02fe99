"""Which samples become references: a uniform random choice, however long the data is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_structure

from mas_ext._distributed.ranks import Ranks
from mas_ext._drift.references import (
    Reference,
    batch_of,
    copied,
    leaves_of,
    mapped,
    moved,
    tree_of,
    with_leaves,
)
from mas_ext.importance.batches import Batch, CustomBatch, Forward, Inputs, tensors_in
from mas_ext.importance.loop import check_data

SHARED = 4096  # elements of a tensor that all samples share, up to which it is compared


class ReferenceSampler:
    """Keeps a uniform random sample of the data that it is shown, however much that is.

    Every sample gets a random number, and those with the smallest are kept.

    Args:
        count: how many samples to keep.
        forward: how the model is run on a batch, if not in the usual way.
        seed: of the random numbers; they do not disturb PyTorch's.
        whole: whether batches stay as they are.
    """

    def __init__(
        self,
        count: int,
        forward: Forward | None = None,
        seed: tuple[int, ...] = (),
        whole: bool = False,
    ) -> None:
        self.count = count
        self.forward = forward
        self.seed = seed
        self.whole = whole
        self.batches = 0  # seen so far
        self.samples = 0  # in them
        self.largest = 1  # samples in the largest of them
        self.kept: list[Reference] = []

    def copy(self) -> ReferenceSampler:
        """A sampler that goes on from here without changing this one."""
        other = ReferenceSampler(self.count, self.forward, self.seed, self.whole)
        other.batches, other.samples = self.batches, self.samples
        other.largest, other.kept = self.largest, list(self.kept)
        return other

    def watch(self, data: Iterable[Any]) -> Iterable[Any]:
        """The same data; whoever reads it shows it to this sampler."""
        try:
            check_data(data)
        except TypeError:
            return data  # the measurement says what is wrong with it
        return _Watched(data, self.add)

    def add(self, raw: Any) -> None:
        """Considers the samples of a batch."""
        self.batches += 1
        batch = self._readable(raw)
        size = _size(batch)
        if size == 0:
            return
        self.samples += size
        self.largest = max(self.largest, size)
        random = torch.Generator().manual_seed(hash((*self.seed, self.batches)) % 2**63)
        rowwise = None if self.whole else _rowwise(batch, size)
        keys = torch.rand(1 if rowwise is None else size, generator=random, dtype=torch.float64)
        smallest = keys.argsort(stable=True)[: self.count]
        rows = sorted(smallest[keys[smallest] < self._limit()].tolist())
        if not rows:
            return
        found = Reference(batch, keys, size, rowwise, _is_accelerated(batch))
        if rowwise is not None:
            found = found.take(rows)
        elif not self.whole:  # the loader may write its next batch to the same memory
            found = replace(found, batch=mapped(copied, batch))
        self.kept = _smallest([*self.kept, found], self.count)

    def _readable(self, raw: Any) -> Batch:
        return Inputs.of(raw) if self.forward is None else CustomBatch(raw, self.forward)

    def _limit(self) -> float:
        """The largest number kept, if there is no more room."""
        if sum(one.samples for one in self.kept) < self.count:
            return math.inf
        return float(max(one.keys.max() for one in self.kept))

    def gathered(self, ranks: Ranks) -> list[Reference]:
        """What all data ranks have kept, in the form in which it is measured."""
        kept = self.kept
        if not ranks.is_alone:
            cpu = torch.device("cpu")
            own = [
                (
                    isinstance(one.batch, CustomBatch),
                    tree_of(moved(one.batch, cpu)),
                    (one.keys, one.samples, one.rowwise, one.accelerated),
                )
                for one in kept
            ]
            everyone = [part for parts in ranks.attempt(lambda: own) for part in parts]
            kept = [
                Reference(batch_of(tree, self.forward if is_custom else None), *rest)
                for is_custom, tree, rest in everyone
            ]
            self.largest = max(ranks.attempt(lambda: self.largest))
        return _merged(_smallest(kept, self.count), self.largest)


@dataclass
class _Watched:
    data: Iterable[Any]
    see: Callable[[Any], None]

    def __iter__(self) -> Iterator[Any]:
        for raw in self.data:
            self.see(raw)
            yield raw


def _size(batch: Batch) -> int:
    """The number of samples: the size of dimension 0 of the first tensor that has one."""
    if isinstance(batch, Inputs) and not batch.has_lists:
        return batch.size()
    found = tensors_in([_attributes(leaf) for leaf in leaves_of(batch)])
    sized = [len(t) for t in found if t.dim() > 0]
    return sized[0] if sized and isinstance(batch, CustomBatch) else max(1, len(sized))


def _attributes(leaf: Any) -> Any:
    """What an object of the data's own holds, such as a dataclass."""
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    return leaf if isinstance(leaf, Tensor) else list(getattr(leaf, "__dict__", {}).values())


def _is_accelerated(batch: Batch) -> bool:
    return any(tensor.device.type != "cpu" for tensor in tensors_in(tree_of(batch)))


def _rowwise(batch: Batch, size: int) -> tuple[bool, ...] | None:
    """Which leaves have a row per sample; None if samples cannot be told apart by rows alone."""
    if any(_is_list_of_samples(item, size) for item in _items(batch)):
        return None
    leaves = leaves_of(batch)
    found = tuple(isinstance(t, Tensor) and t.dim() > 0 and len(t) == size for t in leaves)
    return found if any(found) else None


def _items(batch: Batch) -> Iterable[Any]:
    """The values that a batch consists of."""
    if isinstance(batch, Inputs):
        return (*batch.args, *batch.kwargs.values())
    tree = tree_of(batch)
    return tree.values() if isinstance(tree, dict) else tree if type(tree) in (tuple, list) else ()


def _is_list_of_samples(item: Any, size: int) -> bool:
    """Whether an item may have an entry per sample: images of different sizes, lengths, names."""
    if not isinstance(item, (tuple, list)):
        return False
    return bool(tensors_in(list(item))) or len(item) == size


def _smallest(kept: Sequence[Reference], count: int) -> list[Reference]:
    """The samples with the smallest keys, up to ``count``; a batch that is whole stays whole."""
    sizes = [1 if one.divides else one.samples for one in kept for _ in one.keys]
    keys = torch.cat([one.keys for one in kept]) if kept else torch.zeros(0)
    order = keys.argsort(stable=True).tolist()
    chosen, total = set(), 0
    for index in order:
        if total >= count:
            break
        chosen.add(index)
        total += sizes[index]
    left, first = [], 0
    for one in kept:
        rows = [row for row in range(len(one.keys)) if first + row in chosen]
        first += len(one.keys)
        if len(rows) == len(one.keys):
            left.append(one)
        elif rows:
            left.append(one.take(rows))
    return left


def _merged(parts: Sequence[Reference], limit: int) -> list[Reference]:
    """Samples of the same shapes in common batches, of at most ``limit`` samples."""
    alike: dict[Any, list[Reference]] = {}
    for number, part in enumerate(parts):
        alike.setdefault(_signature(part) or number, []).append(part)
    merged = []
    for group in alike.values():
        whole = _concatenated(group) if len(group) > 1 else group[0]
        if not whole.divides or whole.samples <= limit:
            merged.append(whole)
            continue
        rows = range(whole.samples)
        merged += [whole.take(rows[k : k + limit]) for k in range(0, whole.samples, limit)]
    return merged


def _signature(part: Reference) -> Any:
    """Equal for samples that can be in one batch; None if they are all for themselves."""
    if part.rowwise is None:
        return None
    structure = str(tree_structure(tree_of(part.batch)))
    described: list[Any] = [structure, type(part.batch), part.rowwise]
    for leaf, has_rows in zip(leaves_of(part.batch), part.rowwise, strict=True):
        if has_rows:
            described.append((leaf.shape[1:], leaf.dtype, leaf.device))
        elif isinstance(leaf, Tensor) and leaf.numel() <= SHARED:
            described.append((leaf.shape, leaf.dtype, leaf.device, tuple(leaf.flatten().tolist())))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            described.append(leaf)
        else:
            return None
    return tuple(described)


def _concatenated(parts: Sequence[Reference]) -> Reference:
    first = parts[0]
    assert first.rowwise is not None
    columns = zip(*(leaves_of(part.batch) for part in parts), strict=True)
    leaves = [
        torch.cat(column) if has_rows else column[0]
        for column, has_rows in zip(columns, first.rowwise, strict=True)
    ]
    batch = with_leaves(first.batch, leaves)
    keys = torch.cat([part.keys for part in parts])
    return replace(first, batch=batch, keys=keys, samples=sum(part.samples for part in parts))
