"""A data-parallel measurement: every process measures its own samples, and sums are reduced once.

Ranks do not communicate before the end, so each may have any number of batches, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mas_ext._distributed import fsdp, topology
from mas_ext._distributed.ranks import ProcessGroup, Ranks
from mas_ext._distributed.shards import local_parts
from mas_ext._storage.flat_tensors import FlatTensors
from mas_ext._warnings import warn
from mas_ext.importance import sharded
from mas_ext.importance.estimation import PATHS, SampleStatistics
from mas_ext.importance.loop import NO_SAMPLES, Measured, add_samples_
from mas_ext.importance.measurement_checkpoint import MeasurementCheckpoint
from mas_ext.importance.options import Measurement
from mas_ext.reference import accumulation_dtype

Tensors = Mapping[str, Tensor]


@torch.no_grad()
def add_importance_(
    sums: Tensors,
    model: nn.Module,
    data: Iterable[Any],
    named: Tensors,
    measurement: Measurement,
    *,
    process_group: ProcessGroup = None,
    counted: Callable[[SampleStatistics], None],
    checkpoint: MeasurementCheckpoint | None = None,
) -> Measured:
    """Adds the sum over the samples of all ranks, which is importance before division by N.

    Args:
        sums: name → the tensor that is added to (its local part); the same on all data ranks,
            before and after. After an error its content is undefined.
        named: name → θ, the parameters that are measured, as the optimizer knows them.
        measurement: the options.
        counted: called with statistics once the samples are in ``sums``: after every batch on a
            single process, once at the end on several.
        checkpoint: the measurement checkpoint of each rank. None: progress is not saved.

    Returns:
        The statistics, the path that served each of ``named``, and the outputs that were measured.
    """
    checkpoint = checkpoint or MeasurementCheckpoint()
    if measurement.is_sharded and (whole := fsdp.find_sharded_model(model)) is not None:
        checkpoint.refuse(f"estimator={measurement.estimator!r}")
        measured = sharded.add_samples_(sums, whole, data, named, measurement, counted=counted)
        return _joined([measured], named)
    placement = placement_of(model, process_group)
    count = counted if placement.adds_at_once else _count_later
    with placement.ready(named, sums) as (params, own_sums):
        placement.ranks.attempt(lambda: checkpoint.open(params))
        if not placement.ranks.agree(checkpoint.batches_before):
            checkpoint.reset()
        parts = placement.ranks.attempt(
            lambda: add_samples_(
                own_sums,
                placement.model,
                data,
                params,
                measurement,
                counted=count,
                checkpoint=checkpoint,
                rank=placement.ranks.place[0],
            )
        )
    joined = _joined(parts, named)
    if joined.statistics.samples == 0:
        raise ValueError(NO_SAMPLES)
    placement.collect(named, sums, own_sums)
    if not placement.adds_at_once:
        counted(joined.statistics)
    return joined


def _count_later(more: SampleStatistics) -> None:
    """On several ranks, samples count once all ranks have finished."""


def _joined(parts: Sequence[Measured], names: Iterable[str]) -> Measured:
    """What all ranks have measured, with the slowest path that served each parameter."""
    coverage = dict.fromkeys(names, PATHS[0])
    for part in parts:
        for name, path in part.coverage.items():
            coverage[name] = max(coverage[name], path, key=PATHS.index)
    statistics = sum((part.statistics for part in parts), SampleStatistics())
    return Measured(statistics, coverage, max((part.outputs for part in parts), key=len))


class Placement(Protocol):
    """Where a model's parameters are while it is measured.

    Attributes:
        adds_at_once: whether a batch is in the final sums as soon as it has been measured.
    """

    model: nn.Module
    ranks: Ranks
    adds_at_once: bool

    def ready(self, named: Tensors, sums: Tensors) -> Any:
        """A context with the parameters as they stand in the model, and this rank's own sums."""

    def collect(self, named: Tensors, sums: Tensors, own_sums: Tensors) -> None:
        """Reduces the ranks' own sums into ``sums``."""


def placement_of(model: nn.Module, process_group: ProcessGroup) -> Placement:
    """How the processes share a model, and the ranks that measure together."""
    fsdp.check_not_fsdp1(model)
    whole = fsdp.find_sharded_model(model)
    if whole is not None:
        if process_group is not None:
            raise ValueError(
                "process_group: the model is sharded with fully_shard, and its mesh says which "
                "ranks share the data; leave process_group out"
            )
        return _Unsharded(whole)
    return _Replica(model, process_group)


class _Replica:
    """Every data rank has a replica of the model, which tensor parallelism may split further."""

    def __init__(self, model: nn.Module, process_group: ProcessGroup) -> None:
        self.model, group = topology.without_ddp(model)
        data = group if process_group is None else process_group
        self.ranks = topology.ranks_of_replica(self.model.parameters(), data)
        self.adds_at_once = self.ranks.is_alone
        if data is None and topology.leaves_ranks_out(self.ranks):
            warn(
                "there are several processes, but the model does not tell whether they share the "
                "data: each measures its own data alone. Pass the model as wrapped by "
                "DistributedDataParallel or sharded by fully_shard, or pass process_group="
            )

    @contextmanager
    def ready(self, named: Tensors, sums: Tensors) -> Iterator[tuple[Tensors, Tensors]]:
        """Needs no extra memory: the first rank keeps the earlier sums, the others start at 0."""
        if not self.ranks.is_first:
            for total in sums.values():
                total.zero_()
        yield named, sums

    def collect(self, named: Tensors, sums: Tensors, own_sums: Tensors) -> None:
        """One all-reduce per parameter."""
        self.ranks.add_up_(sums.values())


class _Unsharded:
    """The data ranks hold shards (``fully_shard``), and the whole model while they measure."""

    adds_at_once = False

    def __init__(self, whole: fsdp.ShardedModel) -> None:
        self.model = whole.model
        self.ranks = topology.ranks_of_shards(whole.sharded_parameters, whole.mesh)
        self._whole = whole

    @contextmanager
    def ready(self, named: Tensors, sums: Tensors) -> Iterator[tuple[Tensors, Tensors]]:
        """Needs memory for the whole model, and for Ω in float32, on every rank."""
        with self._whole.unsharded():
            params = self._whole.unsharded_parameters(named)
            yield params, FlatTensors(local_parts(params), accumulation_dtype)

    def collect(self, named: Tensors, sums: Tensors, own_sums: Tensors) -> None:
        """One reduce-scatter per parameter."""
        for name, total in own_sums.items():
            sums[name].add_(self._whole.summed_part(named[name], total))
