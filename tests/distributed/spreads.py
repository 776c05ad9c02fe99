"""Every way to put a model on several processes: what is measured, and how it trains."""

from __future__ import annotations

import copy
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

from mas_ext import EWC, MAS, DriftBudget, estimate_importance
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
    parameters,
    samples,
    sharded,
    tensor_parallel,
    whole,
)
from tests.distributed.training import check_every_way, loss
from tests.support.processes import World
from tests.support.targets import judged, likelihood, targets

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


def check_a_drift_budget(world: World) -> None:
    """The drift is that of a whole model on all samples, and λ and θ the same on all ranks."""
    x = samples()
    for name, spread in spreads(world).items():
        if not spread.trains:
            continue
        with named(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tensor parallelism is slow
            for sizes in (RAGGED, IDLE) if name == "FSDP2" else (RAGGED,):
                own = batches(x, sizes[spread.size])[spread.rank]
                assert_the_budget_is_kept(spread, own, x)


def assert_the_budget_is_kept(spread: Spread, own: list[Tensor], x: Tensor) -> None:
    before, model = net(), spread.prepared(net())
    mas = MAS(model, budget=DriftBudget(0.01, samples=len(x), every=2, slack=3.0))
    mas.consolidate(own)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    mas.attach(optimizer, mode="proximal")
    for share in samples(8 * 3 * spread.size, seed=5).split(3 * spread.size):
        optimizer.zero_grad()
        loss(model, share.split(3)[spread.rank]).backward()
        optimizer.step()
    assert_the_drift_is_a_loss(model, mas, samples(3, seed=6 + spread.rank))
    moved = {name: p.clone() for name, p in parameters(model).items()}
    drift = mas.drift_measured()
    assert drift == pytest.approx(kl(before, moved, x), rel=1e-3)
    told = [drift, *(number for record in mas.drift_trace for number in record)]
    everyone: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, told)
    assert all(other == told for other in everyone)
    assert len(mas.drift_trace) >= 4
    settled = mas.settle()
    assert settled.after <= 0.01 < settled.before
    omega, anchor = whole(mas.importance), whole(mas.anchor)
    expected = {
        n: (p + settled.c * omega[n] * anchor[n]) / (1 + settled.c * omega[n])
        for n, p in moved.items()
    }
    assert_same(parameters(model), expected, 1e-5)
    assert kl(before, expected, x) == pytest.approx(settled.after, rel=1e-2)


def assert_the_drift_is_a_loss(model: nn.Module, mas: MAS, own: Tensor) -> None:
    """Its gradient is averaged with that of the loss; a sharded model is refused."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        with pytest.raises(ValueError, match="drift_loss"):
            mas.drift_loss()
        return
    model.zero_grad()
    total = loss(model, own) + mas.drift_loss()
    alone = torch.autograd.grad(total, [*model.parameters()], retain_graph=True)
    total.backward()
    for p, mine in zip(model.parameters(), alone, strict=True):
        dist.all_reduce(mine)
        torch.testing.assert_close(p.grad, mine / dist.get_world_size())
    model.zero_grad()


def kl(before: Net, after: dict[str, Tensor], x: Tensor) -> float:
    """Of a whole model, in float64."""
    p = before.double()(x.double()).log_softmax(1)
    parts = {name: tensor.double() for name, tensor in after.items()}
    q = torch.func.functional_call(before.double(), parts, (x.double(),)).log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean().detach())


DRAWN = {"criterion": "fisher", "draws": 2, "seed": 3}
OTHERS = [{"criterion": "exact_fisher"}, {"criterion": "empirical_fisher"}]


def check_criteria(world: World) -> None:
    """Labels that every rank draws for itself, classes in turn, and labels from the data."""
    x = samples()
    labels = (torch.arange(len(x)) * 5) % 3
    found = spreads(world)
    cases = [("DDP", {}, [DRAWN, *OTHERS]), ("FSDP2", {}, [DRAWN])]
    cases += [("FSDP2", IN_STEP, [DRAWN, *OTHERS]), ("tensor parallel, FSDP2", IN_STEP, [DRAWN])]
    for name, options, hows in cases:
        for how in hows if name in found else []:
            spread, sizes = found[name], IDLE if how in OTHERS else RAGGED
            with named(f"{name} {options} {how}"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what tensor parallelism makes slow
                shares = list(
                    zip(
                        *(batches(part, sizes[spread.size]) for part in (x, labels)),
                        strict=True,
                    )
                )
                own = list(zip(*shares[spread.rank], strict=True))
                omega = estimate_importance(spread.prepared(net()), own, **how, **options)
                assert omega.num_samples == len(x)
                right, energy = of_targets(shares, bool(options), how)
                assert_same(omega, right, 2e-5)
                assert omega.energy == pytest.approx(energy, rel=1e-5)


def of_targets(shares, is_alone: bool, options: dict) -> tuple[dict[str, Tensor], float]:
    """Ω and the mean −log p of all ranks' samples; a rank's count is part of its seed."""
    criterion = options["criterion"]
    more = {key: value for key, value in options.items() if key != "criterion"}
    found, energies, model = [], [], net()
    for rank, share in enumerate(shares):
        before = 0
        for x, labels in zip(*share, strict=True):
            size = 1 if is_alone else len(x)
            for part, own in zip(x.split(size), labels.split(size), strict=True):
                batch = {"x": part, "labels": own}
                each = targets(criterion, model, batch, before=before, rank=rank, **more)
                found.append(({"x": part.double()}, each))
                output, before = model.double()(part.double()).detach(), before + len(part)
                model.float()
                energies += [
                    float(-(likelihood(output, target.values) * target.weight).sum())
                    for target in each
                ]
    total = sum(len(each[0].weight) for _, each in found)
    return judged(criterion, copy.deepcopy(model).double(), found), sum(energies) / total


def check_ewc(world: World) -> None:
    """Every part of a task draws anew."""
    own = batches(samples(), RAGGED[world.size])[world.rank]
    for wrap, options in ((DistributedDataParallel, {}), (sharded, IN_STEP)):
        ewc, sums = EWC(wrap(net())), []
        for _ in range(2):
            ewc.update_importance(own, **options)
            sums.append(whole(ewc.state_dict()["open"]))
        for name, both in sums[1].items():
            assert not torch.allclose(both, 2 * sums[0][name])
        ewc.consolidate()


def check_other_estimators(world: World) -> None:
    def layers() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    shares = batches(samples()[:, 0], RAGGED[world.size])
    everything = [batch for share in shares for batch in share]
    for options in (
        {"estimator": "batch"},
        {"estimator": "batch", "weighting": "batches"},
        {"estimator": "batch", "reduction": "square", "weighting": "batches"},
        {"estimator": "local"},
        {"estimator": "local", "reduction": "square"},
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
