"""Which samples become references: a uniform random choice, however long the data is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mas_ext._distributed.ranks import Ranks
from mas_ext._drift.references import Reference, batch_of, cloned, mapped, tree_of
from mas_ext.importance.batches import Batch, CannotSplit, CustomBatch, Forward, Inputs, tensors_in
from mas_ext.importance.loop import check_data


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
        self.largest = 1  # samples in the largest of them
        self.kept: list[Reference] = []

    def copy(self) -> ReferenceSampler:
        """A sampler that goes on from here without changing this one."""
        other = ReferenceSampler(self.count, self.forward, self.seed, self.whole)
        other.batches, other.largest, other.kept = self.batches, self.largest, list(self.kept)
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
        self.largest = max(self.largest, size)
        random = torch.Generator().manual_seed(hash((*self.seed, self.batches)) % 2**63)
        divides = not self.whole and _can_be_divided(batch, size)
        keys = torch.rand(size if divides else 1, generator=random, dtype=torch.float64)
        smaller = keys < self._limit()
        if smaller.any():
            found = Reference(batch, keys, size, divides)
            rows = smaller.nonzero().flatten().tolist()
            self.kept.append(found.take(rows) if divides else replace(found, batch=cloned(batch)))
            self.kept = _smallest(self.kept, self.count)

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
            own = [
                (
                    isinstance(one.batch, CustomBatch),
                    tree_of(_on_cpu(one.batch)),
                    (one.keys, one.samples, one.divides),
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
    tree = tree_of(batch)
    sized = [len(t) for t in tensors_in(tree) if t.dim() > 0]
    return sized[0] if sized and isinstance(batch, CustomBatch) else max(1, len(sized))


def _has_lists(tree: Any) -> bool:
    """Whether an item of a batch is a list of tensors, whose items may be the samples."""
    items = tree.values() if isinstance(tree, Mapping) else tree
    if not isinstance(tree, (Mapping, tuple, list)):
        return False
    return any(isinstance(item, (tuple, list)) and tensors_in(item) for item in items)


def _can_be_divided(batch: Batch, size: int) -> bool:
    if isinstance(batch, Inputs) and batch.has_lists:
        return False
    if isinstance(batch, CustomBatch) and _has_lists(batch.batch):
        return False
    try:
        batch.take([0], size)
    except CannotSplit:
        return False
    return True


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
    leaves, structure = tree_flatten(tree_of(part.batch))
    described: list[Any] = [str(structure), type(part.batch)]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.dim() == 0 or len(leaf) != part.samples:
                return None
            described.append((leaf.shape[1:], leaf.dtype, leaf.device))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            described.append(leaf)
        else:
            return None
    return tuple(described) if part.divides else None


def _concatenated(parts: Sequence[Reference]) -> Reference:
    flat = [tree_flatten(tree_of(part.batch)) for part in parts]
    leaves = [
        torch.cat(column) if isinstance(column[0], Tensor) else column[0]
        for column in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    first = parts[0].batch
    forward = first.function if isinstance(first, CustomBatch) else None
    batch = batch_of(tree_unflatten(leaves, flat[0][1]), forward)
    keys = torch.cat([part.keys for part in parts])
    return Reference(batch, keys, sum(part.samples for part in parts))


def _on_cpu(batch: Batch) -> Batch:
    return mapped(lambda tensor: tensor.cpu(), batch)
