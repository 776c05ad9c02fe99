"""Makes a sequence of tasks from one set of digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mas_ext.demo.data import CLASSES, PIXELS, SIDE, Digits

DEGREES_PER_TASK = 20
EVERY_CLASS = tuple(range(CLASSES))


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Attributes:
        name: the name that reports show.
        train, test: the task's digits.
        classes: the network's outputs that this task reads, in ascending order.
    """

    name: str
    train: Digits
    test: Digits
    classes: tuple[int, ...] = EVERY_CLASS


def make_tasks(scenario: str, count: int, seed: int, train: Digits, test: Digits) -> list[Task]:
    """The first ``count`` tasks of a scenario; a larger count only adds tasks."""
    return _SCENARIOS[scenario](count, seed, train, test)


def permutations(count: int, seed: int) -> list[Tensor]:
    """One order of pixels per task: the original for the first, fixed random ones for others."""
    random = torch.Generator().manual_seed(seed)
    shuffled = [torch.randperm(PIXELS, generator=random) for _ in range(count - 1)]
    return [torch.arange(PIXELS), *shuffled]


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Images [N, 784], rotated anticlockwise about the centre, bilinearly, with black outside."""
    if degrees % 360 == 0:
        return images  # without interpolation, which would round
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    # affine_grid takes the map from output to input pixels; its y axis points down.
    matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    square = images.reshape(-1, 1, SIDE, SIDE)
    grid = functional.affine_grid(matrix, list(square.shape), align_corners=False)
    return functional.grid_sample(square, grid, align_corners=False).reshape(-1, PIXELS)


def _permuted(count: int, seed: int, train: Digits, test: Digits) -> list[Task]:
    orders = permutations(count, seed)
    names = ["as they are", *(f"permutation {number}" for number in range(1, count))]
    return [
        Task(name, _permute(train, order), _permute(test, order))
        for name, order in zip(names, orders, strict=True)
    ]


def _permute(digits: Digits, order: Tensor) -> Digits:
    return Digits(digits.images[:, order], digits.labels)


def _rotated(count: int, seed: int, train: Digits, test: Digits) -> list[Task]:
    return [
        Task(f"{angle}°", _turn(train, angle), _turn(test, angle))
        for angle in range(0, DEGREES_PER_TASK * count, DEGREES_PER_TASK)
    ]


def _turn(digits: Digits, degrees: float) -> Digits:
    return Digits(rotate(digits.images, degrees), digits.labels)


def _split(count: int, seed: int, train: Digits, test: Digits) -> list[Task]:
    pairs = [(first, first + 1) for first in range(0, 2 * count, 2)]
    return [
        Task(f"{a} or {b}", train.of_classes((a, b)), test.of_classes((a, b)), (a, b))
        for a, b in pairs
    ]


_SCENARIOS: dict[str, Callable[[int, int, Digits, Digits], list[Task]]] = {
    "permuted": _permuted,
    "rotated": _rotated,
    "split": _split,
}
