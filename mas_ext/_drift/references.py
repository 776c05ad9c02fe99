"""The references: a few samples of every task, and what the model gave for them when a task began.

Only inputs are kept, no labels, and every process has all of them; for a measurement each runs its
share.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from mas_ext._distributed.fsdp import find_sharded_model
from mas_ext._distributed.ranks import Ranks
from mas_ext._drift.metrics import Comparison
from mas_ext.importance.batches import Batch, CustomBatch, Forward, Inputs, mask_in
from mas_ext.importance.isolation import in_evaluation_mode, undisturbed
from mas_ext.importance.outputs import Outputs, find_outputs


@dataclass
class Reference:
    """Samples that the model is run on together.

    Attributes:
        batch: their inputs.
        keys: a random number for each sample, or one for all if they stay together.
        samples: how many there are.
        rowwise: for each tensor and other leaf of ``batch``, whether it has a row per sample; None
            if samples cannot be taken out of it.
        accelerated: whether the data was on an accelerator.
        outputs: which of the model's outputs are compared; None before they were first computed.
        before: what the metric keeps of each output at the beginning of the task.
    """

    batch: Batch
    keys: Tensor
    samples: int
    rowwise: tuple[bool, ...] | None
    accelerated: bool = False
    outputs: Outputs | None = None
    before: tuple[Tensor, ...] = ()

    def take(self, rows: Sequence[int]) -> Reference:
        """Some of the samples, in memory of their own."""
        return self._taken(len(rows), lambda tensor: _rows(tensor, rows), copied)

    def view(self, rows: slice) -> Reference:
        """Some of the samples, for a measurement: in the same memory, if that is in one piece."""
        count = len(range(*rows.indices(self.samples)))
        return self._taken(count, lambda tensor: tensor[rows].contiguous(), lambda leaf: leaf)

    def _taken(
        self, samples: int, rows: Callable[[Tensor], Tensor], shared: Callable[[Any], Any]
    ) -> Reference:
        assert self.rowwise is not None
        leaves = [
            rows(leaf) if has_rows else shared(leaf)
            for leaf, has_rows in zip(leaves_of(self.batch), self.rowwise, strict=True)
        ]
        return replace(
            self,
            batch=with_leaves(self.batch, leaves),
            keys=rows(self.keys),
            samples=samples,
            before=tuple(map(rows, self.before)),
        )

    @property
    def divides(self) -> bool:
        """Whether samples can be taken out of it."""
        return self.rowwise is not None

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

    def compared(self, model: nn.Module, comparison: Comparison) -> tuple[float, float]:
        """Distance and weight."""
        distance, weight = self.distance(model, comparison).tolist()  # waits for an accelerator
        return distance, weight

    def distance(self, model: nn.Module, comparison: Comparison) -> Tensor:
        """Distance and weight as a tensor [2], differentiable."""
        pairs = [
            torch.stack(
                comparison.compare(
                    kept.to(output.device), output, mask_in(self.batch.content, output)
                )
            )
            for kept, output in zip(self.before, self._run(model)[0], strict=True)
        ]
        return torch.stack(pairs).sum(0)

    def _run(self, model: nn.Module) -> tuple[list[Tensor], Outputs]:
        placed = _placed(self.batch, next(model.parameters()).device, self.accelerated)
        returned = placed.forward(model)
        found = self.outputs
        if found is None:
            found = find_outputs(returned, placed, lambda other: other.forward(model))
        return found.tensors(returned), found


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
                end = min(part.samples, position + left)
                whole = not part.divides or end - position == part.samples
                chosen = part if whole else part.view(slice(position, end))
                yield chosen
                left -= chosen.samples
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
    def batch_size(self) -> int:
        """The samples in the largest batch of any task's data."""
        return max(task.batch_size for task in self.tasks)

    def loss(self, model: nn.Module, samples: int) -> Tensor:
        """Distance / weight of some of the references, chosen at random: one forward pass."""
        parts = [part for task in self.tasks for part in task.parts]
        sizes = torch.tensor([float(part.samples) for part in parts])
        part = parts[int(torch.multinomial(sizes, 1))]
        if part.divides and samples < part.samples:
            part = part.take(torch.randperm(part.samples)[:samples].tolist())
        with in_evaluation_mode(model), torch.enable_grad():
            distance, weight = part.distance(model, self.comparison)
        return (distance / weight.clamp_min(1e-30)).float()

    def drift(self, model: nn.Module, ranks: Ranks, window: tuple[int, int] | None = None) -> float:
        """Σ distance / Σ weight; Inf if an output is not finite. Every rank must call it.

        Args:
            window: the position and the number of the samples per task; None: all of them.
        """
        distance = weight = 0.0
        rank, world = ranks.place
        with evaluating(model):
            for task in self.tasks:
                chosen = task.parts if window is None else task.window(*window)
                for part in chosen:
                    share, counts = _share(part, rank, world)
                    more, size = share.compared(model, self.comparison)
                    distance, weight = distance + counts * more, weight + counts * size
        total = torch.tensor([distance, weight], dtype=torch.float64)
        distance, weight = ranks.summed(total).tolist()
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
        stack.enter_context(_own_forward(model))
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        yield


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Without the autocast in which Accelerate, and so the Trainer, wraps a model's forward."""
    attributes = vars(model)
    wrapped, own = attributes.get("forward"), attributes.get("_original_forward")
    if wrapped is None or own is None:
        yield
        return
    attributes["forward"] = own
    try:
        yield
    finally:
        attributes["forward"] = wrapped


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the floating-point buffers, such as running statistics, by name."""
    buffers = model.named_buffers()
    return {n: b.detach().clone() for n, b in buffers if b.is_floating_point() and not b.is_meta}


# -- the content of batches ------------------------------------------------------------------------
def tree_of(batch: Batch) -> Any:
    """The content of a batch as nested containers."""
    if isinstance(batch, Inputs):
        return (batch.args, batch.kwargs)
    assert isinstance(batch, CustomBatch)
    return batch.batch


def batch_of(tree: Any, forward: Forward | None) -> Batch:
    """The batch with this content; with a ``forward``, one that only it can read."""
    return Inputs(*tree) if forward is None else CustomBatch(tree, forward)


def leaves_of(batch: Batch) -> list[Any]:
    """The tensors and other values inside the containers."""
    return tree_leaves(tree_of(batch))


def with_leaves(batch: Batch, leaves: Sequence[Any]) -> Batch:
    """A batch of the same structure with other leaves."""
    forward = batch.function if isinstance(batch, CustomBatch) else None
    return batch_of(tree_unflatten(leaves, tree_structure(tree_of(batch))), forward)


def mapped(function: Callable[[Any], Any], batch: Batch) -> Batch:
    """A batch with the leaves that a function makes of its own."""
    return with_leaves(batch, [function(leaf) for leaf in leaves_of(batch)])


def copied(leaf: Any) -> Any:
    """A leaf in memory of its own; a tensor still requires gradients if it did."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    try:
        return copy.deepcopy(leaf)
    except Exception:  # whatever the data's own objects do
        return leaf


def moved(batch: Batch, device: torch.device) -> Batch:
    """A batch whose tensors are on a device."""
    return mapped(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    chosen = torch.tensor(rows, device=tensor.device)
    return tensor.detach()[chosen].requires_grad_(tensor.requires_grad)


def _placed(batch: Batch, device: torch.device, accelerated: bool) -> Batch:
    """On the model's device; what only the user's ``forward`` reads, if it was there before."""
    if isinstance(batch, Inputs):
        return batch.placed(device)
    return moved(batch, device) if accelerated else batch


def _check_finite(outputs: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise ValueError(
            "budget: the model's output for a reference is not finite, so no drift from it can be "
            "measured; check the references and the parameters for NaN and Inf"
        )


def _share(part: Reference, rank: int, world: int) -> tuple[Reference, float]:
    """This rank's samples of a part, and 1.

    A rank that has none runs one sample all the same and counts it 0 times: the ranks of a sharded
    model must run as many passes.
    """
    if world == 1:
        return part, 1.0
    if not part.divides:  # each has it whole, and each counts a part of it
        return part, 1.0 / world
    if rank >= part.samples:
        return part.view(slice(1)), 0.0
    return part.view(slice(rank, None, world)), 1.0
