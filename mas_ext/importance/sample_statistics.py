"""How much data a measurement has seen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """Of one batch, of a task, or of a process; what is seen apart adds up.

    Attributes:
        samples: how many.
        weight: what they add to N, by which the sums are divided: samples, or batches.
        energy: Σ s_k over the samples, of the objective: Σ‖F(x)‖² unless another was asked for.
    """

    samples: int = 0
    weight: int = 0
    energy: float = 0.0

    @classmethod
    def batch(cls, scalars: Tensor, weighting: str) -> Seen:
        """Of s_k [B] of a batch."""
        samples = len(scalars)
        weight = samples if weighting == "samples" else min(samples, 1)
        return cls(samples, weight, float(scalars.double().sum()))

    @property
    def mean_energy(self) -> float:
        """Σ s_k / N; 0 for no samples."""
        return self.energy / self.samples if self.samples else 0.0

    def __add__(self, other: Seen) -> Seen:
        return Seen(
            self.samples + other.samples, self.weight + other.weight, self.energy + other.energy
        )
