"""Every way to put a model on several processes: what is measured, and how it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mas_ext import MAS, estimate_importance
from tests.distributed.models import (
    IDLE,
    IN_STEP,
    RAGGED,
    Net,
    alone,
    assert_same,
    assert_strength_found,
    batches,
    exact,
    net,
    samples,
    sharded,
    tensor_parallel,
)
from tests.distributed.training import check_every_way
from tests.support.processes import World

SLOW = "one sample at a time"


class Spread(NamedTuple):
    """One way.

    Attributes:
        prepared: shards or wraps a model, maybe in place.
        rank: of the processes that have data of their own, of which there are ``size``.
        is_sharded: ``per_sample_sharded`` differs from ``per_sample``.
        is_slow: ``per_sample`` takes one sample at a time, and says so.
        trains: gradients are summed over the processes.
        group: ``process_group=`` of a measurement.
    """

    prepared: Callable[[Net], nn.Module]
    rank: int
    size: int
    is_sharded: bool = True
    is_slow: bool = False
    trains: bool = True
    group: dist.ProcessGroup | None = None


class Checkpointed(Net):
    """The blocks' activations are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(torch.tanh(x.mean(1) @ self.mix))


def checkpointed(model: Net) -> nn.Module:
    model.__class__ = Checkpointed
    return sharded(model)


def only_the_blocks(model: Net) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return model


def blocks_as_one(model: Net) -> nn.Module:
    fully_shard(list(model.blocks))
    return fully_shard(model)


def spreads(world: World) -> dict[str, Spread]:
    own, everyone = (world.rank, world.size), dist.group.WORLD
    offloaded = partial(sharded, offload_policy=CPUOffloadPolicy(pin_memory=False))
    kept = partial(sharded, reshard_after_forward=False)
    found = {
        "DDP": Spread(DistributedDataParallel, *own, is_sharded=False),
        "a process group": Spread(lambda m: m, *own, False, trains=False, group=everyone),
        "FSDP2": Spread(sharded, *own),
        "FSDP2, whole after the forward": Spread(kept, *own),
        "FSDP2, only the blocks": Spread(only_the_blocks, *own, trains=False),
        "FSDP2, the blocks as one": Spread(blocks_as_one, *own),
        "FSDP2, offloaded": Spread(offloaded, *own),
        "FSDP2, checkpointed": Spread(checkpointed, *own),
    }
    if world.size == 1:
        return found
    line = init_device_mesh("cpu", (world.size,))
    mesh = init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("data", "model"))
    part = mesh.get_local_rank("data"), world.size // 2

    def split(model: Net) -> Net:
        return tensor_parallel(model, mesh["model"])

    def both(model: Net) -> nn.Module:
        return sharded(split(model), mesh=mesh["data"])

    return {
        **found,
        "hybrid": Spread(partial(sharded, mesh=mesh), *own),
        "tensor parallel": Spread(lambda m: tensor_parallel(m, line), 0, 1, is_slow=True),
        "tensor parallel, FSDP2": Spread(both, *part, is_slow=True),
        "tensor parallel, replicas": Spread(
            split, *part, is_slow=True, trains=False, group=mesh.get_group("data")
        ),
    }


@contextmanager
def named(name: str) -> Iterator[None]:
    try:
        yield
    except AssertionError as problem:
        raise AssertionError(f"{name}: {problem}") from problem


def check_importance(world: World) -> None:
    """In one measurement, and in two that are one task."""
    x, expected = samples(), exact(net(), samples())
    for name, spread in spreads(world).items():
        for options in ({}, IN_STEP):
            with named(f"{name} {options}"):
                for sizes in (RAGGED, IDLE):
                    own = batches(x, sizes[spread.size])[spread.rank]
                    model = spread.prepared(net())
                    with warnings.catch_warnings(record=True) as warned:
                        warnings.simplefilter("always")
                        group = spread.group
                        omega = estimate_importance(model, own, process_group=group, **options)
                    assert_same(omega, expected)
                    assert omega.num_samples == len(x)
                    is_slow = spread.is_slow or (spread.is_sharded and bool(options))
                    assert set(omega.coverage.values()) == {SLOW if is_slow else "direct"}
                    if own and not options:  # who measures nothing is told nothing
                        is_told = any("tensor-parallel" in str(w.message) for w in warned)
                        assert is_told == spread.is_slow
                assert_a_task_in_two_parts(spread, own, options, expected)


def assert_a_task_in_two_parts(spread, own, options, expected) -> None:
    model = spread.prepared(net())
    mas = MAS(model, "auto", process_group=spread.group)
    mas.update_importance(own[:1], **options)
    mas.consolidate(own[1:], **options)
    assert_same(mas.importance, expected)
    assert_strength_found(mas, samples())
    params = {n.removeprefix("module."): p for n, p in model.named_parameters()}
    for name, omega in mas.importance.items():
        assert isinstance(omega, DTensor) == isinstance(params[name], DTensor)


def check_training(world: World) -> None:
    for name, spread in spreads(world).items():
        if spread.trains:
            with named(name), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that tensor parallelism is slow
                check_every_way(spread.prepared, spread.rank, spread.size)


def check_other_estimators(world: World) -> None:
    def layers() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    shares = batches(samples()[:, 0], RAGGED[world.size])
    everything = [batch for share in shares for batch in share]
    for options in (
        {"estimator": "batch"},
        {"estimator": "batch", "weighting": "batches"},
        {"estimator": "local"},
    ):
        expected = estimate_importance(layers(), everything, process_group=alone(), **options)
        for prepared in (DistributedDataParallel, fully_shard):
            ours = estimate_importance(prepared(layers()), shares[world.rank], **options)
            assert_same(ours, expected)
            assert ours.num_samples == expected.num_samples
            assert ours.coverage == expected.coverage


def check_other_estimators_tensor_parallel(world: World) -> None:
    if world.size == 1:
        return  # a part is the whole
    x = samples()
    expected = estimate_importance(net(), x.split(8), estimator="batch", process_group=alone())
    model = tensor_parallel(net(), init_device_mesh("cpu", (world.size,)))
    omega = estimate_importance(model, x.split(8), estimator="batch")
    assert_same(omega, expected)
    up = model.blocks[0].up.weight
    assert omega["blocks.0.up.weight"].placements == up.placements
    with pytest.raises(ValueError, match="estimator='local' is not available"):
        estimate_importance(model, x.split(8), estimator="local")
