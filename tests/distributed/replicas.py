"""The model is the same on every rank: DDP, or a process group that is named."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mas_ext import estimate_importance
from tests.distributed.models import (
    RAGGED,
    assert_same,
    batches,
    exact,
    net,
    samples,
)
from tests.support.processes import World


def check_all_ranks_have_the_same_bits(world: World) -> None:
    own = batches(samples(), RAGGED[world.size])[world.rank]
    omega = estimate_importance(DistributedDataParallel(net()), own)
    for total in omega.values():
        everyone = [torch.empty_like(total) for _ in range(world.size)]
        dist.all_gather(everyone, total)
        assert all(torch.equal(total, other) for other in everyone)


def check_a_plain_model_is_measured_alone_with_a_warning(world: World) -> None:
    x, model = samples(), net()
    own = x[world.rank :: world.size]
    if world.size == 1:
        return
    with pytest.warns(UserWarning, match="process_group="):
        omega = estimate_importance(model, [own])
    assert_same(omega, exact(model, own))


def check_max_samples_is_of_each_rank(world: World) -> None:
    x, model = samples(12), net()
    omega = estimate_importance(DistributedDataParallel(model), [x[world.rank :]], max_samples=2)
    assert omega.num_samples == 2 * world.size
    seen = torch.cat([x[rank : rank + 2] for rank in range(world.size)])
    assert_same(omega, exact(model, seen))
