"""The references: a few samples of every task, and what the model gave for them when a task began.

Only inputs are kept, no labels, and every process has all of them; for a measurement each runs its
share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mas_ext._distributed.fsdp import find_sharded_model
from mas_ext._distributed.ranks import Ranks
from mas_ext._drift.metrics import Comparison
from mas_ext.importance.batches import Batch, CannotSplit, CustomBatch, Forward, Inputs, tensors_in
from mas_ext.importance.isolation import undisturbed
from mas_ext.importance.loop import check_data
from mas_ext.importance.outputs import Outputs, find_outputs


@dataclass
class Reference:
    """Samples that the model is run on together.

    Attributes:
        batch: their inputs.
        keys: a random number for each sample, or one for all if they stay together.
        samples: how many there are.
        divides: whether samples can be taken out of it.
        outputs: which of the model's outputs are compared; None before they were first computed.
        before: what the metric keeps of each output at the beginning of the task.
    """

    batch: Batch
    keys: Tensor
    samples: int
    divides: bool = True
    outputs: Outputs | None = None
    before: tuple[Tensor, ...] = ()

    def take(self, rows: Sequence[int]) -> Reference:
        """Some of the samples, in memory of their own."""
        batch = _cloned(self.batch.take(rows, self.samples))
        chosen = torch.tensor(rows)
        before = tuple(b[chosen.to(b.device)] for b in self.before)
        return Reference(batch, self.keys[chosen], len(rows), True, self.outputs, before)

    def recorded(self, model: nn.Module, comparison: Comparison) -> Reference:
        """The same with the outputs of the model as it is now."""
        try:
            outputs, found = self._run(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:
            if not self.divides:
                raise
            raise ValueError(
                f"budget: the model raised {type(problem).__name__} ({problem}) on samples of the "
                "data that were put together to a new batch; pass reference=, whose batches are "
                "used whole where they cannot be divided"
            ) from problem
        if any(len(output) != self.samples for output in outputs) and self.divides:
            raise ValueError(
                f"budget: the model's output for {self.samples} references has {len(outputs[0])} "
                "rows; dimension 0 must be the sample, or pass reference=batches"
            )
        _check_finite(outputs)
        before = tuple(comparison.kept(output) for output in outputs)
        return replace(self, outputs=found, before=before)

    def compared(self, model: nn.Module, comparison: Comparison) -> Tensor:
        """Distance and weight, [2], float64, on the CPU."""
        total = torch.zeros(2, dtype=torch.float64)
        for kept, output in zip(self.before, self._run(model)[0], strict=True):
            mask = _mask_of(self.batch, output)
            pair = comparison.compare(kept.to(output.device), output, mask)
            total += torch.stack(pair).double().cpu()
        return total

    def _run(self, model: nn.Module) -> tuple[list[Tensor], Outputs]:
        placed = _placed(self.batch, next(model.parameters()).device)
        returned = placed.forward(model)
        found = self.outputs
        if found is None:
            found = find_outputs(returned, placed, lambda other: other.forward(model))
        return found.tensors(returned), found

    @property
    def nbytes(self) -> int:
        """Of inputs and outputs."""
        return sum(t.nbytes for t in (*tensors_in(tree_of(self.batch)), *self.before))


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
            self.kept.append(found.take(rows) if divides else replace(found, batch=_cloned(batch)))
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


@dataclass
class TaskReferences:
    """The references of one task.

    Attributes:
        parts: the samples, in batches no larger than those of the data they come from.
        batch_size: the samples in the largest batch of that data.
    """

    parts: list[Reference]
    batch_size: int

    @property
    def samples(self) -> int:
        """How many there are."""
        return sum(part.samples for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Of inputs and outputs."""
        return sum(part.nbytes for part in self.parts)

    def recorded(self, model: nn.Module, comparison: Comparison) -> TaskReferences:
        """The same with the outputs of the model as it is now."""
        parts = [part.recorded(model, comparison) for part in self.parts]
        return replace(self, parts=parts)

    def window(self, start: int, count: int) -> Iterator[Reference]:
        """``count`` samples from position ``start`` on, beginning anew after the last."""
        total, left = self.samples, min(count, self.samples)
        position = start % total
        while left > 0:
            for part in self.parts:
                if position >= part.samples:
                    position -= part.samples
                    continue
                rows = range(position, min(part.samples, position + left))
                whole = not part.divides or len(rows) == part.samples
                yield part if whole else part.take(rows)
                left -= part.samples if whole else len(rows)
                position = 0
                if left <= 0:
                    return


