"""Models and loops as people write them, sharded by ``fully_shard``."""

from __future__ import annotations

import torch
import torch.distributed.tensor
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from mas_ext import estimate_importance
from tests.distributed.models import (
    RAGGED,
    Net,
    assert_same,
    batches,
    exact,
    net,
    samples,
    sharded,
)
from tests.support.processes import World

ESTIMATORS = ({}, {"estimator": "per_sample_sharded"})


class Checkpointed(Net):
    """The blocks' activations are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(torch.tanh(x.mean(1) @ self.mix))


def check_activation_checkpointing(world: World) -> None:
    x = samples()
    own = batches(x, RAGGED[world.size])[world.rank]
    for options in ESTIMATORS:
        model = net()
        model.__class__ = Checkpointed
        omega = estimate_importance(sharded(model), own, **options)
        assert_same(omega, exact(net(), x))


def check_modules_sharded_as_one(world: World) -> None:
    x, model = samples(), net()
    fully_shard(list(model.blocks))
    fully_shard(model)
    own = batches(x, RAGGED[world.size])[world.rank]
    for options in ESTIMATORS:
        assert_same(estimate_importance(model, own, **options), exact(net(), x))


def check_forward_by_hand(world: World) -> None:
    """A batch of another form: a dictionary, of which the model takes a part."""
    x = samples()
    own = [{"x": batch} for batch in batches(x, RAGGED[world.size])[world.rank]]
    omega = estimate_importance(sharded(net()), own, forward=lambda model, b: model(b["x"]))
    assert_same(omega, exact(net(), x))


def check_offloaded_parameters(world: World) -> None:
    x, policy = samples(), CPUOffloadPolicy(pin_memory=False)
    own = batches(x, RAGGED[world.size])[world.rank]
    for options in ESTIMATORS:
        omega = estimate_importance(sharded(net(), offload_policy=policy), own, **options)
        assert_same(omega, exact(net(), x))


def check_meta_initialisation(world: World) -> None:
    with torch.device("meta"):
        model = Net()
    sharded(model).to_empty(device="cpu")
    start = net()
    state = dict(start.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.distributed.tensor.distribute_tensor(state[name], p.device_mesh))
    x = samples()
    assert_same(estimate_importance(model, [x] if world.rank == 0 else []), exact(start, x))
