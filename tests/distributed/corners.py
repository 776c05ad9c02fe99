"""Models and loops as people write them, sharded by ``fully_shard``."""

from __future__ import annotations

import torch
import torch.distributed.tensor
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import mas_ext
from mas_ext import MAS, estimate_importance
from tests.distributed.models import (
    RAGGED,
    Net,
    alone,
    assert_same,
    batches,
    exact,
    net,
    parameters,
    samples,
    sharded,
)
from tests.distributed.training import loss
from tests.distributed.worker import World


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
    for options in ({}, {"estimator": "per_sample_sharded"}):
        model = net()
        model.__class__ = Checkpointed
        omega = estimate_importance(sharded(model), own, **options)
        assert_same(omega, exact(net(), x))


def check_modules_sharded_as_one(world: World) -> None:
    x, model = samples(), net()
    fully_shard(list(model.blocks))
    fully_shard(model)
    own = batches(x, RAGGED[world.size])[world.rank]
    for options in ({}, {"estimator": "per_sample_sharded"}):
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
    for options in ({}, {"estimator": "per_sample_sharded"}):
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


def check_gradient_scaling(world: World) -> None:
    """An Inf of the loss's reaches no weight; without one, the scale makes no difference."""
    x = samples(6, seed=world.rank + 2)
    for make in _scaled_optimizers():
        results = []
        for scale in (1.0, 2.0**12):
            model = sharded(net())
            mas = MAS(model, 2.0)
            mas.consolidate([samples()])
            optimizer = make(model, mas)
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            for step in range(3):
                optimizer.zero_grad()
                value = loss(model, x) * (float("inf") if step == 1 and world.rank == 0 else 1.0)
                scaler.scale(value).backward()
                before = {n: p.clone() for n, p in parameters(model).items()}
                scaler.step(optimizer)
                scaler.update()
                if step == 1:
                    assert_same(parameters(model), before, 0.0)
            results.append(parameters(model))
        assert_same(results[1], results[0], 1e-4)


def _scaled_optimizers():
    def attached(mode):
        def make(model, mas):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            mas.attach(optimizer, mode=mode)
            return optimizer

        return make

    def fused(kind, mode):
        return lambda model, mas: kind(model.parameters(), lr=0.05, mas=mas, mode=mode)

    return [
        attached("gradient"),
        fused(mas_ext.optim.SGD, "gradient"),
        fused(mas_ext.optim.AdamW, "proximal"),
    ]


def check_clipping(world: World) -> None:
    """Of the loss's gradient, before what is attached adds its own."""
    shares = [samples(6, torch.float64, seed=rank + 2) for rank in range(world.size)]
    plain, model = net(torch.float64), sharded(net(torch.float64))
    reference, mas = MAS(plain, 2.0, process_group=alone()), MAS(model, 2.0)
    reference.consolidate([samples(dtype=torch.float64)])
    mas.consolidate([samples(dtype=torch.float64)] if world.rank == 0 else [])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    mas.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, shares[world.rank]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        _clipped_step(plain, reference, shares)
    assert_same(parameters(model), parameters(plain), 1e-9)


def _clipped_step(model: nn.Module, mas: MAS, shares: list[Tensor]) -> None:
    """By hand, on the whole model."""
    named = dict(model.named_parameters())
    value = torch.stack([loss(model, x) for x in shares]).mean()
    grads = torch.autograd.grad(value, list(named.values()))
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    assert norm > 0.1
    with torch.no_grad():
        for (name, p), g in zip(named.items(), grads, strict=True):
            pull = 2.0 * mas.importance[name] * (p - mas.anchor[name])
            p.sub_(0.05 * (g * 0.1 / (norm + 1e-6) + pull))
