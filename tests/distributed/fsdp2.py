"""The model is sharded by ``fully_shard``."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mas_ext import MAS, estimate_importance
from tests.distributed.models import (
    IDLE,
    MIXED,
    RAGGED,
    alone,
    assert_same,
    assert_strength_found,
    batches,
    exact,
    net,
    parameters,
    samples,
    sharded,
    whole,
)
from tests.distributed.training import check_every_way, check_scaling_and_clipping, loss
from tests.support.processes import World


def check_importance(world: World) -> None:
    x = samples()
    expected = exact(net(), x)
    for sizes in (RAGGED, IDLE):
        own = batches(x, sizes[world.size])[world.rank]
        for reshard in (True, False):
            omega = estimate_importance(sharded(net(), reshard_after_forward=reshard), own)
            assert_same(omega, expected)
            assert omega.num_samples == len(x)
            assert set(omega.coverage.values()) == {"direct"}


def check_importance_in_mixed_precision(world: World) -> None:
    shares = batches(samples(), RAGGED[world.size])
    narrow = [batch.bfloat16() for share in shares for batch in share]
    expected = estimate_importance(net().bfloat16(), narrow, process_group=alone())
    for reshard in (True, False):
        model = sharded(net(), reshard_after_forward=reshard, **MIXED)
        omega = estimate_importance(model, shares[world.rank])
        assert omega["mix"].dtype == torch.float32
        assert_same(omega, expected)


IN_STEP = {"estimator": "per_sample_sharded"}


def check_importance_one_sample_a_pass(world: World) -> None:
    x = samples()
    expected = exact(net(), x)
    for sizes in (RAGGED, IDLE):
        own = batches(x, sizes[world.size])[world.rank]
        for reshard in (True, False):
            model = sharded(net(), reshard_after_forward=reshard)
            mas = MAS(model, "auto")
            mas.update_importance(own[:1], **IN_STEP)
            mas.consolidate(own[1:], **IN_STEP)
            assert_same(mas.importance, expected)
            assert_strength_found(mas, x)
    omega = estimate_importance(model, own, **IN_STEP)
    assert omega.num_samples == len(x)
    assert set(omega.coverage.values()) == {"one sample at a time"}
    chosen = ["mix", "blocks.0.up.weight"]
    ours = estimate_importance(model, own, params=chosen, **IN_STEP)
    assert_same(ours, {name: expected[name] for name in chosen})
    assert all(p.requires_grad for p in model.parameters())


def check_one_sample_a_pass_in_mixed_precision(world: World) -> None:
    """Sums are in float32, whatever gradients are reduced in."""
    x = samples()
    narrow = [sample[None].bfloat16() for sample in x]
    expected = estimate_importance(net().bfloat16(), narrow, process_group=alone())
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)
    own = batches(x, RAGGED[world.size])[world.rank]
    assert_same(estimate_importance(sharded(net(), mp_policy=policy), own, **IN_STEP), expected)


def check_faults_one_sample_a_pass(world: World) -> None:
    mas = MAS(sharded(net()))
    bad = samples(3)
    bad[1] = float("nan")
    for data, kind, text in (
        ([samples(2), bad], ValueError, "not finite"),
        ([samples(2), 7], TypeError, "a batch is a int"),
    ):
        with pytest.raises(kind, match=text):
            mas.consolidate(data if world.rank == world.size - 1 else [samples(5)], **IN_STEP)
        assert not mas.state_dict()["open"]
    with pytest.raises(ValueError, match="no samples"):
        mas.consolidate([], **IN_STEP)
    mas.consolidate([samples(3)], **IN_STEP)
    plain = estimate_importance(net(), [samples()], process_group=alone(), **IN_STEP)
    assert set(plain.coverage.values()) == {"direct"}


def check_only_the_blocks_are_sharded(world: World) -> None:
    x = samples()
    model = net()
    expected = exact(model, x)
    for block in model.blocks:
        fully_shard(block)
    mas = MAS(model, "auto")
    mas.consolidate(batches(x, RAGGED[world.size])[world.rank])
    assert_same(mas.importance, expected)
    assert_strength_found(mas, x)
    assert type(mas.importance["mix"]) is Tensor


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
    model.mix.requires_grad_(False)
    own = batches(x, RAGGED[world.size])[world.rank]
    assert_same(
        estimate_importance(model, own, params=["mix", "head.*"]),
        {name: expected[name] for name in ("head.weight", "head.bias")},
    )
    assert not model.mix.requires_grad
    model.mix.requires_grad_(True)
    chosen = ["mix", "blocks.0.up.weight"]
    ours = estimate_importance(model, own, params=chosen)
    assert_same(ours, {name: expected[name] for name in chosen})


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


def check_other_estimators(world: World) -> None:
    def layers() -> nn.Module:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    shares = batches(samples()[:, 0], RAGGED[world.size])
    for estimator in ("batch", "local"):
        everything = [batch for share in shares for batch in share]
        expected = estimate_importance(
            layers(), everything, estimator=estimator, process_group=alone()
        )
        ours = estimate_importance(fully_shard(layers()), shares[world.rank], estimator=estimator)
        assert_same(ours, expected)
        assert ours.coverage == expected.coverage


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


def check_training(world: World) -> None:
    for reshard in (True, False):
        check_every_way(
            lambda model: sharded(model, reshard_after_forward=reshard),  # noqa: B023
            lambda: net(torch.float64),
            world.rank,
            world.size,
        )


def check_training_under_a_scaler(world: World) -> None:
    check_scaling_and_clipping(sharded, net, world.rank, world.size)


def check_the_penalty_anywhere_in_a_step(world: World) -> None:
    """The root's parameters are whole after a forward pass, and what is held are the shards."""
    x, model = samples(6), sharded(net())
    mas = MAS(model, 2.0)
    mas.consolidate([x])
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().add_(0.1)
    named, anchor, omega = parameters(model), whole(mas.anchor), whole(mas.importance)
    expected = sum(
        (o.double() * (named[n].double() - anchor[n].double()) ** 2).sum() for n, o in omega.items()
    )
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
        named, anchor, omega = parameters(model), whole(mas.anchor), whole(mas.importance)
        by_hand = sum(
            (o.double() * (named[n].double() - anchor[n].double()) ** 2).sum()
            for n, o in omega.items()
        )
        value = mas.add_penalty_grad_()
        torch.testing.assert_close(value.double(), by_hand, rtol=1e-6, atol=0)
        ours = {name: p.grad for name, p in model.named_parameters()}
        gradient = {
            n: 2.0 * o.double() * (named[n].double() - anchor[n].double()) for n, o in omega.items()
        }
        assert_same(ours, gradient)


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
    plain = {
        **state,
        **{group: whole(state[group]) for group in ("importance", "anchor", "earlier", "open")},
    }
    again = MAS(sharded(net()))
    again.load_state_dict(plain)
    assert_same(again.importance, whole(mas.importance), 0.0)
    again.consolidate()
    mas.consolidate()
    assert_same(again.importance, whole(mas.importance), 0.0)
