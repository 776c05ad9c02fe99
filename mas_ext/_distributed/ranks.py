"""The processes that measure together: what they tell each other, and what they add up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

ProcessGroup = Any
T = TypeVar("T")

_KINDS: dict[str, type[Exception]] = {"TypeError": TypeError, "ValueError": ValueError}


@dataclass(frozen=True)
class Ranks:
    """Those that take part in a measurement.

    Attributes:
        data: process groups over which samples are shared out: each rank has its own. Of a mesh,
            one for each dimension.
        model: process groups whose ranks hold parts of one model and are given the same samples.
    """

    data: tuple[ProcessGroup, ...] = ()
    model: tuple[ProcessGroup, ...] = ()

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to wait for."""
        return not self.data and not self.model

    @property
    def is_first(self) -> bool:
        """Whether it is the one of the data ranks that brings what was there before."""
        return all(dist.get_rank(group) == 0 for group in self.data)

    def progress(self, wanted: Any) -> Any:
        """What a rank shows of it: one bar is enough, a callable is everyone's own."""
        is_leader = all(dist.get_rank(group) == 0 for group in (*self.data, *self.model))
        return wanted if callable(wanted) or is_leader or wanted is not True else None

    def agree(self, value: Any) -> bool:
        """Whether those that go through one model together all have the same to say."""
        return all(other == value for other in _gathered([value], self.model))

    def attempt(self, work: Callable[[], T]) -> list[T]:
        """Does a rank's own share; if that fails on one, all raise an error.

        Returns:
            What it came to on every data rank, in the order of ranks: it has to be picklable.

        Raises:
            Exception: this rank's own error, or what tells of another's, of the same kind where
                that is a TypeError or a ValueError.
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
        """The sums of all data ranks, on all of them, in place."""
        flat = [_flat(total) for total in sums] if self.data else []
        for group in self.data:
            pending = [dist.all_reduce(total, group=group, async_op=True) for total in flat]
            for work in pending:
                work.wait()


@dataclass(frozen=True)
class _Failure:
    """An error as other ranks are told of it; itself, it might not survive the journey."""

    rank: int
    kind: str
    message: str

    def as_error(self) -> Exception:
        return _KINDS.get(self.kind, RuntimeError)(
            f"rank {self.rank} failed, and with it all ranks that it works with: "
            f"{self.kind}: {self.message}"
        )


def _told_failure(error: Exception | None) -> _Failure | None:
    if error is None:
        return None
    kind = next((name for name, known in _KINDS.items() if isinstance(error, known)), None)
    return _Failure(dist.get_rank(), kind or type(error).__name__, str(error))


def _gathered(items: list[T], groups: Iterable[ProcessGroup]) -> list[T]:
    """Of groups that are the dimensions of a mesh, the last changes fastest."""
    for group in reversed(tuple(groups)):
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, items, group=group)
        items = [item for part in parts for item in part]
    return items


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor as it lies in memory: collectives take no others."""
    return tensor.as_strided((tensor.numel(),), (1,))
