"""What is differentiated: one scalar per sample, made from the model's output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mas_ext.importance.batches import Batch

Objective = str | Callable[[Tensor], Tensor]
# The form in which objectives are called: (output, batch) -> scalars. None looks at the batch yet.
BatchObjective = Callable[[Tensor, Batch], Tensor]


def squared_l2(output: Tensor) -> Tensor:
    """‖F(x)‖²₂, the paper's."""
    return output.square().sum(1)


def l2(output: Tensor) -> Tensor:
    """‖F(x)‖₂."""
    return torch.linalg.vector_norm(output, dim=1)


def l1(output: Tensor) -> Tensor:
    """‖F(x)‖₁."""
    return output.abs().sum(1)


OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "squared_l2": squared_l2,
    "l2": l2,
    "l1": l1,
}


def resolve(objective: Objective) -> BatchObjective:
    """The function from output [B, …] to scalars [B] that ``objective`` stands for.

    Raises:
        ValueError: an unknown name; later, a callable's result that is not [B].
    """
    if callable(objective):
        return _checked(objective)
    if objective not in OBJECTIVES:
        names = ", ".join(map(repr, OBJECTIVES))
        raise ValueError(f"objective: {objective!r} is unknown; use {names} or a callable")
    named = OBJECTIVES[objective]
    return lambda output, batch: named(_rows(_at_least_float32(output)))


def _rows(output: Tensor) -> Tensor:
    return output.unsqueeze(1) if output.dim() == 1 else output.flatten(1)


def _at_least_float32(output: Tensor) -> Tensor:
    """Half precision is summed in float32."""
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output


def _checked(objective: Callable[[Tensor], Tensor]) -> BatchObjective:
    def scalars(output: Tensor, batch: Batch) -> Tensor:
        result = objective(output)
        if not isinstance(result, Tensor) or result.shape != output.shape[:1]:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"objective: the callable returned {got} for an output of shape "
                f"{list(output.shape)}; it must return one scalar per sample, [{len(output)}]"
            )
        return result

    return scalars
