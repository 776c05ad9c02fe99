"""What a state says of an optimizer's steps that the proximal step has yet to follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mas_ext._storage.stored_numbers import is_whole
from mas_ext._strength.auto import UpdateKind


class StoredSteps(NamedTuple):
    """Of one parameter group, under the name of its first protected parameter.

    Attributes:
        steps: how many.
        rate: Σ η.
        update: the kind of update that the optimizer makes.
    """

    steps: int
    rate: float
    update: UpdateKind


def check_stored(pending: Mapping[str, Any]) -> dict[str, StoredSteps]:
    """What a state says of pending steps; ValueError if it makes no sense."""
    for name, entry in pending.items():
        match entry:
            case [steps, float(rate), "gradient" | "normalized"]:
                if is_whole(steps, 1) and 0 <= rate < math.inf:
                    continue
        raise ValueError(f"the state is damaged: the pending steps of {name!r} are {entry!r}")
    return {name: StoredSteps(*entry) for name, entry in pending.items()}
