"""What is measured: the parameter shapes of real models, and the extremes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

Shapes = list[torch.Size]


@dataclass(frozen=True)
class Size:
    """One list of parameter shapes; a function, so that nothing is built that is not asked for.

    ``has_flat``: whether there is room for the same state once more, as one tensor a list.
    """

    title: str
    shapes: Callable[[], Shapes]
    has_flat: bool = True


def linear(*widths: int) -> Shapes:
    """Weights and biases of linear layers."""
    layers = pairwise(widths)
    return [shape for n, m in layers for shape in (torch.Size([m, n]), torch.Size([m]))]


def _parameter_shapes(build: Callable[[], torch.nn.Module]) -> Shapes:
    """The shapes of a model that is never given memory; ``parameters`` has tied ones once."""
    with torch.device("meta"):
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
