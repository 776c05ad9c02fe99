"""The networks of the study, all from flat images [N, 784] to ten numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mas_ext.demo.data import CLASSES, PIXELS, SIDE

PATCH = 7


def mlp(*hidden: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    sizes = (PIXELS, *hidden)
    layers: list[nn.Module] = []
    for before, after in zip(sizes, hidden, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], CLASSES))


def cnn(channels: int = 16) -> nn.Module:
    """Three strided convolutions and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        nn.Conv2d(1, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * channels, 4 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * channels * 16, CLASSES),
    )


class Transformer(nn.Module):
    """A small vision transformer: 16 patches, two blocks, the mean of what comes out."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.position = nn.Parameter(0.02 * torch.randn(PIXELS // PATCH**2, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        side = SIDE // PATCH
        patches = images.view(-1, side, PATCH, side, PATCH).transpose(2, 3)
        tokens = self.embed(patches.reshape(len(images), side * side, -1)) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class Louder(nn.Module):
    """A network whose output is multiplied by a number."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * self.network(images)


def made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """With the same parameters for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