@dataclass
class References:
    """The references of all tasks, and what measures the drift on them.

    Attributes:
        comparison: the metric.
        tasks: of each task that has ended.
        buffers: the model's floating-point buffers when the present task began, by name.
    """

    comparison: Comparison
    tasks: list[TaskReferences] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, tasks: Sequence[TaskReferences], comparison: Comparison
    ) -> References:
        """With the outputs of the model as it is now: a task begins.

        Raises:
            ValueError: an output is not finite, or not one that the metric can compare.
        """
        with evaluating(model):
            recorded = [task.recorded(model, comparison) for task in tasks]
        return cls(comparison, recorded, buffers_of(model))

    @property
    def nbytes(self) -> int:
        """Of inputs and outputs."""
        return sum(task.nbytes for task in self.tasks)

    @property
    def batch_size(self) -> int:
        """The samples in the largest batch of any task's data."""
        return max(task.batch_size for task in self.tasks)

    def drift(self, model: nn.Module, ranks: Ranks, window: tuple[int, int] | None = None) -> float:
        """Σ distance / Σ weight; Inf if an output is not finite. Every rank must call it.

        Args:
            window: the position and the number of the samples per task; None: all of them.
        """
        total = torch.zeros(2, dtype=torch.float64)
        rank, world = place_among(ranks)
        with evaluating(model):
            for task in self.tasks:
                chosen = task.parts if window is None else task.window(*window)
                for part in chosen:
                    share, counts = _share(part, rank, world)
                    total += counts * share.compared(model, self.comparison)
        distance, weight = _summed(total, ranks).tolist()
        if not math.isfinite(distance):
            return math.inf
        if not weight:
            return math.inf if distance else 0.0
        return distance / weight


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs a model in evaluation mode, without autocast and gradients, and leaves no trace.

    Outputs can only be compared if they were computed in the same way, whatever a training loop
    has switched on when they are computed again.
    """
    device = next(model.parameters()).device.type
    whole = find_sharded_model(model)
    with ExitStack() as stack:
        if whole is not None:
            stack.enter_context(whole.in_evaluation())
        for kind in {"cpu", device}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        yield


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the floating-point buffers, such as running statistics, by name."""
    buffers = model.named_buffers()
    return {n: b.detach().clone() for n, b in buffers if b.is_floating_point() and not b.is_meta}


# -- samples and batches ---------------------------------------------------------------------------
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


def tree_of(batch: Batch) -> Any:
    """The content of a batch as nested containers."""
    if isinstance(batch, Inputs):
        return (batch.args, batch.kwargs)
    assert isinstance(batch, CustomBatch)
    return batch.batch


def batch_of(tree: Any, forward: Forward | None) -> Batch:
    return Inputs(*tree) if forward is None else CustomBatch(tree, forward)


def _mapped(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    leaves, structure = tree_flatten(tree_of(batch))
    leaves = [function(leaf) if isinstance(leaf, Tensor) else _copied(leaf) for leaf in leaves]
    forward = batch.function if isinstance(batch, CustomBatch) else None
    return batch_of(tree_unflatten(leaves, structure), forward)


def _copied(leaf: Any) -> Any:
    """A copy of a NumPy array; anything else as it is."""
    return leaf.copy() if hasattr(leaf, "__array__") and hasattr(leaf, "copy") else leaf


def _cloned(batch: Batch) -> Batch:
    return _mapped(lambda tensor: tensor.detach().clone(), batch)


def _on_cpu(batch: Batch) -> Batch:
    return _mapped(lambda tensor: tensor.cpu(), batch)


def _placed(batch: Batch, device: torch.device) -> Batch:
    return batch.placed(device) if isinstance(batch, Inputs) else batch


def _mask_of(batch: Batch, output: Tensor) -> Tensor | None:
    """The attention mask of sequences whose positions the output has, [B, T]."""
    tree = batch.kwargs if isinstance(batch, Inputs) else tree_of(batch)
    mask = tree.get("attention_mask") if isinstance(tree, Mapping) else None
    if isinstance(mask, Tensor) and output.dim() > 2 and mask.shape == output.shape[:2]:
        return mask.to(output.device)
    return None


def _check_finite(outputs: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise ValueError(
            "budget: the model's output for a reference is not finite, so no drift from it can be "
            "measured; check the references and the parameters for NaN and Inf"
        )


# -- processes -------------------------------------------------------------------------------------
def place_among(ranks: Ranks) -> tuple[int, int]:
    """The number of this rank among the data ranks, and how many there are."""
    rank, world = 0, 1
    for group in ranks.data:
        rank = rank * dist.get_world_size(group) + dist.get_rank(group)
        world *= dist.get_world_size(group)
    return rank, world


def _share(part: Reference, rank: int, world: int) -> tuple[Reference, float]:
    """This rank's samples of a part, and 1.

    A rank that has none runs one sample all the same and counts it 0 times: the ranks of a sharded
    model must run as many passes.
    """
    if world == 1:
        return part, 1.0
    if not part.divides:  # each has it whole, and each counts a part of it
        return part, 1.0 / world
    rows = range(rank, part.samples, world)
    return (part.take(rows), 1.0) if len(rows) else (part.take([0]), 0.0)


def largest_of(values: Iterable[float], ranks: Ranks) -> float:
    """The largest value of all ranks; 0 for none."""
    largest = torch.tensor([max(values, default=0.0)], dtype=torch.float64)
    for group in (*ranks.data, *ranks.model):
        largest = _reduced(largest, group, dist.ReduceOp.MAX)
    return largest.item()


def _summed(total: Tensor, ranks: Ranks) -> Tensor:
    for group in ranks.data:
        total = _reduced(total, group, dist.ReduceOp.SUM)
    return total


def _reduced(values: Tensor, group: Any, operation: Any) -> Tensor:
    shared = values.cuda() if dist.get_backend(group) == "nccl" else values
    dist.all_reduce(shared, operation, group=group)
    return shared.cpu()
