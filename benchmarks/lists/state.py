"""The tensors that providers work on: those of a model half-way through its second task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.lists.shapes import Shapes


@dataclass
class State:
    """One entry a parameter in each list. ``params[i].grad`` holds the task loss's gradient."""

    params: list[Tensor]
    anchors: list[Tensor]
    omega: list[Tensor]
    # Small, so that gradients that grow by λΩδ a call are still ordinary after thousands of calls.
    lambda_reg: float = 0.1
    # Large, or a proximal step would be too small to be checked; it settles at the anchors, and
    # goes on doing the same work there.
    lr: float = 1.0
    num_samples: int = 128
    names: list[str] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)  # by a provider, from one call to the next

    def __post_init__(self) -> None:
        self.names = [f"layer{i}.weight" for i in range(len(self.params))]

    @property
    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params]  # type: ignore[misc]

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return list(zip(self.names, self.params, strict=True))


def make_state(shapes: Shapes, seed: int = 0) -> State:
    """Values of the magnitude that training gives them, each tensor in memory of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.empty(shape).normal_(0, std, generator=generator)

    anchors = [normal(shape, 0.02) for shape in shapes]
    params = [(a + normal(a.shape, 0.01)).requires_grad_() for a in anchors]
    for p in params:
        p.grad = normal(p.shape, 0.01)
    omega = [torch.rand(shape, generator=generator) for shape in shapes]
    return State(params, anchors, omega)


def flatten(state: State) -> State:
    """The same values as one tensor a list: what a provider gains if its user keeps it so."""

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1) for t in tensors])

    param = flat(state.params).requires_grad_()
    param.grad = flat(state.grads)
    return State([param], [flat(state.anchors)], [flat(state.omega)])


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Compares as flat sequences, so that a flat state can be held against a list."""
    flat = [t.reshape(-1) for t in expected]
    target = torch.cat(flat) if len(actual) == 1 and len(flat) > 1 else None
    for i, tensor in enumerate(actual):
        want = flat[i] if target is None else target
        torch.testing.assert_close(
            tensor.reshape(-1),
            want,
            rtol=1e-5,
            atol=1e-7,
            msg=lambda text, i=i: f"{what}, tensor {i}: {text}",
        )


def in_float64(formula: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A formula's value in float64, so that rounding is not shared with what it judges."""
    return formula(*(t.detach().double() for t in tensors))
