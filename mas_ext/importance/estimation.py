"""The state of a measurement that estimators work on: model, parameters, sums, statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext._distributed.shards import is_sharded, local, local_grad
from mas_ext._warnings import warn
from mas_ext.importance import criteria
from mas_ext.importance.batches import Batch, Division, Inputs
from mas_ext.importance.isolation import without_a_trace
from mas_ext.importance.options import Measurement
from mas_ext.importance.outputs import Outputs, find_outputs

# The paths that can serve a parameter, the slowest last. Of several, coverage shows the slowest.
UNREACHED = "unused"  # the objective does not depend on the parameter
PATHS = (
    UNREACHED,
    "none",
    "local",
    "batch",
    "direct",
    "generic",
    "subgraph",
    "one sample at a time",
)


@dataclass(frozen=True)
class SampleStatistics:
    """Sums over the samples of a batch, a process or a task. Statistics can be added.

    Attributes:
        samples: the number of samples.
        weight: what they contribute to N, by which sums are divided: samples, or batches.
        energy: Σ s_k, the sum of the objective: Σ‖F(x)‖² unless another objective was chosen.
    """

    samples: int = 0
    weight: int = 0
    energy: float = 0.0

    @classmethod
    def of_batch(cls, scalars: Tensor, weighting: str) -> SampleStatistics:
        """From the batch's s_k, [B]."""
        samples = len(scalars)
        weight = samples if weighting == "samples" else min(samples, 1)
        return cls(samples, weight, float(scalars.double().sum()))

    @property
    def mean_energy(self) -> float:
        """Σ s_k / N; 0 for no samples."""
        return self.energy / self.samples if self.samples else 0.0

    def __add__(self, other: SampleStatistics) -> SampleStatistics:
        return SampleStatistics(
            self.samples + other.samples, self.weight + other.weight, self.energy + other.energy
        )


