"""The model is sharded by ``fully_shard``."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mas_ext import MAS, estimate_importance
from mas_ext._penalty import streaming
from tests.distributed.models import (
    IN_STEP,
    MIXED,
    RAGGED,
    Net,
    alone,
    assert_same,
    batches,
    exact,
    net,
    parameters,
    protection,
    samples,
    sharded,
    whole,
)
from tests.distributed.training import WAYS, check_scaling_and_clipping, loss, train
from tests.support.processes import World


def check_importance_in_mixed_precision(world: World) -> None:
    shares = batches(samples(), RAGGED[world.size])
    narrow = [batch.bfloat16() for share in shares for batch in share]
    expected = estimate_importance(net().bfloat16(), narrow, process_group=alone())
    for reshard in (True, False):
        model = sharded(net(), reshard_after_forward=reshard, **MIXED)
        omega = estimate_importance(model, shares[world.rank])
        assert omega["mix"].dtype == torch.float32
        assert_same(omega, expected)


def check_one_sample_a_pass_in_mixed_precision(world: World) -> None:
    """Sums are in float32, whatever gradients are reduced in."""
    x = samples()
    narrow = [sample[None].bfloat16() for sample in x]
    expected = estimate_importance(net().bfloat16(), narrow, process_group=alone())
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
    own = batches(x, RAGGED[world.size])[world.rank]
    assert_same(estimate_importance(sharded(net(), mp_policy=policy), own, **IN_STEP), expected)


def check_state_is_placed_as_the_parameters(world: World) -> None:
    model = sharded(net())
    mas = MAS(model)
    mas.consolidate([samples()])
    for name, p in model.named_parameters():
        for tensor in (mas.importance[name], mas.anchor[name], mas.state_dict()["anchor"][name]):
            assert isinstance(tensor, DTensor)
            assert (tensor.shape, tensor.placements) == (p.shape, p.placements)
            assert tensor.to_local().shape == p.to_local().shape
        assert torch.equal(mas.anchor[name].to_local(), p.to_local())


def check_params_and_frozen(world: World) -> None:
    x = samples()
    expected = exact(net(), x)
    model = sharded(net())
    own = batches(x, RAGGED[world.size])[world.rank]
    for options in ({}, IN_STEP):
        model.mix.requires_grad_(False)
        ours = estimate_importance(model, own, params=["mix", "head.*"], **options)
        assert_same(ours, {name: expected[name] for name in ("head.weight", "head.bias")})
        assert not model.mix.requires_grad
        model.mix.requires_grad_(True)
        chosen = ["mix", "blocks.0.up.weight"]
        ours = estimate_importance(model, own, params=chosen, **options)
        assert_same(ours, {name: expected[name] for name in chosen})
        assert all(p.requires_grad for p in model.parameters())


def check_a_forward_of_ones_own(world: World) -> None:
    """A batch of another form: a dictionary, of which the model takes a part."""
    x = samples()
    own = [{"x": batch} for batch in batches(x, RAGGED[world.size])[world.rank]]
    omega = estimate_importance(sharded(net()), own, forward=lambda model, b: model(b["x"]))
    assert_same(omega, exact(net(), x))


def check_meta_initialisation(world: World) -> None:
    with torch.device("meta"):
        model = Net()
    sharded(model).to_empty(device="cpu")
    start = net()
    state = dict(start.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(distribute_tensor(state[name], p.device_mesh, p.placements))
    x = samples()
    assert_same(estimate_importance(model, [x] if world.rank == 0 else []), exact(start, x))


def check_tied_parameters(world: World) -> None:
    def tied() -> nn.Module:
        torch.manual_seed(3)
        first = nn.Linear(6, 6)
        last = nn.Linear(6, 6)
        last.weight = first.weight
        return nn.Sequential(first, nn.Tanh(), last)

    x = samples()[:, 0]
    own = batches(x, RAGGED[world.size])[world.rank]
    assert_same(estimate_importance(fully_shard(tied()), own), exact(tied(), x))


def _step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model, x).backward()
    return whole({name: p.grad for name, p in model.named_parameters()})


def check_training_goes_on_as_if_nothing_had_been_measured(world: World) -> None:
    x = samples(6, seed=world.rank + 2)
    for reshard in (True, False):
        model = sharded(net(), reshard_after_forward=reshard)
        group = model.blocks[0]._get_fsdp_state()._fsdp_param_group
        expected = _step(sharded(net()), x)
        for estimator in ("per_sample", "local", "per_sample_sharded", "batch"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what "local" leaves out
                own = [samples(5)] if world.rank == 0 else []
                estimate_importance(model, own, estimator=estimator)
            assert_same(_step(model, x), expected, 0.0)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            assert (group.post_forward_mesh_info is not None) == reshard
            assert group.reduce_grads
            assert group.reshard_after_backward
        assert model.training


def check_measured_between_forward_and_backward(world: World) -> None:
    x, model = samples(6, seed=world.rank + 2), sharded(net())
    expected = _step(sharded(net()), x)
    value = loss(model, x)
    everything = samples()
    for options in ({}, IN_STEP):
        ours = estimate_importance(model, [everything] if world.rank == 0 else [], **options)
        assert_same(ours, exact(net(), everything))
    value.backward()
    grads = whole({name: p.grad for name, p in model.named_parameters()})
    assert_same(grads, expected, 1e-6)


def check_kept_gradients(world: World) -> None:
    """Half-way through accumulation without communication, they are whole and not reduced yet."""
    first, second = samples(4, seed=world.rank + 7), samples(4, seed=world.rank + 8)

    def accumulated(measure: bool) -> dict[str, Tensor]:
        model = sharded(net())
        model.set_requires_gradient_sync(False)
        loss(model, first).backward()
        if measure:
            estimate_importance(model, [samples(5)])
            estimate_importance(model, [samples(5)], **IN_STEP)
        model.set_requires_gradient_sync(True)
        loss(model, second).backward()
        return whole({name: p.grad for name, p in model.named_parameters()})

    assert_same(accumulated(True), accumulated(False), 0.0)


def check_training_under_a_scaler(world: World) -> None:
    check_scaling_and_clipping(world.rank, world.size)


def check_the_penalty_anywhere_in_a_step(world: World) -> None:
    """The root's parameters are whole after a forward pass, and what is held are the shards."""
    x, model = samples(6), sharded(net())
    mas = MAS(model, 2.0)
    mas.consolidate([x])
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().add_(0.1)
    by_hand = protection(mas).penalty(parameters(model))
    expected = torch.tensor(by_hand, dtype=torch.float64)
    before = mas.penalty()
    value = loss(model, x)
    between = mas.penalty()
    value.backward()
    for penalty in (before, between, mas.penalty(), mas.add_penalty_grad_()):
        torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)


