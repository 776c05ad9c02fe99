"""One sequence of tasks, learned with one strength after another from the same first task.

Nothing is held in place while the first task is learned, so it is learned, and its Ω measured, once
for all strengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.drift.networks import made
from benchmarks.drift.problems import Problem
from mas_ext import MAS
from mas_ext._penalty.auto_strength import pushed_by
from mas_ext.demo.data import Digits, load_digits
from mas_ext.demo.learning import accuracy, batches_of, measured_objective
from mas_ext.demo.metrics import average_accuracy, forgetting
from mas_ext.demo.scenarios import Task, make_tasks

MEASURED = 1000  # images of a task that Ω is measured on


@dataclass
class Learner:
    """What there is between two tasks.

    Attributes:
        matrix: a row a task learned so far, see :mod:`mas_ext.demo.metrics`.
    """

    problem: Problem
    seed: int
    tasks: list[Task]
    model: nn.Module
    mas: MAS
    matrix: list[list[float]]

    @property
    def by_steps(self) -> bool:
        """Whether it is an optimizer's steps that push, and not the gradient."""
        optimizer = self.problem.optimizer(self.model.parameters())
        return pushed_by(optimizer, self.problem.mode) == "step"

    @classmethod
    def started(cls, problem: Problem, seed: int, count: int) -> Learner:
        """After the first task."""
        model = made(problem.network, seed)
        tasks = tasks_of(problem, seed, count)
        learner = cls(problem, seed, tasks, model, MAS(model, lambda_reg="auto"), [])
        learner.learn_next()
        return learner

    def outcome(self, **strength: Any) -> dict[str, float] | None:
        """What all tasks come to, from here; this learner stays where it is.

        Args:
            strength: what is set of :class:`MAS`: ``lambda_reg``, or ``drift``.

        Returns:
            Figures of :mod:`mas_ext.demo.metrics`; None where the network did not stay finite.
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
        """The next task: training, Ω, tests."""
        number = len(self.matrix)
        task, problem = self.tasks[number], self.problem
        optimizer = problem.optimizer(self.model.parameters())
        handle = self.mas.attach(optimizer, problem.mode)
        for images, labels in self.batches(task, number):
            optimizer.zero_grad()
            output = read(self.model(images), task) / problem.temperature
            cross_entropy(output, labels).backward()
            optimizer.step()
        handle.remove()
        measured = task.train.images[:: max(1, len(task.train) // MEASURED)]
        self.mas.consolidate(
            measured.split(problem.batch_size),
            objective=measured_objective(task),
        )
        self.matrix.append([accuracy(self.model, self._asked(task)) for task in self.tasks])

    def _asked(self, task: Task) -> Task:
        """A task as it is tested: among its own classes, or among all that were learned too."""
        if self.problem.scenario != "incremental":
            return task
        learned = self.tasks[: len(self.matrix) + 1]
        classes = {c for other in [task, *learned] for c in other.classes}
        return replace(task, classes=tuple(sorted(classes)))

    def batches(self, task: Task, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of all epochs, in an order of the seed and the task alone."""
        random = torch.Generator().manual_seed(1_000_003 * self.seed + number + 1)
        for _ in range(self.problem.epochs):
            order = torch.randperm(len(task.train), generator=random)
            yield from batches_of(task, self.problem.batch_size, order)


def read(output: Tensor, task: Task) -> Tensor:
    """The outputs that a task reads; the others were never taught to say anything."""
    return output if len(task.classes) == output.shape[1] else output[:, list(task.classes)]


def tasks_of(problem: Problem, seed: int, count: int) -> list[Task]:
    train, test = load_digits("bundled", "")
    every = max(1, len(train) // problem.images)
    some = Digits(train.images[::every].contiguous(), train.labels[::every].contiguous())
    scenario = "split" if problem.scenario == "incremental" else problem.scenario
    return make_tasks(scenario, count, seed, some, test)