@dataclass
class Estimation:
    """The state of one measurement on one process.

    Attributes:
        model: F.
        params: θ, by canonical name; DTensors under tensor parallelism.
        sums: Σ over samples, which estimators add to; for a DTensor parameter, its local part.
        measurement: the options.
        coverage: parameter name → the path that served it, so far.
        samples, batches: how many have been measured so far.
        outputs: which of the model's outputs are measured; None before the first batch.
        division: how batches are divided into samples, where it is not by the rows of all inputs.
        rank: the number of this process among those that share the data.
        checked: the number of the last batch whose samples were found not to depend on each other.
    """

    model: nn.Module
    params: dict[str, Tensor]
    sums: dict[str, Tensor]
    measurement: Measurement
    coverage: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    batches: int = 0
    outputs: Outputs | None = None
    division: Division = field(default_factory=dict)
    rank: int = 0
    checked: int = -1
    _warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        measurement = self.measurement
        self._criterion = criteria.resolve(measurement.criterion, measurement.objective)
        #: How a sample's gradient counts.
        self.reduction = criteria.reduction_of(self._criterion, measurement.reduction)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Which of the model's outputs are measured; empty before the first batch."""
        return self.outputs.names if self.outputs else ()

    @cached_property
    def is_tensor_parallel(self) -> bool:
        """Whether other processes hold parts of the tensors that each operation works on."""
        return any(is_sharded(p) for p in self.model.parameters())

    def output(self, batch: Batch) -> Tensor:
        """The model's output for a batch, [B, …]."""
        return self.output_in(batch.forward(self.model), batch)

    def output_in(self, returned: Any, batch: Batch) -> Tensor:
        """The output [B, …] in what the model returned for a batch."""
        if self.outputs is None:
            if isinstance(batch, Inputs) and batch.size() == 0:
                return torch.zeros(0, 1, device="cpu")  # it shows nothing of the outputs
            self.outputs = find_outputs(returned, batch, self._run_again)
        return batch.check_rows(self.outputs.tensor(returned))

    def targeted(self, batch: Batch, output: Tensor) -> Iterator[Batch]:
        """The batch with each of the targets that its output is compared with."""
        options = self.measurement
        seed = criteria.seed_of(options.seed, self.rank, options.samples_before + self.samples)
        return self._criterion.targeted(
            criteria.Situation(self.model, batch, output, options.draws, seed, self.output_names)
        )

    def scalars(self, batch: Batch) -> Tensor:
        """s_k for every sample of a batch that has a target, if the criterion needs one.

        Raises:
            ValueError: a value is not finite, or there is not one value per sample.
        """
        return self.scalars_of(self.output(batch), batch)

    def scalars_of(self, output: Tensor, batch: Batch) -> Tensor:
        """s_k from the model's output; see :meth:`scalars`."""
        return self._finite(self.unchecked_scalars_of(output, batch))

    def unchecked_scalars_of(self, output: Tensor, batch: Batch) -> Tensor:
        """The same, finite or not: no value is read."""
        if len(output) == 0:
            return output.new_zeros(0)
        return self._criterion.scalars(output, batch, self.reduction)

    def _run_again(self, batch: Batch) -> Any:
        with without_a_trace(self.model):
            return batch.forward(self.model)

    def learn_shared_inputs(self, batch: Batch, samples: int) -> None:
        """Inputs without as many rows as there are samples are shared by all, in any later batch.

        In a later batch they may have as many rows by chance.
        """
        if isinstance(batch, Inputs):
            whole = dict.fromkeys(batch.shared_arguments(samples), "whole")
            self.division = {**self.division, **whole}

    def energy(self, scalars: Tensor, batch: Batch) -> Tensor:
        """What these scalars of a target contribute to each sample's energy, [B]."""
        return self._criterion.energy(scalars, batch, self.reduction)

    def _finite(self, scalars: Tensor) -> Tensor:
        finite = torch.isfinite(scalars)
        if not finite.all():
            k = int((~finite).nonzero()[0])
            raise ValueError(
                f"the scalar of sample {k} of a batch is {scalars[k].item()}: the model's "
                f"output is not finite there, and neither is the gradient of {self._suspect()}; "
                "nothing was changed. Check the inputs and the parameters for NaN and Inf"
            )
        return scalars

    def _suspect(self) -> str:
        """A parameter that is not finite itself, else the first of all."""
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
        """sums += f(∂ scalar/∂θ); a parameter the scalar does not depend on adds nothing."""
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
            self.reduction.add_(omega, arrived)
        if sums is self.sums:
            self.record_paths({name: path for name, _ in used})

    def record_paths(self, paths: Mapping[str, str]) -> None:
        """Records which path served which parameter."""
        for name, path in paths.items():
            known = self.coverage.get(name, PATHS[0])
            self.coverage[name] = max(known, path, key=PATHS.index)

    def warn_one_at_a_time(self, reasons: Mapping[str, str]) -> None:
        """Warns once per parameter that it is measured exactly, but with one pass per sample."""
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


def check_finite(sums: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a sum is NaN or Inf, naming the parameter."""
    for name, total in sums.items():
        # No number is negative, so their sum tells, with a single pass over memory.
        if not torch.isfinite(total.sum()) and not torch.isfinite(total).all():
            raise ValueError(
                f"the gradient of parameter {name!r} is NaN or Inf for some sample; nothing was "
                "changed. Check the objective, or compute in a wider dtype"
            )


def dense(grad: Tensor) -> Tensor:
    """The gradient as a dense tensor, as kernels need it: an embedding's may be sparse."""
    return grad.to_dense() if grad.layout != torch.strided else grad


def _by_device(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Sums and gradients as one pair of lists per device; a model may span several."""
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for omega, grad in pairs:
        sums, grads = groups.setdefault(omega.device, ([], []))
        sums.append(omega)
        grads.append(grad)
    return list(groups.values())
