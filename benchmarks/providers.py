"""What a benchmark consists of: a task, a reference, and the ways of doing it side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.state import State

Step = Callable[[State], Tensor | None]


@dataclass(frozen=True)
class Provider:
    """One way of doing the task.

    ``flat``: it is given the state as one tensor a list. ``most_tensors``: where compiling takes
    too long to wait for, since torch.compile emits one kernel a tensor.
    """

    name: str
    step: Step
    flat: bool = False
    most_tensors: int | None = None

    def skip_reason(self, state: State) -> str | None:
        count = len(state.params)
        if self.flat and count == 1:
            return "the list is one flat tensor already"
        if not self.flat and self.most_tensors is not None and count > self.most_tensors:
            return f"compiling {count:,} tensors takes many minutes"
        return None


@dataclass(frozen=True)
class Benchmark:
    """A task and its providers, ours first."""

    name: str
    title: str
    bytes_per_parameter: int  # that one pass has to move, float32
    providers: Sequence[Provider]
    written: Callable[[State], list[Tensor]]  # what the task changes
    expected: Callable[[State], tuple[list[Tensor], Tensor | None]]  # from float64
    streams: Callable[[State], list[list[Tensor]]]  # of the roofline, the written one first

    @property
    def ours(self) -> str:
        return self.providers[0].name


def compiled(step: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """For fixed shapes and as one graph: the most that torch.compile can be asked for."""
    return torch.compile(step, dynamic=False, fullgraph=True)
