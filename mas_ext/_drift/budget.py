"""The drift budget: how much a task may change what was learned before it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mas_ext._drift.metrics import Metric, resolve
from mas_ext.importance.batches import Forward
from mas_ext.importance.loop import check_data

DEFAULT_LIMIT = 0.08  # nats per prediction, from `python -m benchmarks drift`
SAMPLES = 256
SLACK = 3.0


@dataclass(frozen=True, eq=False)
class DriftBudget:
    r"""How far a task may drift: the limit, and how the drift is measured.

    With a budget, a MAS keeps a few unlabelled samples of every task, the references, and compares
    the model's outputs for them with those at the beginning of the present task. λ then follows the
    measured drift (:meth:`mas_ext.MAS.attach`), and :meth:`mas_ext.MAS.settle` enforces the limit
    when the task has been trained.

    Args:
        limit: of the drift per task, above 0, in the unit of ``metric``. 0.1 nats is a small
            change for a classifier or a language model: on average, a prediction that had
            probability p has about p · e^-0.1 = 0.90 p.
        metric: how two outputs for a sample are compared:

            - ``"kl"``: :math:`\sum_c p_c \log (p_c / q_c)` in nats, where p is the softmax of the
              outputs before and q that of the outputs now, averaged over predictions. The classes
              are in the last dimension, [B, C] or [B, T, C], and in dimension 1 of images,
              [B, C, H, W]. Positions where a batch's ``attention_mask`` is 0 do not count.
            - ``"relative"``: :math:`E\lVert F - F_\text{before}\rVert^2 /
              E\lVert F_\text{before}\rVert^2`, for outputs that are not logits.
            - ``callable(before, now) -> [B]``: one number per sample, 0 where nothing changed.
        reference: the references, as unlabelled batches in the form of
            :func:`mas_ext.estimate_importance`'s data. They need not be data that the model has
            seen: text that it has written serves too. None: samples of each task's own data, which
            :meth:`mas_ext.MAS.consolidate` keeps.
        samples: how many references to keep of each task (of all processes together), chosen at
            random; of ``reference``, too.
        every: how many steps of the optimizer lie between two measurements; at the beginning of a
            task there are fewer. None: 20, which takes 2 to 4 % of the time, if the data that
            importance is measured on has batches as large as in training.
        slack: during training, λ steers the drift towards this many times the limit, at least 1.
            Going beyond the limit and coming back by settling learns more than staying within it
            throughout.
        forward: ``callable(model, batch)`` for references, as in
            :func:`mas_ext.estimate_importance`. None: that with which the task was measured.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    limit: float = DEFAULT_LIMIT
    metric: Metric = "kl"
    reference: Iterable[Any] | None = None
    samples: int = SAMPLES
    every: int | None = None
    slack: float = SLACK
    forward: Forward | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit))
        resolve(self.metric)
        check_count("samples", self.samples)
        if self.every is not None:
            check_count("every", self.every)
        if isinstance(self.slack, bool) or not isinstance(self.slack, (int, float)):
            raise TypeError(f"slack is {self.slack!r}; pass a number")
        if not 1 <= self.slack < math.inf:
            raise ValueError(f"slack is {self.slack}; pass a finite number of at least 1")
        if self.reference is not None:
            check_data(self.reference, "reference")
        if self.forward is not None and not callable(self.forward):
            raise TypeError(f"forward is {self.forward!r}; pass a callable(model, batch) or None")

    @classmethod
    def of(cls, budget: Any) -> DriftBudget | None:
        """A budget from what a user passed: None, a number or a budget."""
        if budget is None or isinstance(budget, cls):
            return budget
        return cls(budget)


def check_limit(limit: Any) -> float:
    """Returns a limit as a float; raises if it is not a finite number above zero."""
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise TypeError(f"budget is {limit!r}; pass a number or a mas_ext.DriftBudget")
    if not 0 < limit < math.inf:
        raise ValueError(f"budget: the limit is {limit}; pass a finite number above 0, such as 0.1")
    return float(limit)


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; pass a positive whole number")
