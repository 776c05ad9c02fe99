"""Metrics of continual learning, computed from an accuracy matrix R.

``matrix[t][j]`` is the accuracy on task j after learning task t, from 0 to 1. For T tasks, the
matrix has T rows and T columns.
"""

from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]

DEFINITIONS = {
    "accuracy_matrix": "R[t][j] is the accuracy on task j after learning task t.",
    "average_accuracy": "The mean of the last row: how well all T tasks are known at the end.",
    "forgetting": "The mean, over the first T − 1 tasks, of the best accuracy before the last "
    "task minus the accuracy at the end (Chaudhry et al., ECCV 2018). Lower is better.",
    "backward_transfer": "The mean, over the first T − 1 tasks, of the accuracy at the end minus "
    "the accuracy right after learning the task (Lopez-Paz and Ranzato, NeurIPS 2017). Negative: "
    "later tasks did harm.",
    "seconds": "Wall-clock time of learning and of measuring Ω, without testing.",
}


def average_accuracy(matrix: Matrix) -> float:
    r""":math:`\frac{1}{T}\sum_j R_{T,j}`: the mean of the last row."""
    return _mean(matrix[-1])


def forgetting(matrix: Matrix) -> float:
    r""":math:`\frac{1}{T-1}\sum_{j<T} \left(\max_{t<T} R_{t,j} - R_{T,j}\right)`; 0 for one task.

    Source: Chaudhry et al., ECCV 2018, https://arxiv.org/abs/1801.10112.
    """
    *before, last = matrix
    return _mean([max(row[j] for row in before) - last[j] for j in range(len(before))])


def backward_transfer(matrix: Matrix) -> float:
    r""":math:`\frac{1}{T-1}\sum_{j<T} (R_{T,j} - R_{j,j})`; 0 for one task.

    Source: Lopez-Paz and Ranzato, NeurIPS 2017, https://arxiv.org/abs/1706.08840.
    """
    return _mean([matrix[-1][j] - matrix[j][j] for j in range(len(matrix) - 1)])


def accuracy_so_far(matrix: Matrix) -> list[float]:
    """For each task, the mean accuracy over all tasks learned so far, after learning it."""
    return [_mean(row[: t + 1]) for t, row in enumerate(matrix)]


def first_task_accuracy(matrix: Matrix) -> list[float]:
    """For each task, the accuracy on the first task after learning it."""
    return [row[0] for row in matrix]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
