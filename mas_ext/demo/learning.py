"""The network, and the loop in which each method learns the tasks in turn."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from mas_ext import DriftRecord, Settled
from mas_ext.demo.data import CLASSES, PIXELS
from mas_ext.demo.methods import METHODS, Method
from mas_ext.demo.scenarios import Task
from mas_ext.demo.settings import Settings
from mas_ext.importance.batches import Forward
from mas_ext.quadratic import QuadraticRegularizer

HIDDEN = 256
Batches = list[tuple[Tensor, Tensor]]
# Called with a word for the current work, and the number of images done since the last call.
Tick = Callable[[str, int], None]


class Learner:
    """A method at work on one model."""

    def __init__(self, method: Method, model: nn.Module, settings: Settings) -> None:
        self.method = method
        self.regularizer: QuadraticRegularizer | None = None
        if method.regularizer is not None:
            strength = getattr(settings, method.strength) if method.strength else None
            self.regularizer = method.regularizer(
                model,
                strength,
                budget=settings.budget if strength is None else None,
                **{name: getattr(settings, name) for name in method.settings},
            )

    def begin_task(self, optimizer: Optimizer) -> None:
        """Makes the penalty act in every step of the optimizer that will learn the task."""
        if self.regularizer is not None:
            # Each step is followed, so that the curves show what each step does.
            self.regularizer.attach(optimizer, mode=self.method.mode, every=1)

    def settle(self) -> Settled | None:
        """After training: moves the parameters back until within the budget, if there is one."""
        if self.regularizer is None or self.regularizer.budget is None:
            return None
        return self.regularizer.settle()

    def trace(self) -> list[DriftRecord]:
        """The measurements of the drift during the present task."""
        if self.regularizer is None:
            return []
        now = self.regularizer.num_tasks
        return [one for one in self.regularizer.drift_trace if one.task == now]

    def end_task(self, task: Task, batches: Batches, tick: Tick) -> None:
        """Measures Ω on the task's images, if the method has one, and takes θ* ← θ."""
        if self.regularizer is None:
            return
        options: dict[str, Any] = {"forward": forward_of(task)}
        if self.method.measures:
            options["progress"] = steps(tick, "measuring Ω")
        self.regularizer.consolidate([images for images, _ in batches], **options)

    def importance(self) -> dict[str, Tensor]:
        """A copy of Ω of all tasks so far by parameter name; empty if it is not measured."""
        if self.regularizer is None or not self.method.measures:
            return {}
        return {name: omega.clone() for name, omega in self.regularizer.importance.items()}

    def lambda_reg(self) -> float | None:
        """λ for the next task, in this method's mode; None for a method without λ."""
        if self.regularizer is None:
            return None
        is_proximal = self.method.mode == "proximal"
        found = self.regularizer.lambda_proximal if is_proximal else self.regularizer.lambda_reg
        return float(found)  # type: ignore[arg-type]


@dataclass
class Outcome:
    """The outcome of one method.

    Attributes:
        accuracy_matrix: see :mod:`mas_ext.demo.metrics`.
        seconds: the time to learn and to measure Ω, without tests.
        importance_seconds: the time to measure Ω.
        lambdas: λ after each task; None for a method without λ.
        drifts: for each task, the drift before and after settling; None without a budget.
        trace: the measurements of the drift during all tasks; empty if no λ follows a budget.
        importance: for each task, Ω by parameter name after it; empty if it is not measured.
        first_network: a copy of the network after the first task.
    """

    accuracy_matrix: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    importance_seconds: float = 0.0
    lambdas: list[float | None] = field(default_factory=list)
    drifts: list[Settled | None] = field(default_factory=list)
    trace: list[DriftRecord] = field(default_factory=list)
    importance: list[dict[str, Tensor]] = field(default_factory=list)
    first_network: nn.Module | None = None


