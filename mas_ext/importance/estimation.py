"""What an estimator works with: the model, its parameters, the raw sums."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from mas_ext import functional
from mas_ext._distributed.shards import is_sharded, local, local_grad
from mas_ext.importance import objectives
from mas_ext.importance.batches import Batch, output_tensor
from mas_ext.importance.objectives import Objective

# The paths a parameter can take, from none to the slowest: one that took several shows the last.
PATHS = (
    "unused",
    "none",
    "local",
    "batch",
    "direct",
    "generic",
    "subgraph",
    "one sample at a time",
)
_INSIDE = ("mas_ext.", "torch.", "contextlib")


@dataclass
class Estimation:
    """What stays the same from batch to batch.

    Attributes:
        model: F.
        params: θ, by canonical name; DTensors under tensor parallelism.
        sums: Σ over samples, what the estimators add to; of a DTensor, the local part.
        objective: as the user named or gave it.
        weighting: ``"samples"``, or ``"batches"``: each counts as one, whatever its size.
        coverage: parameter name → the path that served it, so far.
        seen: samples so far.
    """

    model: nn.Module
    params: dict[str, Tensor]
    sums: dict[str, Tensor]
    objective: Objective
    weighting: str = "samples"
    coverage: dict[str, str] = field(default_factory=dict)
    seen: int = 0
    _warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._to_scalars = objectives.resolve(self.objective)

    @cached_property
    def is_cut_up(self) -> bool:
        """Whether other processes hold parts of what each operation works on."""
        return any(is_sharded(p) for p in self.model.parameters())

    def output(self, batch: Batch) -> Tensor:
        """F's output, with one row a sample."""
        return batch.check_rows(output_tensor(batch.forward(self.model)))

    def scalars(self, batch: Batch) -> Tensor:
        """s_k for every sample of a batch.

        Raises:
            ValueError: one of them is not finite, or there is not one for each sample.
        """
        return self._finite(self.unchecked_scalars(batch))

    def unchecked_scalars(self, batch: Batch) -> Tensor:
        """The same, of whatever value."""
        return self._to_scalars(self.output(batch))

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
        bad = [name for name, p in self.params.items() if not torch.isfinite(local(p)).all()]
        name = (bad or list(self.params))[0]
        return f"{name!r} (which holds NaN or Inf itself)" if bad else repr(name)

    def add_gradient(
        self,
        scalar: Tensor,
        names: Iterable[str] | None = None,
        sums: Mapping[str, Tensor] | None = None,
        keep_graph: bool = False,
        path: str = "direct",
    ) -> None:
        """sums += |∂ scalar/∂θ|; a parameter the scalar does not depend on adds nothing."""
        if not scalar.requires_grad:
            return
        chosen = list(self.params if names is None else names)
        if not chosen:
            return
        sums = self.sums if sums is None else sums
        grads = torch.autograd.grad(
            scalar,
            [self.params[name] for name in chosen],
            allow_unused=True,
            retain_graph=keep_graph,
        )
        used = [
            (name, dense(local_grad(grad, self.params[name])))
            for name, grad in zip(chosen, grads, strict=True)
            if grad is not None
        ]
        for omega, arrived in _by_device([(sums[name], grad) for name, grad in used]):
            functional.accumulate_importance_(omega, arrived)
        if sums is self.sums:
            self.covered({name: path for name, _ in used})

    def covered(self, paths: Mapping[str, str]) -> None:
        """Notes which path served which parameter."""
        for name, path in paths.items():
            known = self.coverage.get(name, PATHS[0])
            self.coverage[name] = max(known, path, key=PATHS.index)

    def warn_of_slow(self, reasons: Mapping[str, str]) -> None:
        """Once a parameter: it is exact, but it takes a pass for each sample."""
        new = {name: why for name, why in reasons.items() if name not in self._warned}
        if not new:
            return
        self._warned.update(new)
        name, why = next(iter(new.items()))
        others = f" and {len(new) - 1} more" if len(new) > 1 else ""
        warn(
            f"the importance of {name!r}{others} is computed one sample at a time, which is exact "
            f"but slow: {why}"
        )


def warn(message: str) -> None:
    """A warning that points at the line which called this package, however far up that is."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def dense(grad: Tensor) -> Tensor:
    """A gradient as kernels take it: an embedding's may be sparse."""
    return grad.to_dense() if grad.layout != torch.strided else grad


def _by_device(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Sums and gradients in one pair of lists a device; a model may span several."""
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for omega, grad in pairs:
        sums, grads = groups.setdefault(omega.device, ([], []))
        sums.append(omega)
        grads.append(grad)
    return list(groups.values())
