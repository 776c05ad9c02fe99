r"""λ without tuning: how far what was learned may drift, instead of how strongly it is held.

A parameter that a new task pushes away from its anchor comes to rest where the penalty pulls as
hard, :math:`\lambda\Omega_i\delta_i = u_i`. :math:`\Omega_i` is how much the output's energy
:math:`\|F(x)\|^2` changes with that parameter, so it changes it by :math:`\pm u_i/\lambda`,
and all of them together by :math:`c\,\|u\|_1/\lambda`, where c is how much more often signs agree
than not. That this be a fraction ε of the energy E on the tasks learned so far gives

.. math:: \lambda = \frac{c\,\|u\|_1}{\varepsilon E}

The push u depends on who pushes. An optimizer that scales every parameter's step to its learning
rate, as Adam does, pushes all alike, and a proximal step after it sees :math:`u_i = 1`. A penalty
whose gradient joins the loss's, or a proximal step after SGD, meets the new task's gradient. That
is not known yet, but it comes through the same network: a loss that pulls at the outputs by about
one, as cross-entropy does at its start, has gradients of about :math:`\Omega_i/2\sqrt E`, of which
a batch and a training leave a part.

Two numbers are measured and not derived, :data:`COHERENCE` and :data:`LASTING`:
``python -m benchmarks drift``, and docs/choosing_lambda.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.optim import Optimizer

from mas_ext.importance.estimation import SampleStatistics

DEFAULT = 0.2
COHERENCE = 0.01  # c, of all parameters, also of those that never come as far as to their rest
LASTING = 0.4  # of Ω/2√E, over a training


class Lambdas(NamedTuple):
    """λ of one group of parameters, by what pushes them.

    Attributes:
        gradient: where the loss's gradient does: :meth:`MAS.penalty`, ``add_penalty_grad_``.
        step: where steps of one size do: the proximal step after Adam and its like.
    """

    gradient: float
    step: float


@dataclass(frozen=True)
class Energy:
    """E, the mean over tasks of a task's mean objective, E‖F(x)‖² unless another was asked for."""

    mean: float = 0.0
    tasks: int = 0

    def joined_by(self, seen: SampleStatistics) -> Energy:
        """With one more task, unless an earlier mas_ext measured it, and kept no energy."""
        if not seen.samples:
            return self
        tasks = self.tasks + 1
        return Energy(self.mean + (seen.mean_energy - self.mean) / tasks, tasks)


@dataclass
class Group:
    """What the λ of a group of parameters is found from.

    Attributes:
        numel: how many parameters they are.
        importance: Σ Ω over them, of a task's mean Ω.
    """

    numel: int = 0
    importance: float = 0.0

    def strengths(self, drift: float, energy: float) -> Lambdas:
        """λ for a drift ε and an energy E."""
        scale = COHERENCE / (drift * energy)
        push = LASTING * self.importance / (2 * math.sqrt(energy))
        return Lambdas(scale * push, scale * self.numel)


def check_drift(value: Any) -> float:
    """A finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"drift is {value!r}; pass a number, or a mapping from lambda_reg's globs to number"
        )
    if not 0 < value < math.inf:
        raise ValueError(f"drift is {value}; pass a finite number above 0, such as {DEFAULT}")
    return float(value)


def check_energy(mean: float) -> None:
    """Nothing can be a fraction of no energy."""
    if not mean > 0:
        raise ValueError(
            f"lambda_reg='auto': the objective's mean is {mean:g}, and drift is a fraction of it; "
            "use an objective that is positive, or pass a number for lambda_reg"
        )


def takes_equal_steps(optimizer: Optimizer) -> bool:
    """Whether an optimizer's steps are scaled to its learning rate, as all but SGD's are."""
    inner = getattr(optimizer, "optim", optimizer)  # what a ZeroRedundancyOptimizer shards
    return not any("SGD" in kind.__name__ for kind in type(inner).__mro__)


def pushed_by(optimizer: Optimizer, mode: str) -> str:
    """Which of :class:`Lambdas` holds against an optimizer, in a mode of :meth:`MAS.attach`."""
    return "step" if mode == "proximal" and takes_equal_steps(optimizer) else "gradient"
