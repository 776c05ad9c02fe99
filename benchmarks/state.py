"""The tensors that the list benchmarks work on: shapes of real models, half-way through a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Shapes = list[torch.Size]


@dataclass(frozen=True)
class Size:
    """A list of parameter shapes, built when it is asked for.

    ``has_flat``: whether there is memory for a second copy of the state, as one tensor per list.
    """

    title: str
    shapes: Callable[[], Shapes]
    has_flat: bool = True


def linear(*widths: int) -> Shapes:
    """Weights and biases of linear layers."""
    layers = pairwise(widths)
    return [shape for n, m in layers for shape in (torch.Size([m, n]), torch.Size([m]))]


def _parameter_shapes(build: Callable[[], nn.Module]) -> Shapes:
    with torch.device("meta"):  # needs no memory
        return [p.shape for p in build().parameters()]


def resnet50() -> Shapes:
    from torchvision.models import resnet50 as model

    return _parameter_shapes(model)


def gpt2(**config: int) -> Shapes:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _parameter_shapes(lambda: GPT2LMHeadModel(GPT2Config(**config)))


SIZES = {
    "tiny": Size("a linear layer", lambda: linear(4, 2)),
    "mlp": Size("MLP", lambda: linear(784, 256, 256, 10)),
    "resnet50": Size("ResNet-50", resnet50),
    "gpt2": Size("GPT-2", gpt2),
    "large": Size("a wider GPT-2", partial(gpt2, n_embd=1536, n_layer=6, n_head=16), False),
    "small": Size("1,000 small tensors", lambda: [torch.Size([64])] * 1000),
    "flat": Size("one flat tensor", lambda: [torch.Size([64 * 2**20])]),
}


@dataclass
class State:
    """Lists with one tensor per parameter; ``params[i].grad`` is the gradient of the task's loss.

    ``lambda_reg`` is small, so that gradients that grow by λΩδ per call stay ordinary numbers after
    thousands of calls. ``lr`` is large, or a proximal step would be too small to be verified.
    """

    params: list[Tensor]
    anchors: list[Tensor]
    omega: list[Tensor]
    lambda_reg: float = 0.1
    lr: float = 1.0
    num_samples: int = 128
    cache: dict[str, Any] = field(default_factory=dict)  # of a provider, between calls

    @property
    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params]  # type: ignore[misc]

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)


def make_state(shapes: Shapes, seed: int = 0, device: str = "cpu") -> State:
    """Values of the magnitude that training gives them, each tensor in memory of its own."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.empty(shape, device=device).normal_(0, std, generator=generator)

    anchors = [normal(shape, 0.02) for shape in shapes]
    params = [(a + normal(a.shape, 0.01)).requires_grad_() for a in anchors]
    for p in params:
        p.grad = normal(p.shape, 0.01)
    omega = [torch.rand(shape, generator=generator, device=device) for shape in shapes]
    return State(params, anchors, omega)


def flatten(state: State) -> State:
    """The same values as one tensor per list, as a user could keep them."""

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1) for t in tensors])

    param = flat(state.params).requires_grad_()
    param.grad = flat(state.grads)
    return State([param], [flat(state.anchors)], [flat(state.omega)])


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    """Compares as flat sequences, so that a flat state can be compared with a list."""
    flat = [t.reshape(-1) for t in expected]
    if len(actual) == 1 and len(flat) > 1:
        flat = [torch.cat(flat)]
    for i, (tensor, target) in enumerate(zip(actual, flat, strict=True)):
        torch.testing.assert_close(
            tensor.reshape(-1),
            target,
            rtol=1e-5,
            atol=1e-7,
            msg=lambda text, i=i: f"{what}, tensor {i}: {text}",
        )


def in_float64(formula: Callable[..., Any], *tensors: Tensor) -> Any:
    """The value of a formula in float64, which doesn't share the rounding of what it verifies."""
    return formula(*(t.detach().double() for t in tensors))
