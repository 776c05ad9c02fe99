r"""Measures the exact importance of a sharded model that does not fit in one process.

In every pass, each rank runs one sample through the sharded model, as in training. The gradient
that arrives on a rank is that of the rank's own sample. The reduction f is taken there, before the
sum over ranks,

.. math:: \Omega_\text{part} \mathrel{+}= \mathrm{reduce\_scatter}\,(f(\partial s_r/\partial\theta))

so that no rank ever holds more than one parameter's gradient. All ranks make the same number of
passes: a rank whose data has ended runs its last sample again, and adds nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from mas_ext._distributed import topology
from mas_ext._distributed.fsdp import ShardedModel
from mas_ext._distributed.ranks import Ranks
from mas_ext._distributed.shards import local_grad
from mas_ext.importance import estimators, loop
from mas_ext.importance.batches import Batch, CustomBatch, Forward, Inputs
from mas_ext.importance.estimation import Estimation, SampleStatistics, check_finite, dense
from mas_ext.importance.isolation import differentiable, no_hidden_parameters, undisturbed
from mas_ext.importance.options import PER_SAMPLE_SHARDED, Measurement
from mas_ext.importance.reductions import ABS

PATH = "one sample at a time"


def add_samples_(
    sums: Mapping[str, Tensor],
    sharded: ShardedModel,
    data: Iterable[Any],
    named: Mapping[str, Tensor],
    measurement: Measurement,
    *,
    counted: Callable[[SampleStatistics], None],
) -> loop.Measured:
    """Adds the sum over the samples of all ranks to the local parts of the sums, pass by pass.

    See :func:`.add_importance_`. If the forward pass of one rank raises an error, the others wait
    in theirs until the process group's timeout.
    """
    measurement.check()
    ranks = topology.ranks_of_shards(sharded.sharded_parameters, sharded.mesh)
    source = _SampleSource(ranks, data, measurement)
    loop.check_samples_are_independent(sharded.model)
    done = SampleStatistics()
    with (
        closing(loop.ProgressReporter(ranks.progress(measurement.progress))) as reporter,
        no_hidden_parameters(),
        sharded.in_training(),
        undisturbed(sharded.model),
        _GradientCollector(sums, sharded, named).collected() as collector,
    ):
        estimation = Estimation(
            sharded.model, dict(named), dict(sums), measurement, rank=ranks.place[0]
        )
        collector.reduction = estimation.reduction
        while active := source.advance():
            collector.counts = source.is_own
            with differentiable():
                sample = source.placed(sharded.device)
                energy = _add_sample(estimation, sample, source.is_own, ranks)
            more = SampleStatistics(active, active, energy)
            done += more
            estimation.samples += 1
            counted(more)
            reporter.show(done.samples)
        ranks.attempt(lambda: check_finite(sums))
    if done.samples == 0:
        raise ValueError(loop.NO_SAMPLES)
    if not collector.arrived:
        raise ValueError(estimators.DEPENDS_ON_NOTHING)
    return loop.Measured(done, dict.fromkeys(collector.arrived, PATH), estimation.output_names)


def _add_sample(estimation: Estimation, sample: Batch, is_own: bool, ranks: Ranks) -> float:
    """Takes this rank's sample through the model; returns the energy of all ranks' samples.

    Every target has a forward pass of its own, since a backward pass shards the parameters again.
    """
    waiting: list[Batch] = []
    scalars: list[Tensor] = []

    def forward_pass() -> float:
        output = estimation.output(waiting[0] if waiting else sample)
        if not waiting:
            waiting.extend(estimation.targeted(sample, _single(output)))
        scalars.append(estimation.scalars_of(output, waiting[0]))
        return estimation.energy(scalars[0], waiting[0]).item() if is_own else 0.0

    energy = sum(ranks.attempt(forward_pass))
    while True:
        if scalars[0].requires_grad:
            scalars[0].sum().backward()
        scalars.clear()
        waiting.pop(0)
        if not waiting:
            return energy
        energy += sum(ranks.attempt(forward_pass))


def _single(output: Tensor) -> Tensor:
    if len(output) != 1:
        raise ValueError(
            f"forward gave {len(output)} rows for a batch; with forward= and "
            f"estimator={PER_SAMPLE_SHARDED!r} a batch must be one sample"
        )
    return output


class _SampleSource:
    """Gives every rank one sample per pass, until no rank has any left.

    Attributes:
        is_own: whether this rank's current sample counts.
    """

    def __init__(self, ranks: Ranks, data: Iterable[Any], measurement: Measurement) -> None:
        self.is_own = False
        self._ranks = ranks
        self._left = measurement.sample_limit
        self._samples = _samples(data, measurement.forward)
        self._sample: Batch | None = None
        self._all_have_one = False

    def advance(self) -> int:
        """Moves to the next sample; returns the number of data ranks that have one."""
        found = self._ranks.attempt(self._take)
        active = sum(found)
        if active and not all(found) and not self._all_have_one:
            self._share_a_spare()
        self._all_have_one = active > 0
        return active

    def _take(self) -> bool:
        sample = next(self._samples, None) if self._left > 0 else None
        self._left -= 1
        self.is_own = sample is not None
        self._sample = sample or self._sample
        return self.is_own

    def _share_a_spare(self) -> None:
        """In the first pass, gives ranks without a sample that of another rank."""
        spares = self._ranks.attempt(
            lambda: None if self._sample is None else pickle.dumps(self._sample)
        )
        self._sample = self._sample or pickle.loads(next(s for s in spares if s is not None))

    def placed(self, device: torch.device) -> Batch:
        """The sample that this rank runs in this pass, whether or not it counts."""
        sample = self._sample
        assert sample is not None
        return sample.placed(device) if isinstance(sample, Inputs) else sample


def _samples(data: Iterable[Any], forward: Forward | None) -> Iterator[Batch]:
    loop.check_data(data)
    for raw in data:
        if forward is not None:
            yield CustomBatch(raw, forward)
            continue
        inputs = Inputs.with_others(raw)
        for k in range(size := inputs.size()):
            yield inputs.take([k], size)


class _GradientCollector:
    """Takes every gradient as it arrives in a backward pass, so that none is stored in ``.grad``.

    Attributes:
        counts: whether this rank's sample counts.
        reduction: how its gradients count.
        arrived: the parameters for which one has arrived, in order.
    """

    def __init__(
        self, sums: Mapping[str, Tensor], sharded: ShardedModel, named: Mapping[str, Tensor]
    ) -> None:
        self.counts = True
        self.reduction = ABS
        self.arrived: dict[str, None] = {}
        self._sums = sums
        self._sharded = sharded
        self._named = named

    @contextmanager
    def collected(self) -> Iterator[_GradientCollector]:
        """While active, collects the gradients of the measured parameters, and of no others."""
        ours = {id(p) for p in self._named.values()}
        for p in self._sharded.model.parameters():
            p.requires_grad_(id(p) in ours)
        with ExitStack() as stack:
            for name, leaf in self._sharded.unsharded_parameters(self._named).items():
                leaf.requires_grad_(True)
                hook = leaf.register_post_accumulate_grad_hook(self._hook(name))
                stack.callback(hook.remove)
            yield self

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def collect(leaf: Tensor) -> None:
            grad, leaf.grad = leaf.grad, None
            assert grad is not None
            grad = dense(local_grad(grad, leaf)).to(self._sums[name].dtype)
            contribution = self.reduction.of(grad) if self.counts else torch.zeros_like(grad)
            self._sums[name].add_(self._sharded.summed_part(self._named[name], contribution))
            self.arrived[name] = None

        return collect
