"""Tensor parallelism, hybrid sharding, and both on meshes of two dimensions."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

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
    sharded,
    tensor_parallel,
)
from tests.distributed.training import check_every_way
from tests.support.processes import World

SLOW = "one sample at a time"


def _mesh(world: World, first: str, second: str) -> DeviceMesh:
    return init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=(first, second))


def _measured_slowly(model, data):
    with pytest.warns(UserWarning, match="tensor-parallel"):
        omega = estimate_importance(model, data)
    assert set(omega.coverage.values()) == {SLOW}
    return omega


def check_tensor_parallel(world: World) -> None:
    x = samples()
    mesh = init_device_mesh("cpu", (world.size,))
    model = tensor_parallel(net(), mesh)
    omega = _measured_slowly(model, x.split(8))
    assert omega.num_samples == len(x)
    assert_same(omega, exact(net(), x))
    up = model.blocks[0].up.weight
    assert omega["blocks.0.up.weight"].placements == up.placements


def check_training_tensor_parallel(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        check_every_way(lambda m: tensor_parallel(m, mesh), lambda: net(torch.float64), 0, 1)


def check_batch_estimator_tensor_parallel(world: World) -> None:
    x = samples()
    expected = estimate_importance(net(), x.split(8), estimator="batch", process_group=alone())
    model = tensor_parallel(net(), init_device_mesh("cpu", (world.size,)))
    assert_same(estimate_importance(model, x.split(8), estimator="batch"), expected)
    with pytest.raises(ValueError, match="estimator='local' is not available"):
        estimate_importance(model, x.split(8), estimator="local")


def check_hybrid_sharding(world: World) -> None:
    x, mesh = samples(), _mesh(world, "replicate", "shard")
    for sizes in (RAGGED, IDLE):
        own = batches(x, sizes[world.size])[world.rank]
        model = sharded(net(), mesh=mesh)
        assert_same(estimate_importance(model, own), exact(net(), x))
        omega = estimate_importance(model, own, estimator="per_sample_sharded")
        assert_same(omega, exact(net(), x))
    check_every_way(
        lambda m: sharded(m, mesh=mesh), lambda: net(torch.float64), world.rank, world.size
    )


def check_sharded_and_tensor_parallel(world: World) -> None:
    x, mesh = samples(), _mesh(world, "data", "model")
    data, rank = world.size // 2, mesh.get_local_rank("data")

    def both(model):
        return sharded(tensor_parallel(model, mesh["model"]), mesh=mesh["data"])

    for sizes in (RAGGED, IDLE):
        own = batches(x, sizes[data])[rank]
        model = both(net())
        assert_same(estimate_importance(model, own), exact(net(), x))
        omega = estimate_importance(model, own, estimator="per_sample_sharded")
        assert_same(omega, exact(net(), x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_every_way(both, lambda: net(torch.float64), rank, data)


def check_replicas_of_tensor_parallel_models(world: World) -> None:
    x, mesh = samples(), _mesh(world, "data", "model")
    own = batches(x, RAGGED[world.size // 2])[mesh.get_local_rank("data")]
    model = tensor_parallel(net(), mesh["model"])
    mas = MAS(model, "auto", process_group=mesh.get_group("data"))
    mas.consolidate(own)
    assert_same(mas.importance, exact(net(), x))
    assert_strength_found(mas, x)
