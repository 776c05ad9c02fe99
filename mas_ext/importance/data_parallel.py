"""A measurement by all the processes that train a model: each its own samples, and one sum.

What a rank adds up is its own until the end, so that ranks may have as many batches as they like,
or none. Then they tell each other how it went, and add up, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mas_ext._distributed import fsdp, topology
from mas_ext._distributed.ranks import ProcessGroup, Ranks
from mas_ext._distributed.shards import local_parts
from mas_ext._state.flat_tensors import FlatTensors
from mas_ext.importance import sharded
from mas_ext.importance.estimation import PATHS, warn
from mas_ext.importance.estimators import IN_STEP
from mas_ext.importance.loop import NO_SAMPLES, Measured, add_samples_
from mas_ext.importance.measurement_checkpoint import Journal
from mas_ext.importance.sample_statistics import Seen
from mas_ext.reference import accumulation_dtype

Tensors = Mapping[str, Tensor]


@torch.no_grad()
def add_importance_(
    sums: Tensors,
    model: nn.Module,
    data: Iterable[Any],
    named: Tensors,
    *,
    process_group: ProcessGroup = None,
    counted: Callable[[Seen], None],
    journal: Journal | None = None,
    **how: Any,
) -> tuple[Seen, dict[str, str]]:
    """Adds Σ over the samples of all ranks, what importance is before the division by N.

    Args:
        sums: by name, the local part of what is added to; the same on all data ranks, before and
            after. After an error it holds whatever.
        named: θ by name, the parameters that are measured, as the optimizer knows them.
        counted: called with what was seen once it is in ``sums``: for every batch by a process
            that is alone, else once.
        journal: where it is kept what a rank has added up.
        how: see :func:`mas_ext.importance.loop.add_samples_`.

    Returns:
        What was seen, and which path served each parameter.
    """
    kept = journal or Journal()
    if how.get("estimator") == IN_STEP and (whole := fsdp.find(model)) is not None:
        kept.refuse(f"estimator={IN_STEP!r}")
        seen, coverage = sharded.add_samples_(sums, whole, data, named, counted=counted, **how)
        return seen, _complete(coverage, named)
    site = _site(model, process_group)
    count = counted if site.is_live else _not_yet
    with site.ready(named, sums) as (params, own):
        site.ranks.attempt(lambda: kept.open(params))
        if not site.ranks.agree(kept.batches_before):
            kept.begin_anew()
        together = site.ranks.attempt(
            lambda: add_samples_(own, site.model, data, params, counted=count, journal=kept, **how)
        )
    seen = sum((part.seen for part in together), Seen())
    if seen.samples == 0:
        raise ValueError(NO_SAMPLES)
    site.collect(named, sums, own)
    if not site.is_live:
        counted(seen)
    return seen, _complete(_slowest(together), named)


def _not_yet(more: Seen) -> None:
    """What one rank has seen counts when all have."""


def _slowest(together: Iterable[Measured]) -> dict[str, str]:
    coverage: dict[str, str] = {}
    for part in together:
        for name, path in part.coverage.items():
            coverage[name] = max(coverage.get(name, PATHS[0]), path, key=PATHS.index)
    return coverage


def _complete(coverage: Mapping[str, str], named: Iterable[str]) -> dict[str, str]:
    return {name: coverage.get(name, PATHS[0]) for name in named}


class _Site(Protocol):
    """Where a model's parameters are while it is measured.

    Attributes:
        is_live: whether what a batch adds is in the sums at once.
    """

    model: nn.Module
    ranks: Ranks
    is_live: bool

    def ready(self, named: Tensors, sums: Tensors) -> Any:
        """A context: the parameters as they stand in the model, and sums of this rank's own."""

    def collect(self, named: Tensors, sums: Tensors, own: Tensors) -> None:
        """All ranks' own sums are in ``sums``."""


def _site(model: nn.Module, process_group: ProcessGroup) -> _Site:
    fsdp.refuse_older(model)
    whole = fsdp.find(model)
    if whole is not None:
        if process_group is not None:
            raise ValueError(
                "process_group: the model is sharded with fully_shard, and its mesh says which "
                "ranks share the data out; leave process_group out"
            )
        return _Unsharded(whole)
    return _Replica(model, process_group)


class _Replica:
    """Every data rank has the model for itself, be it cut up over others (tensor parallelism)."""

    def __init__(self, model: nn.Module, process_group: ProcessGroup) -> None:
        self.model, group = topology.without_ddp(model)
        data = group if process_group is None else process_group
        self.ranks = topology.ranks_of_replica(self.model.parameters(), data)
        self.is_live = self.ranks.is_alone
        if data is None and topology.leaves_ranks_out(self.ranks):
            warn(
                "there are several processes, and this model does not say whether they share its "
                "data out: each measures by itself what it is given. Pass the model as it is "
                "wrapped by DistributedDataParallel or sharded by fully_shard, or process_group="
            )

    @contextmanager
    def ready(self, named: Tensors, sums: Tensors) -> Iterator[tuple[Tensors, Tensors]]:
        """No memory is taken: what was there before is brought by one rank, and the others add."""
        if not self.ranks.is_first:
            for total in sums.values():
                total.zero_()
        yield named, sums

    def collect(self, named: Tensors, sums: Tensors, own: Tensors) -> None:
        """One all-reduce a parameter."""
        self.ranks.add_up_(sums.values())


class _Unsharded:
    """The data ranks have a part each (``fully_shard``), and the whole model while they measure."""

    is_live = False

    def __init__(self, whole: fsdp.ShardedModel) -> None:
        self.model = whole.model
        self.ranks = topology.ranks_of_shards(whole.sharded_parameters, whole.mesh)
        self._whole = whole

    @contextmanager
    def ready(self, named: Tensors, sums: Tensors) -> Iterator[tuple[Tensors, Tensors]]:
        """Takes the memory of the model, and of Ω in float32, on every rank."""
        with self._whole.unsharded():
            params = self._whole.whole(named)
            yield params, FlatTensors(local_parts(params), accumulation_dtype)

    def collect(self, named: Tensors, sums: Tensors, own: Tensors) -> None:
        """One reduce-scatter a parameter."""
        for name, total in own.items():
            sums[name].add_(self._whole.summed_part(named[name], total))
