"""Three models, a batch for each, and the optimizer that such a model is usually trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.per_sample.workloads import LENGTH, VOCABULARY, gpt2

LR = 1e-4  # small, so that thousands of steps on one batch stay ordinary


@dataclass(frozen=True)
class Model:
    """``sample``: inputs and targets, from their number; ``optimizer``: of torch.optim.

    ``task``: how many samples a task has that ends.
    """

    title: str
    details: str
    build: Callable[[], nn.Module]
    sample: Callable[[int], tuple[Tensor, Tensor]]
    batch_size: int
    task: int
    optimizer: str
    options: dict[str, Any]

    def model(self) -> nn.Module:
        """The same weights at every call."""
        torch.manual_seed(0)
        return self.build().train()

    def batch(self, size: int | None = None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        return self.sample(size or self.batch_size)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def resnet18() -> nn.Module:
    from torchvision.models import resnet18 as model

    return model(num_classes=10)


class Language(nn.Module):
    """A language model as a function from tokens to one row a sample, as Avalanche needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits.flatten(1)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy; of every position where the target has positions."""
    return cross_entropy(output.view(target.numel(), -1), target.flatten())


def _labelled(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda count: (torch.randn(count, *shape), torch.randint(10, (count,)))


def _text(count: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (count, LENGTH + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


_MOMENTUM = {"lr": LR, "momentum": 0.9}
MODELS = {
    "mlp": Model("MLP", "784-256-256-10", mlp, _labelled(784), 128, 256, "SGD", _MOMENTUM),
    "resnet18": Model(
        "ResNet-18",
        "torchvision's, 3×32×32",
        resnet18,
        _labelled(3, 32, 32),
        64,
        128,
        "SGD",
        _MOMENTUM,
    ),
    "gpt2": Model(
        "GPT-2",
        f"d=256, T={LENGTH}, 4 layers, V={VOCABULARY:,}",
        lambda: Language(gpt2()),
        _text,
        16,
        32,
        "AdamW",
        {"lr": LR},
    ),
}
QUICK = ("mlp",)
