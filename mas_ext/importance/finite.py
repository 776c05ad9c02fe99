"""What is not finite is refused before it is remembered."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def check_finite(sums: Mapping[str, Tensor]) -> None:
    """Refuses what would make Ω NaN or Inf."""
    for name, total in sums.items():
        # Of numbers that are not negative, the sum tells, and takes one pass over memory.
        if not torch.isfinite(total.sum()) and not torch.isfinite(total).all():
            raise ValueError(
                f"the gradient of parameter {name!r} is NaN or Inf for some sample; nothing was "
                "changed. Check the objective, or compute in a wider dtype"
            )