def learn(method: str, tasks: list[Task], settings: Settings, tick: Tick) -> Outcome:
    """Learns the tasks in turn with one method, and tests on all tasks after each."""
    model = make_model(settings.seed)
    learner = Learner(METHODS[method], model, settings)
    outcome = Outcome()
    for number, task in enumerate(tasks):
        start = time.perf_counter()
        # A new optimizer for each task: moments of the last task mean nothing for this one.
        optimizer = Adam(model.parameters(), lr=settings.lr or 0.0, fused=True)
        learner.begin_task(optimizer)
        train(model, optimizer, task, number, settings, tick)
        outcome.trace += learner.trace()
        outcome.drifts.append(learner.settle())
        trained = time.perf_counter()
        learner.end_task(task, measured_batches(task, settings), tick)
        outcome.importance_seconds += time.perf_counter() - trained
        outcome.seconds += time.perf_counter() - start
        outcome.accuracy_matrix.append([accuracy(model, tested) for tested in tasks])
        outcome.lambdas.append(learner.lambda_reg())
        outcome.importance.append(learner.importance())
        outcome.first_network = outcome.first_network or deepcopy(model)
    return outcome


def make_model(seed: int) -> nn.Sequential:
    """784-256-256-10 with ReLU; the same parameters for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[tuple[str, nn.Module]] = [
            ("hidden1", nn.Linear(PIXELS, HIDDEN)),
            ("relu1", nn.ReLU()),
            ("hidden2", nn.Linear(HIDDEN, HIDDEN)),
            ("relu2", nn.ReLU()),
            ("output", nn.Linear(HIDDEN, CLASSES)),
        ]
        return nn.Sequential(OrderedDict(layers))


def train(
    model: nn.Module,
    optimizer: Optimizer,
    task: Task,
    number: int,
    settings: Settings,
    tick: Tick,
) -> None:
    """An ordinary training loop; the penalty is attached to the optimizer."""
    # Depends only on the seed and the task, so that every method sees the same batches.
    random = torch.Generator().manual_seed(1_000_003 * settings.seed + number + 1)
    classes = list(task.classes)
    for _ in range(settings.epochs or 0):
        order = torch.randperm(len(task.train), generator=random)
        for images, labels in batches_of(task, settings.batch_size, order):
            optimizer.zero_grad()
            cross_entropy(model(images)[:, classes], labels).backward()
            optimizer.step()
            tick("learning", len(labels))


def batches_of(
    task: Task, batch_size: int, order: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The task's training images, with labels that are positions among its classes."""
    images, labels = task.train.images, within(task, task.train.labels)
    if order is not None:
        images, labels = images[order], labels[order]
    yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)


def measured_batches(task: Task, settings: Settings) -> Batches:
    """The training images to measure Ω on: all, or ``importance_samples`` at equal distances."""
    total = len(task.train)
    count = min(settings.importance_samples or total, total)
    # Not the first ones, since the bundled digits are sorted by class.
    chosen = torch.arange(count) * total // count
    return list(batches_of(task, settings.batch_size, chosen))


def within(task: Task, labels: Tensor) -> Tensor:
    """Labels as positions among the task's classes."""
    return torch.bucketize(labels, torch.tensor(task.classes))


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """The fraction of the task's test images that are classified correctly among its classes."""
    predicted = model(task.test.images)[:, list(task.classes)].argmax(dim=1)
    return float((predicted == within(task, task.test.labels)).double().mean())


def forward_of(task: Task) -> Forward | None:
    """Gives only the outputs that a task reads, as the others were not trained on it; None: all."""
    if len(task.classes) == CLASSES:
        return None
    classes = list(task.classes)
    return lambda model, images: model(images)[:, classes]


def steps(tick: Tick, doing: str) -> Callable[[int], None]:
    """Makes a progress callable that takes totals out of one that takes increments."""
    done = 0

    def show(total: int) -> None:
        nonlocal done
        tick(doing, total - done)
        done = total

    return show
