"""What goes wrong on one rank is raised on all, and leaves all as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mas_ext import MAS
from tests.distributed.models import IN_STEP, assert_same, net, parameters, samples, sharded, whole
from tests.distributed.training import loss
from tests.support.processes import World


def _nan() -> list[Any]:
    bad = samples(3)
    bad[1, 0, 0] = float("nan")
    return [samples(2), bad]


def _breaks() -> Iterator[Tensor]:
    yield samples(2)
    raise OSError("the disk is gone")


# What one rank is given → the error there and elsewhere.
FAULTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a NaN": (_nan, ValueError, "not finite"),
    "a batch of no known form": (lambda: [samples(2), 7], TypeError, "a batch is a int"),
    "another shape": (lambda: [torch.zeros(2, 4, 5)], RuntimeError, "shape"),
    "data that fails": (_breaks, OSError, "the disk is gone"),
    "no iterable": (lambda: 5, TypeError, "data is a int"),
}
# The others end a pass that all ranks make together.
FOUND_BEFORE_A_PASS = ("a NaN", "a batch of no known form")
WRAPPED: list[tuple[Callable[[nn.Module], nn.Module], dict[str, Any]]] = [
    (DistributedDataParallel, {}),
    (sharded, {}),
    (sharded, IN_STEP),
]


def check_every_fault(world: World) -> None:
    for wrap, options in WRAPPED:
        model = wrap(net())
        mas = MAS(model, 2.0)
        mas.consolidate([samples()])
        mas.update_importance([samples(3)])
        before = _snapshot(mas, model)
        for where in {0, world.size - 1}:
            for name, (make, kind, text) in FAULTS.items():
                if options and name not in FOUND_BEFORE_A_PASS:
                    continue
                data = make() if world.rank == where else [samples(4)]
                expected = kind if world.rank == where or kind is not OSError else RuntimeError
                with pytest.raises(expected, match=text) as caught:
                    mas.consolidate(data, **options)
                assert (f"rank {where} failed" in str(caught.value)) == (world.rank != where)
                _assert_unchanged(before, _snapshot(mas, model))
        loss(model, samples(4)).backward()  # and nothing waits for what was broken off
        mas.consolidate([samples(4)], **options)


def check_no_data_anywhere(world: World) -> None:
    for wrap, options in WRAPPED:
        mas = MAS(wrap(net()))
        with pytest.raises(ValueError, match="no samples"):
            mas.update_importance([], **options)
        assert not mas.state_dict()["open"]


def check_arguments(world: World) -> None:
    with pytest.raises(TypeError, match="process_group is 'world'"):
        MAS(net(), process_group="world")
    with pytest.raises(ValueError, match="leave process_group out"):
        MAS(sharded(net()), process_group=torch.distributed.group.WORLD).consolidate([samples()])


def check_fsdp1_is_refused(world: World) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="which flattens its parameters"):
        MAS(model).consolidate([samples()])


def _snapshot(mas: MAS, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    state = mas.state_dict()
    tensors = {group: whole(state[group]) for group in ("importance", "anchor", "open")}
    return {**tensors, "parameters": {n: p.clone() for n, p in parameters(model).items()}}


def _assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for group, tensors in before.items():
        assert_same(after[group], tensors, 0.0)
