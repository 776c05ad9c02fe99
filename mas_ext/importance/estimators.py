"""The estimators: how one batch adds to the raw sums of Ω.

A new estimator is one function here and its name in :data:`ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext import functional
from mas_ext.importance.batches import Forward, Inputs, check_rows, output_tensor, placed
from mas_ext.importance.local import local


@dataclass
class Estimation:
    """What stays the same from batch to batch."""

    model: nn.Module
    params: dict[str, Tensor]  # θ, by canonical name
    sums: dict[str, Tensor]  # Σ over samples, what the estimators add to
    objective: Callable[[Tensor], Tensor]
    forward: Forward | None
    found_gradient: bool = False  # whether any sample's scalar depended on a parameter
    coverage: dict[str, str] = field(default_factory=dict)  # where not the estimator's own name
    state: Any = None  # what an estimator keeps from batch to batch

    def scalars(self, inputs: Inputs, samples: int) -> Tensor:
        """s_k for every sample of a batch."""
        output = output_tensor(self.model(*inputs.args, **inputs.kwargs))
        return self._finite(self.objective(check_rows(output, samples)))

    def scalars_of_custom_batch(self, batch: Any) -> Tensor:
        """s_k for every sample of a batch that only ``forward`` understands."""
        assert self.forward is not None
        output = output_tensor(self.forward(self.model, batch))
        return self._finite(self.objective(output))

    def _finite(self, scalars: Tensor) -> Tensor:
        finite = torch.isfinite(scalars)
        if not finite.all():
            k = int((~finite).nonzero()[0])
            raise ValueError(
                f"the objective of sample {k} of a batch is {scalars[k].item()}: the model's "
                f"output is not finite there, and neither is the gradient of {self._suspect()}; "
                "nothing was changed. Check the inputs and the parameters for NaN and Inf"
            )
        return scalars

    def _suspect(self) -> str:
        """A parameter that is not finite itself, else the first one that would be spoilt."""
        bad = [name for name, p in self.params.items() if not torch.isfinite(p).all()]
        name = (bad or list(self.params))[0]
        return f"{name!r} (which holds NaN or Inf itself)" if bad else repr(name)

    def input_device(self) -> torch.device:
        """Where the model takes its inputs: the device of its first parameter."""
        return next(self.model.parameters()).device

    def add_gradient(self, scalar: Tensor, scale: float, keep_graph: bool = False) -> None:
        """sums += scale·|∂ scalar/∂θ|; a parameter the scalar does not depend on adds nothing."""
        if not scalar.requires_grad:
            return
        grads = torch.autograd.grad(
            scalar, list(self.params.values()), allow_unused=True, retain_graph=keep_graph
        )
        self.found_gradient |= any(g is not None for g in grads)
        used = [(s, g) for s, g in zip(self.sums.values(), grads, strict=True) if g is not None]
        for sums, dense in _by_device([(s, _dense(g)) for s, g in used]):
            functional.accumulate_importance_(sums, dense, scale)


def _dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.layout != torch.strided else grad


def _by_device(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Sums and gradients in one pair of lists a device; a model may span several."""
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for omega, grad in pairs:
        sums, grads = groups.setdefault(omega.device, ([], []))
        sums.append(omega)
        grads.append(grad)
    return list(groups.values())


# An estimator adds one batch, at most `limit` samples of it, and returns how many it added.
Estimator = Callable[[Estimation, Any, int], int]


def per_sample(estimation: Estimation, batch: Any, limit: int) -> int:
    r"""Exact: :math:`\sum_k |\partial s_k / \partial\theta|`, one sample at a time."""
    if estimation.forward is not None:
        return _per_sample_of_custom_batch(estimation, batch, limit)
    inputs = placed(Inputs.of(batch), estimation.input_device())
    count = min(inputs.size(), limit)
    for sample in inputs.samples(count):
        estimation.add_gradient(estimation.scalars(sample, 1)[0], scale=1.0)
    return count


def _per_sample_of_custom_batch(estimation: Estimation, batch: Any, limit: int) -> int:
    """How to cut such a batch into samples is not known: one forward, one backward a sample."""
    scalars = estimation.scalars_of_custom_batch(batch)
    count = min(len(scalars), limit)
    for k in range(count):
        estimation.add_gradient(scalars[k], scale=1.0, keep_graph=k + 1 < count)
    return count


def batch_mean(estimation: Estimation, batch: Any, limit: int) -> int:
    r"""What others compute: :math:`B\,|\frac{1}{B}\sum_k \partial s_k / \partial\theta|`.

    Gradients of opposite sign cancel before the absolute value, so this depends on how the data
    is cut into batches, and is at most the exact sum. Weighted by batch size: a short last batch
    counts for what it holds.
    """
    if estimation.forward is not None:
        scalars = estimation.scalars_of_custom_batch(batch)
    else:
        inputs = placed(Inputs.of(batch), estimation.input_device())
        scalars = estimation.scalars(inputs, inputs.size())
    scalars = scalars[:limit]
    # The absolute value of the batch's sum: B times that of its mean.
    estimation.add_gradient(scalars.sum(), scale=1.0)
    return len(scalars)


ESTIMATORS: dict[str, Estimator] = {"per_sample": per_sample, "batch": batch_mean, "local": local}


def resolve(name: str) -> Estimator:
    """The estimator of that name."""
    if name not in ESTIMATORS:
        names = ", ".join(map(repr, ESTIMATORS))
        raise ValueError(f"estimator: {name!r} is unknown; use {names}")
    return ESTIMATORS[name]
