"""What a job consists of: a task, a reference, and the ways of doing it side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.lists.shapes import SIZES
from benchmarks.lists.state import State

Step = Callable[[State], Tensor | None]


@dataclass(frozen=True)
class Provider:
    """One way of doing the task.

    ``moved``: bytes a float32 parameter that its operations read and write, without what a cache
    line costs that is read before it is written. ``flat``: it is given the state as one tensor a
    list. ``most_tensors``: where compiling takes too long to wait for, since torch.compile emits
    one kernel a tensor.
    """

    name: str
    step: Step
    moved: int
    flat: bool = False
    most_tensors: int | None = None

    def skip_reason(self, tensors: int, has_flat: bool, quick: bool = False) -> str | None:
        if self.flat and tensors == 1:
            return "the list is one flat tensor already"
        if self.flat and not has_flat:
            return "a second copy of this size would not fit small machines"
        most = self.most_tensors
        if most is not None and tensors > (min(most, QUICK_TENSORS) if quick else most):
            return f"compiling {tensors:,} tensors takes too long"
        return None


QUICK_TENSORS = 10  # most to compile in a quick run


@dataclass(frozen=True)
class Job:
    """A task and its providers, ours first."""

    name: str
    title: str
    about: str
    bytes_per_parameter: int  # that one pass has to move, float32
    providers: Sequence[Provider]
    written: Callable[[State], list[Tensor]]  # what the task changes
    expected: Callable[[State], tuple[list[Tensor], Tensor | None]]  # from float64
    streams: Callable[[State], list[list[Tensor]]]  # of the roofline, the written ones first
    sizes: Sequence[str] = tuple(SIZES)
    quick: Sequence[str] = ("mlp",)  # sizes of a quick run

    @property
    def ours(self) -> str:
        return self.providers[0].name


def compiled(step: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """For fixed shapes and as one graph: the most that torch.compile can be asked for."""
    return torch.compile(step, dynamic=False, fullgraph=True)
