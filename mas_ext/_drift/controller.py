r"""λ that follows the measured drift.

Let d be the drift, L what it is held at, and :math:`Q = \sum\Omega(\theta-\theta^*)^2`, which the
penalty gives exactly and for little. d is measured on a few references at a time, so it is noisy;
d/Q changes slowly, so it is averaged over measurements, and multiplied by the present Q.

Once the penalty balances the loss, d falls in proportion to 1/λ². Before that, d rises however
strong λ is, and a controller that looks at d alone would lower λ until the budget is spent. So λ is
only lowered if d, rising as it does, would stay below L for the next :data:`HORIZON` steps. It is
raised if d is above L and not about to fall below it.

Where λ is only predicted, the first step of a task tells whether it is far too large. In that step
the penalty is still 0, so the step is the loss's alone: it does the work w = Σ|gᵢδᵢ|, and leads to
:math:`d_1` and :math:`Q_1`. After :math:`t=\sqrt{L/d_1}` such steps, d would be L, and there the
penalty's pull balances the gradient if :math:`\lambda Q_1t^2 = wt`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FALL, RISE = 0.25, 0.5  # of log(d/L), how much log λ changes; balance would call for 0.5
HORIZON = 20.0  # steps over which the growth of d is extrapolated
AHEAD = 0.7  # what growth may add to log(d/L) where d is above L
STREAK = 4  # measurements above L in a row, after which λ is raised faster
FREQUENT = 12  # measurements of a task that may follow each other sooner
AVERAGED = 0.2  # weight of a new measurement in d/Q
LARGEST_CHANGE = math.log(100.0)  # of log λ, in one measurement
RANGE = math.log(1e12)  # of λ's factor, up and down


@dataclass
class Controller:
    """Changes the logarithm of λ after each measurement of the drift.

    Attributes:
        log_factor: of what λ is multiplied by.
        log_start: log_factor after the first step of the task.
        drift, size: averages of d and Q over the measurements of this task.
        last_size: Q at the last measurement.
        steps: of the optimizer since the task began.
        start: after how many of them λ was last given anew.
        step: after which the last measurement was.
        measured: the measurements since the task began.
        streak: how many of them in a row, up to the last, were above the limit.
    """

    log_factor: float = 0.0
    log_start: float = 0.0
    drift: float = 0.0
    size: float = 0.0
    last_size: float = 0.0
    steps: int = 0
    start: int = 0
    step: int = 0
    measured: int = 0
    streak: int = 0

    @property
    def factor(self) -> float:
        """What λ is multiplied by."""
        return math.exp(self.log_factor)

    def begin_task(self) -> Controller:
        """For the next task, which may conflict more: λ begins no lower than it was given."""
        return Controller(max(self.log_factor, 0.0))

    def begin_anew(self) -> Controller:
        """Within a task, for a λ that was given anew."""
        return Controller(steps=self.steps, start=self.steps, step=self.steps)

    def is_due(self, every: int) -> bool:
        """Whether to measure now: after 1, 2, 4, 8, … steps and then in every ``every`` steps.

        At first sooner where d is above L, since λ may be far too small.
        """
        wait = min(every, max(1, self.step - self.start))
        if self.streak and self.measured < FREQUENT:
            wait = min(wait, max(1, every // 4))
        return self.steps >= self.step + wait

    def follow(self, drift: float, size: float, limit: float) -> None:
        """Takes a measurement into account.

        Args:
            drift: d; Inf if the outputs are not finite.
            size: Q, in any unit.
            limit: L.
        """
        steps, self.step = self.steps - self.step, self.steps
        self.measured += 1
        if not math.isfinite(size):  # no λ brings such parameters back
            return
        if not math.isfinite(drift):
            self.streak += 1
            self._change(LARGEST_CHANGE)
            return
        weight = max(AVERAGED, 1 / self.measured)
        self.drift += weight * (drift - self.drift)
        self.size += weight * (size - self.size)
        before, self.last_size = self.last_size, size
        if not (size > 0 and self.drift > 0):
            return
        excess = math.log(self.drift / self.size * size / limit)
        self.streak = self.streak + 1 if excess > 0 else 0
        ahead = math.log(size / before) / steps * HORIZON if before > 0 else math.inf
        if excess < 0:
            expected = min(0.0, excess + max(ahead, 0.0))
        else:
            expected = max(0.0, excess + min(ahead, AHEAD))
        gain = FALL if excess < 0 else RISE * max(1.0, self.streak / STREAK)
        self._change(gain * expected)

    def _change(self, by: float) -> None:
        by = max(-LARGEST_CHANGE, min(LARGEST_CHANGE, by))
        self.log_factor = max(-RANGE, min(RANGE, self.log_factor + by))

    def limit_factor(self, largest: float) -> None:
        """Lowers λ where its factor is above ``largest``."""
        self.log_factor = min(self.log_factor, math.log(largest))

    def keep_above(self, least: float) -> None:
        """Raises λ where it is less than ``least`` of what it was after the first step."""
        self.log_factor = max(self.log_factor, self.log_start + math.log(least))

    def start_from(self, work: float, drift: float, size: float, limit: float) -> None:
        """Lowers λ after the first step of a task, if the drift could not come near the limit.

        Args:
            work: w.
            drift, size, limit: d₁, Q₁ in the unit that makes λ/2 · Q₁ the penalty, and L.
        """
        largest = work * math.sqrt(drift / limit) / size if size > 0 else 0.0
        if 0 < largest < math.inf:
            self.limit_factor(largest)
            self.log_start = min(0.0, math.log(largest))


def step_is_stable_up_to(scale: float) -> float:
    """The largest factor f with f · ηλΩ ≤ 1 for every parameter, given the largest ηλΩ.

    A gradient step diverges from 2 on.
    """
    return 1.0 / scale if scale > 0 else math.inf
