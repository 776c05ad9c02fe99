"""A sequence of tasks, learned with one strength after another from the same first task.

No penalty acts during the first task, so it is learned, and its Ω measured, once for all strengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.drift.problems import Problem, seeded
from mas_ext import MAS
from mas_ext._strength.auto import update_kind
from mas_ext.demo.data import Digits, load_digits
from mas_ext.demo.learning import accuracy, batches_of, forward_of
from mas_ext.demo.metrics import average_accuracy, forgetting
from mas_ext.demo.scenarios import Task, make_tasks

MEASURED = 1000  # images of a task on which Ω is measured


@dataclass
class Learner:
    """The state between two tasks.

    ``matrix``: accuracies, a row per task learned so far, see :mod:`mas_ext.demo.metrics`.
    """

    problem: Problem
    seed: int
    tasks: list[Task]
    model: nn.Module
    mas: MAS
    matrix: list[list[float]]

    @classmethod
    def after_first_task(cls, problem: Problem, seed: int, count: int) -> Learner:
        model = seeded(problem.network, seed)
        tasks = tasks_of(problem, seed, count)
        learner = cls(problem, seed, tasks, model, MAS(model, lambda_reg="auto"), [])
        learner.learn_next()
        return learner

    @property
    def strength(self) -> Any:
        """The λ that the drift comes to."""
        kind = update_kind(self.problem.optimizer(self.model.parameters()), self.problem.mode)
        return self.mas.lambda_proximal if kind == "normalized" else self.mas.lambda_reg

    def outcome(self, **strength: Any) -> dict[str, float] | None:
        """Learns the remaining tasks with a copy of this learner.

        Args:
            strength: attributes of :class:`MAS` to set: ``lambda_reg`` or ``drift``.

        Returns:
            Figures of :mod:`mas_ext.demo.metrics`; None if the network did not stay finite.
        """
        learner = deepcopy(self)
        for name, value in strength.items():
            setattr(learner.mas, name, value)
        try:
            while len(learner.matrix) < len(learner.tasks):
                learner.learn_next()
        except ValueError:  # an output is not finite
            return None
        return {
            "average_accuracy": average_accuracy(learner.matrix),
            "forgetting": forgetting(learner.matrix),
        }

    def learn_next(self) -> None:
        """Trains on the next task, consolidates it, and tests all tasks."""
        number = len(self.matrix)
        task, problem = self.tasks[number], self.problem
        optimizer = problem.optimizer(self.model.parameters())
        handle = self.mas.attach(optimizer, problem.mode)
        for images, labels in self.batches(task, number):
            optimizer.zero_grad()
            cross_entropy(outputs_of(task, self.model(images)), labels).backward()
            optimizer.step()
        handle.remove()
        measured = task.train.images[:: max(1, len(task.train) // MEASURED)]
        batches = measured.split(problem.batch_size)
        self.mas.consolidate(batches, forward=forward_of(task))
        self.matrix.append([accuracy(self.model, self.as_tested(task)) for task in self.tasks])

    def as_tested(self, task: Task) -> Task:
        """The task with the classes among which it is tested."""
        if self.problem.scenario != "incremental":
            return task
        learned = self.tasks[: len(self.matrix) + 1]
        classes = {c for other in [task, *learned] for c in other.classes}
        return replace(task, classes=tuple(sorted(classes)))

    def batches(self, task: Task, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of all epochs, in an order that depends on the seed and the task alone."""
        random = torch.Generator().manual_seed(1_000_003 * self.seed + number + 1)
        for _ in range(self.problem.epochs):
            order = torch.randperm(len(task.train), generator=random)
            yield from batches_of(task, self.problem.batch_size, order)


def outputs_of(task: Task, output: Tensor) -> Tensor:
    """The outputs of the task's classes."""
    return output if len(task.classes) == output.shape[1] else output[:, list(task.classes)]


def tasks_of(problem: Problem, seed: int, count: int) -> list[Task]:
    train, test = load_digits("bundled", "")
    every = max(1, len(train) // problem.images)
    some = Digits(train.images[::every].contiguous(), train.labels[::every].contiguous())
    scenario = "split" if problem.scenario == "incremental" else problem.scenario
    return make_tasks(scenario, count, seed, some, test)
