r"""λ without tuning: you say how far the output may drift, and λ follows.

A parameter that a new task pushes away from its anchor comes to rest where the penalty pulls just
as hard, :math:`\lambda\Omega_i\delta_i = u_i`. :math:`\Omega_i` is how much the output's energy
:math:`\|F(x)\|^2` changes with that parameter, so its displacement changes the energy by
:math:`\pm u_i/\lambda`, and all parameters together change it by :math:`c\,\|u\|_1/\lambda`, where
c is how much more often the signs agree than not. Setting that to a fraction ε of the energy E on
the tasks learned so far gives

.. math:: \lambda = \frac{c\,\|u\|_1}{\varepsilon E}

The push u depends on the optimizer. One that normalizes its updates, as Adam does, pushes all
parameters alike, and a proximal step after it sees :math:`u_i = 1`. A penalty whose gradient is
added to the loss's, or a proximal step after SGD, meets the new task's gradient. That gradient is
not known yet, but it passes through the same network: a loss whose gradient with respect to the
outputs is about one, as cross-entropy's is at first, has gradients of about
:math:`\Omega_i/2\sqrt E`, of which averaging over a batch and over training leaves a part.

With a drift budget, the first step of a task shows the gradient, and corrects a λ that is far too
large (:mod:`mas_ext._drift.controller`).

Two constants are measured, not derived: :data:`COHERENCE` and :data:`LASTING`. Run
``python -m benchmarks drift`` to measure them again.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch.optim import Optimizer

DEFAULT_DRIFT = 0.2
COHERENCE = 0.01  # c, over all parameters, also those that training ends too soon to displace fully
LASTING = 0.4  # the part of Ω/2√E that lasts over a training
STIFFNESS = 10.0  # λ times the mean of Ω, where a drift budget is to adjust it

UpdateKind = Literal["gradient", "normalized"]


class Lambdas(NamedTuple):
    """λ of one group of parameters, by what the optimizer's updates are like.

    Attributes:
        gradient: for updates in proportion to the gradient: :meth:`mas_ext.MAS.penalty`,
            ``add_penalty_grad_``, and the proximal step after SGD.
        normalized: for updates of one size: the proximal step after Adam and its like.
    """

    gradient: float
    normalized: float


@dataclass(frozen=True)
class OutputEnergy:
    """E: the objective's mean over samples, E‖F(x)‖² by default, averaged over tasks."""

    mean: float = 0.0
    tasks: int = 0

    def with_task(self, samples: int, mean: float) -> OutputEnergy:
        """With one more task; unchanged if an earlier mas_ext measured it and kept no energy."""
        if not samples:
            return self
        tasks = self.tasks + 1
        return OutputEnergy(self.mean + (mean - self.mean) / tasks, tasks)


@dataclass
class GroupStatistics:
    """What λ of a group of parameters is found from.

    Attributes:
        numel: how many scalar parameters the group has.
        importance: Σ Ω over them, for the mean Ω of a task.
    """

    numel: int = 0
    importance: float = 0.0

    def lambdas(self, drift: float, energy: float | None) -> Lambdas:
        """λ for a drift ε and an energy E; where E is None, a λ for a budget to start from."""
        if energy is None:
            mean = self.importance / max(self.numel, 1)
            strength = STIFFNESS / mean if mean > 0 else 0.0
            return Lambdas(strength * LASTING * math.sqrt(mean), strength)
        share = drift * energy
        scale = COHERENCE / share if share > 0 else math.inf  # too small for a float
        push = LASTING * self.importance / (2 * math.sqrt(energy))
        return Lambdas(scale * push, scale * self.numel)


def check_drift(value: Any) -> float:
    """Returns ``value`` as a float; raises if it is not a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"drift is {value!r}; pass a number, or a mapping from lambda_reg's patterns to numbers"
        )
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"drift is {value}; pass a finite number above 0, such as {DEFAULT_DRIFT}")
    return float(value)


def check_energy(mean: float) -> None:
    """Raises ValueError if drift cannot be a fraction of this energy."""
    if not mean > 0:
        raise ValueError(
            f"lambda_reg='auto': the objective's mean is {mean:g}, and drift is a fraction of it; "
            "use an objective that is positive, or pass a number for lambda_reg"
        )


def update_kind(optimizer: Optimizer, mode: str) -> UpdateKind:
    """Which of :class:`Lambdas` suits an optimizer, in a mode of :meth:`mas_ext.MAS.attach`."""
    return "normalized" if mode == "proximal" and normalizes_updates(optimizer) else "gradient"


def normalizes_updates(optimizer: Optimizer) -> bool:
    """Whether an optimizer scales its updates to the learning rate, as all but SGD's do."""
    inner = getattr(optimizer, "optim", optimizer)  # the optimizer that ZeroRedundancy shards
    return not any("SGD" in kind.__name__ for kind in type(inner).__mro__)