def check_state_in_fewer_bytes(world: World) -> None:
    x = samples()
    expected = exact(net(), x)
    for state_dtype, tolerance in (("bfloat16", 2**-8), ("uint8", 2**-7)):
        model = sharded(net())
        mas = MAS(model, 2.0, state_dtype=state_dtype)
        mas.consolidate(batches(x, RAGGED[world.size])[world.rank])
        assert_same(mas.importance, expected, tolerance)
        with torch.no_grad():
            for p in model.parameters():
                p.to_local().add_(0.1)
        right, named = protection(mas), parameters(model)
        by_hand = torch.tensor(right.penalty(named), dtype=torch.float64)
        value = mas.add_penalty_grad_()
        torch.testing.assert_close(value.double(), by_hand, rtol=1e-6, atol=0)
        ours = {name: p.grad for name, p in model.named_parameters()}
        assert_same(ours, {n: right.gradient(n, p.double()) for n, p in named.items()})


def check_growth_and_late_sharding_are_refused(world: World) -> None:
    model = fully_shard(nn.Sequential(nn.Linear(6, 8)))
    mas = MAS(model)
    mas.consolidate([samples()[:, 0]])
    before = whole(mas.importance)
    model[0] = fully_shard(nn.Linear(6, 16))
    with pytest.raises(ValueError, match=r"'0\.weight' had shape \[8, 6\] and now has \[16, 6\]"):
        mas.consolidate([samples()[:, 0]])
    assert_same(mas.importance, before, 0.0)

    if world.size == 1:
        return  # a part is the whole
    late = nn.Sequential(nn.Linear(6, 8))
    mas = MAS(late, process_group=alone())
    mas.consolidate([samples()[:, 0]])
    fully_shard(late)
    with pytest.raises(ValueError, match="remembered whole"):
        mas.penalty()


def check_a_state_is_taken_over(world: World) -> None:
    model = sharded(net())
    mas = MAS(model, 2.0)
    mas.consolidate([samples()])
    mas.update_importance([samples(4)])
    state = mas.state_dict()
    again = MAS(sharded(net()))
    again.load_state_dict(state)
    assert_same(again.importance, whole(mas.importance), 0.0)
    groups = ("importance", "anchor", "earlier", "open")
    plain = {**state, **{group: whole(state[group]) for group in groups}}
    again = MAS(sharded(net()))
    again.load_state_dict(plain)
    assert_same(again.importance, whole(mas.importance), 0.0)
    again.consolidate()
    mas.consolidate()
    assert_same(again.importance, whole(mas.importance), 0.0)


def check_state_in_host_memory(world: World) -> None:
    """Brought to the parameters in pieces: the same bits as at once."""
    x = samples()

    def trained(way: str) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor]]:
        model = sharded(net())
        mas = MAS(model, 2.0, state_dtype="uint8", state_device="cpu")
        mas.consolidate(batches(x, RAGGED[world.size])[world.rank])
        seen = train(model, mas, way, samples(6, seed=world.rank + 2))
        mas.consolidate(batches(x, RAGGED[world.size])[world.rank])
        return whole(parameters(model)), seen, whole(mas.importance)

    for way in WAYS:
        ways = [trained(way)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streaming, "PIECE", 256)
            patch.setattr(streaming, "is_elsewhere", lambda state, device: True)
            ways.append(trained(way))
        (plain, values, omega), (ours, sums, merged) = ways
        assert_same(ours, plain, 0.0)
        assert_same(merged, omega, 0.0)
        assert sums == pytest.approx(values, rel=1e-6)
