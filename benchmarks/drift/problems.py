"""What the study learns: scenarios, networks (from flat images [N, 784] to ten numbers), modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from benchmarks.models import mlp
from mas_ext.demo.data import CLASSES, PIXELS, SIDE

# Two values per decade over three decades: the best λ of two problems may be that far apart.
PROXIMAL = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
GRADIENT = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LIMITS = (0.03, 0.1, 0.3)  # of the drift, in nats per prediction
FACTORS = (1e-6, 1.0, 1e6)  # of the λ that training begins with
CHOSEN_ON = (
    "permuted",
    "permuted_deep",
    "permuted_sgd",
    "rotated",
    "rotated_cnn",
    "split",
    "incremental",
)  # the default budget and its slack; the other half judges them
PATCH = 7


# -- networks --------------------------------------------------------------------------------------
def classifier(*hidden: int) -> nn.Module:
    return mlp(PIXELS, *hidden, CLASSES)


def cnn(channels: int = 16) -> nn.Module:
    """Three strided convolutions and a linear layer."""
    widths, layers = (1, channels, 2 * channels, 4 * channels), [nn.Unflatten(1, (1, SIDE, SIDE))]
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels * 16, CLASSES))


class Transformer(nn.Module):
    """A small vision transformer: 16 patches, two blocks, mean pooling."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.position = nn.Parameter(0.02 * torch.randn(PIXELS // PATCH**2, width))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 4, 2 * width, **options) for _ in range(2))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        side = SIDE // PATCH
        patches = images.view(-1, side, PATCH, side, PATCH).transpose(2, 3)
        tokens = self.embed(patches.reshape(len(images), side * side, -1)) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The same parameters for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


# -- problems --------------------------------------------------------------------------------------
_ADAM = partial(Adam, lr=1e-3, fused=True)
_ADAMW = partial(AdamW, lr=1e-3, weight_decay=0.01, fused=True)
_SGD = partial(SGD, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Problem:
    """A sequence of tasks, and how it is learned.

    Attributes:
        scenario: ``"permuted"``, ``"rotated"``, ``"split"`` (each task has two classes and reads
            their outputs) or ``"incremental"`` (the same, tested among all classes learned so far).
        mode: of :meth:`mas_ext.MAS.attach`.
        lambdas: the grid of fixed λ.
        epochs, images, batch_size: of training, per task.
    """

    title: str
    scenario: str
    network: Callable[[], nn.Module]
    optimizer: partial[Optimizer] = _ADAM
    mode: str = "proximal"
    lambdas: tuple[float, ...] = PROXIMAL
    epochs: int = 6
    images: int = 4000
    batch_size: int = 64


_MLP = ("MLP 256-256", partial(classifier, 256, 256))
_DEEP = ("MLP 6 × 128", partial(classifier, *[128] * 6))
_GRADIENT = {"mode": "gradient", "lambdas": GRADIENT}


def _problem(
    scenario: str, network: tuple[str, Callable[[], nn.Module]], *args: Any, **options: Any
) -> Problem:
    title = "class-incremental" if scenario == "incremental" else scenario
    return Problem(f"{title}, {network[0]}", scenario, network[1], *args, **options)


PROBLEMS = {
    "permuted": _problem("permuted", _MLP),
    "permuted_small": _problem("permuted", ("MLP 64", partial(classifier, 64))),
    "permuted_deep": _problem("permuted", _DEEP, _ADAMW),
    "permuted_gradient": _problem("permuted", _MLP, **_GRADIENT),
    "permuted_sgd": _problem("permuted", _MLP, _SGD, **_GRADIENT),
    "rotated": _problem("rotated", _MLP, epochs=8),
    "rotated_wide": _problem(
        "rotated", ("MLP 1024", partial(classifier, 1024)), epochs=8, images=2000
    ),
    "rotated_sgd": _problem("rotated", _MLP, _SGD, lambdas=GRADIENT, epochs=8),
    "rotated_cnn": _problem("rotated", ("CNN", cnn), images=2000, epochs=8),
    "rotated_transformer": _problem(
        "rotated", ("transformer", Transformer), _ADAMW, images=2000, epochs=8
    ),
    "split": _problem("split", _MLP),
    "split_cnn": _problem("split", ("CNN", cnn), _ADAMW, **_GRADIENT),
    "split_transformer": _problem("split", ("transformer", Transformer), epochs=10),
    "incremental": _problem("incremental", _MLP),
}
QUICK = ("permuted_small",)
