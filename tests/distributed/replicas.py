"""The model is the same on every rank: DDP, or a process group that is named."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mas_ext import MAS, estimate_importance
from tests.distributed.models import (
    IDLE,
    RAGGED,
    alone,
    assert_same,
    assert_strength_found,
    batches,
    exact,
    net,
    samples,
)
from tests.distributed.training import check_every_way
from tests.support.processes import World


def check_importance(world: World) -> None:
    x, model = samples(), net()
    expected = exact(model, x)
    for sizes in (RAGGED, IDLE):
        own = batches(x, sizes[world.size])[world.rank]
        omega = estimate_importance(DistributedDataParallel(model), own)
        assert_same(omega, expected)
        assert omega.num_samples == len(x)
        assert set(omega.coverage.values()) == {"direct"}


def check_all_ranks_have_the_same_bits(world: World) -> None:
    own = batches(samples(), RAGGED[world.size])[world.rank]
    omega = estimate_importance(DistributedDataParallel(net()), own)
    for total in omega.values():
        everyone = [torch.empty_like(total) for _ in range(world.size)]
        dist.all_gather(everyone, total)
        assert all(torch.equal(total, other) for other in everyone)


def check_several_updates_are_one_task(world: World) -> None:
    x, model = samples(), net()
    expected = exact(model, x)
    mas = MAS(DistributedDataParallel(model), "auto")
    first, second = x[:7], x[7:]
    mas.update_importance([first] if world.rank == 0 else [])
    mas.update_importance([second] if world.rank == world.size - 1 else [])
    mas.consolidate()
    assert_same(mas.importance, expected)
    assert_strength_found(mas, x)


def check_a_process_group(world: World) -> None:
    x, model = samples(), net()
    own = batches(x, RAGGED[world.size])[world.rank]
    mas = MAS(model, process_group=dist.group.WORLD)
    mas.consolidate(own)
    assert_same(mas.importance, exact(model, x))


def check_a_plain_model_is_measured_alone_with_a_warning(world: World) -> None:
    x, model = samples(), net()
    own = x[world.rank :: world.size]
    if world.size == 1:
        return
    with pytest.warns(UserWarning, match="process_group="):
        omega = estimate_importance(model, [own])
    assert_same(omega, exact(model, own))


def check_other_estimators(world: World) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    shares = batches(samples()[:, 0], RAGGED[world.size])
    for options in (
        {"estimator": "batch"},
        {"estimator": "batch", "weighting": "batches"},
        {"estimator": "local"},
    ):
        everything = [batch for share in shares for batch in share]
        expected = estimate_importance(model, everything, process_group=alone(), **options)
        ours = estimate_importance(DistributedDataParallel(model), shares[world.rank], **options)
        assert_same(ours, expected)
        assert ours.num_samples == expected.num_samples
        assert ours.coverage == expected.coverage


def check_max_samples_is_of_each_rank(world: World) -> None:
    x, model = samples(12), net()
    omega = estimate_importance(DistributedDataParallel(model), [x[world.rank :]], max_samples=2)
    assert omega.num_samples == 2 * world.size
    seen = torch.cat([x[rank : rank + 2] for rank in range(world.size)])
    assert_same(omega, exact(model, seen))


def check_training(world: World) -> None:
    check_every_way(
        lambda model: DistributedDataParallel(model),
        lambda: net(torch.float64),
        world.rank,
        world.size,
    )
