"""What is measured: the parameter shapes of real models, and two extremes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Shapes = list[torch.Size]


@dataclass(frozen=True)
class Size:
    """One list of parameter shapes; a function, so that nothing is built that is not asked for."""

    title: str
    shapes: Callable[[], Shapes]


def _parameter_shapes(build: Callable[[], torch.nn.Module]) -> Shapes:
    """The shapes of a model that is never given memory; ``parameters`` has tied ones once."""
    with torch.device("meta"):
        return [p.shape for p in build().parameters()]


def resnet50() -> Shapes:
    from torchvision.models import resnet50 as model

    return _parameter_shapes(model)


def gpt2() -> Shapes:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _parameter_shapes(lambda: GPT2LMHeadModel(GPT2Config()))


SIZES = {
    "resnet50": Size("ResNet-50", resnet50),
    "gpt2": Size("GPT-2", gpt2),
    "small": Size("1,000 small tensors", lambda: [torch.Size([64])] * 1000),
    "flat": Size("one flat tensor", lambda: [torch.Size([64 * 2**20])]),
}
QUICK = ("resnet50", "small")
