"""A sequence of tasks, learned in one way after another from the same first task.

Nothing is protected during the first task, so it is learned, and its Ω measured, once for many.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.drift.problems import Problem, seeded
from mas_ext import EWC, MAS, DriftBudget
from mas_ext._strength.auto import update_kind
from mas_ext.demo.data import Digits, load_digits
from mas_ext.demo.learning import accuracy, batches_of
from mas_ext.demo.metrics import average_accuracy, forgetting
from mas_ext.demo.scenarios import Task, make_tasks
from mas_ext.quadratic import QuadraticRegularizer

MEASURED = 1000  # images of a task on which Ω is measured


@dataclass
class Learner:
    """The state between two tasks.

    Attributes:
        mas: its budget, λ and drift decide how the tasks are learned.
        penalty: whether the penalty acts during training.
        settle: the weights of :meth:`MAS.settle` at the end of each task; None: no settling.
        every: of :meth:`MAS.attach`.
        held_out: whether references are test images, every second one, and not training images.
        matrix: accuracies, a row per task learned so far, see :mod:`mas_ext.demo.metrics`.
        drifts: after each task but the first, KL of earlier tasks' other test images, in nats.
        unsettled: the drift of the references before settling.
    """

    problem: Problem
    seed: int
    tasks: list[Task]
    model: nn.Module
    mas: QuadraticRegularizer
    penalty: bool = True
    settle: str | None = None
    every: int = 1
    held_out: bool = False
    matrix: list[list[float]] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)
    unsettled: list[float] = field(default_factory=list)

    @classmethod
    def after_first_task(
        cls,
        problem: Problem,
        seed: int,
        count: int,
        budget: DriftBudget | None = None,
        held_out: bool = False,
        method: type[QuadraticRegularizer] = MAS,
    ) -> Learner:
        model = seeded(problem.network, seed)
        tasks = tasks_of(problem, seed, count)
        mas = method(model, lambda_reg="auto", budget=budget)
        learner = cls(problem, seed, tasks, model, mas, held_out=held_out)
        learner.learn_next()
        return learner

    @property
    def strength(self) -> Any:
        """The λ that the drift comes to."""
        kind = update_kind(self.problem.optimizer(self.model.parameters()), self.problem.mode)
        return self.mas.lambda_proximal if kind == "normalized" else self.mas.lambda_reg

    def outcome(
        self,
        penalty: bool = True,
        settle: str | None = None,
        every: int = 1,
        **strength: Any,
    ) -> dict[str, Any] | None:
        """Learns the remaining tasks with a copy of this learner.

        Args:
            penalty, settle, every: see the class.
            strength: attributes of :class:`MAS` to set: ``lambda_reg`` or ``drift``.

        Returns:
            Figures of :mod:`mas_ext.demo.metrics`, ``drifts`` and ``unsettled``; None if the
            network did not stay finite.
        """
        learner = deepcopy(self)
        learner.penalty, learner.settle, learner.every = penalty, settle, every
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
            "drifts": learner.drifts,
            "unsettled": learner.unsettled,
        }

    def learn_next(self) -> None:
        """Trains on the next task, consolidates it, and tests all tasks."""
        number = len(self.matrix)
        task, before = self.tasks[number], self._log_probabilities(number)
        self._train(task, number)
        if self.settle is not None:
            settled = self.mas.settle(weights=self.settle)
            self.unsettled += [settled.before] if number else []
        self._consolidate(task)
        self.matrix.append([accuracy(self.model, self.as_tested(task)) for task in self.tasks])
        if number:
            now = self._log_probabilities(number)
            pairs = zip(before, now, strict=True)
            kl = [float((p.exp() * (p - q)).sum(1).mean()) for p, q in pairs]
            self.drifts.append(sum(kl) / len(kl))

    def _train(self, task: Task, number: int) -> None:
        problem = self.problem
        optimizer = problem.optimizer(self.model.parameters())
        handle = None
        if self.penalty:
            handle = self.mas.attach(optimizer, problem.mode, self.every)
        for images, labels in self.batches(task, number):
            optimizer.zero_grad()
            cross_entropy(outputs_of(task, self.model(images)), labels).backward()
            optimizer.step()
        if handle is not None:
            handle.remove()

    def _consolidate(self, task: Task) -> None:
        measured = task.train.images[:: max(1, len(task.train) // MEASURED)]
        options = {"criterion": "exact_fisher"} if isinstance(self.mas, EWC) else {}
        with warnings.catch_warnings():  # of budgets that are exceeded, where nothing settles
            warnings.simplefilter("ignore")
            self.mas.consolidate(
                measured.split(self.problem.batch_size),
                reference=task.test.images[::2].split(64) if self.held_out else None,
                forward=partial(_outputs, task),
                **options,
            )

    @torch.no_grad()
    def _log_probabilities(self, count: int) -> list[Tensor]:
        """For the other test images of the first ``count`` tasks."""
        outputs = [outputs_of(t, self.model(t.test.images[1::2])) for t in self.tasks[:count]]
        return [output.log_softmax(1) for output in outputs]

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


def _outputs(task: Task, model: nn.Module, images: Tensor) -> Tensor:
    return outputs_of(task, model(images))


def outputs_of(task: Task, output: Tensor) -> Tensor:
    """The outputs of the task's classes."""
    return output if len(task.classes) == output.shape[1] else output[:, list(task.classes)]


def tasks_of(problem: Problem, seed: int, count: int) -> list[Task]:
    train, test = load_digits("bundled", "")
    every = max(1, len(train) // problem.images)
    some = Digits(train.images[::every].contiguous(), train.labels[::every].contiguous())
    scenario = "split" if problem.scenario == "incremental" else problem.scenario
    return make_tasks(scenario, count, seed, some, test)
