"""The processes that measure together, and what they exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

ProcessGroup = Any
T = TypeVar("T")

_KINDS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}


@dataclass(frozen=True)
class Ranks:
    """The processes that take part in a measurement.

    Attributes:
        data: process groups whose ranks have different samples; for a mesh, one per dimension.
        model: process groups whose ranks hold parts of one model and have the same samples.
    """

    data: tuple[ProcessGroup, ...] = ()
    model: tuple[ProcessGroup, ...] = ()

    @property
    def is_alone(self) -> bool:
        """Whether no other process takes part."""
        return not self.data and not self.model

    @property
    def is_first(self) -> bool:
        """Whether this is the data rank that contributes the sums from before the measurement."""
        return all(dist.get_rank(group) == 0 for group in self.data)

    @property
    def place(self) -> tuple[int, int]:
        """The number of this rank among the data ranks, and how many there are."""
        rank, world = 0, 1
        for group in self.data:
            rank = rank * dist.get_world_size(group) + dist.get_rank(group)
            world *= dist.get_world_size(group)
        return rank, world

    def summed(self, values: Tensor) -> Tensor:
        """A few numbers on the CPU, summed over all data ranks."""
        for group in self.data:
            values = _reduced(values, group, dist.ReduceOp.SUM)
        return values

    def largest(self, value: float) -> float:
        """The largest value of all ranks."""
        values = torch.tensor([value], dtype=torch.float64)
        for group in (*self.data, *self.model):
            values = _reduced(values, group, dist.ReduceOp.MAX)
        return values.item()

    def progress(self, wanted: Any) -> Any:
        """The ``progress`` argument for this rank: one rank shows a bar, all call a callable."""
        is_leader = all(dist.get_rank(group) == 0 for group in (*self.data, *self.model))
        return wanted if callable(wanted) or is_leader or wanted is not True else None

    def agree(self, value: Any) -> bool:
        """Whether all ranks that hold parts of one model pass the same value."""
        return all(other == value for other in _gathered([value], self.model))

    def attempt(self, work: Callable[[], T]) -> list[T]:
        """Runs ``work`` on every rank; if it fails on one, all raise an error.

        Returns:
            The results of all data ranks, in the order of ranks; they must be picklable.

        Raises:
            Exception: this rank's own error, or one that reports another rank's, of the same type
                if that is a TypeError or a ValueError.
        """
        if self.is_alone:
            return [work()]
        error, result = None, None
        try:
            result = work()
        except Exception as problem:
            error = problem
        told = _gathered([(_told_failure(error), result)], self.data)
        failures = _gathered([failure for failure, _ in told], self.model)
        if error is not None:
            raise error
        for failure in failures:
            if failure is not None:
                raise failure.as_error()
        return [result for _, result in told]  # type: ignore[misc]

    def add_up_(self, sums: Iterable[Tensor]) -> None:
        """Adds up the sums of all data ranks, in place, on all of them."""
        flat = [_flat(total) for total in sums] if self.data else []
        for group in self.data:
            pending = [dist.all_reduce(total, group=group, async_op=True) for total in flat]
            for work in pending:
                work.wait()


@dataclass(frozen=True)
class _Failure:
    """An error as it is reported to other ranks. The exception itself might not be picklable."""

    rank: int
    kind: str
    message: str

    def as_error(self) -> Exception:
        return _KINDS.get(self.kind, RuntimeError)(
            f"rank {self.rank} failed, and so all ranks of its group did: "
            f"{self.kind}: {self.message}"
        )


def _told_failure(error: Exception | None) -> _Failure | None:
    if error is None:
        return None
    kind = next((name for name, known in _KINDS.items() if isinstance(error, known)), None)
    return _Failure(dist.get_rank(), kind or type(error).__name__, str(error))


def _gathered(items: list[T], groups: Iterable[ProcessGroup]) -> list[T]:
    """The items of all ranks. If the groups are a mesh's dimensions, the last varies fastest."""
    for group in reversed(tuple(groups)):
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, items, group=group)
        items = [item for part in parts for item in part]
    return items


def _reduced(values: Tensor, group: ProcessGroup, operation: Any) -> Tensor:
    shared = values.cuda() if dist.get_backend(group) == "nccl" else values
    dist.all_reduce(shared, operation, group=group)
    return shared.cpu()


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor as a vector in memory order, which collectives accept."""
    return tensor.as_strided((tensor.numel(),), (1,))
