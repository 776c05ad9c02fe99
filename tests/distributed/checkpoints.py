"""States that one number of processes saves and another loads, to the bit."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh

from mas_ext import MAS
from mas_ext._distributed import gathering
from mas_ext._state import checkpoint
from mas_ext._state.distributed_checkpoint import unpacked
from tests.distributed.models import net, samples, sharded, tensor_parallel, whole
from tests.support.processes import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WRITERS = {
    "pickled": lambda path: dcp.FileSystemWriter(path),
    "safetensors": lambda path: dcp.HuggingFaceStorageWriter(path, save_distributed=True),
}
READERS = {"pickled": dcp.FileSystemReader, "safetensors": dcp.HuggingFaceStorageReader}


def settings(name: str) -> dict[str, Any]:
    merge = "sum_of_sums" if name == "bfloat16" else ("ema", 0.25)
    return {"lambda_reg": 3.0, "merge": merge, "state_dtype": name}


def original(name: str) -> tuple[nn.Module, MAS]:
    """On one process: two tasks, and one that is open."""
    dtype = DTYPES[name]
    model = net(dtype)
    mas = MAS(model, **settings(name))
    for seed in (1, 2):
        mas.consolidate([samples(6, dtype, seed)])
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))
    mas.update_importance([samples(5, dtype)])
    return model, mas


def assert_is_original(mas: MAS, path: Path) -> None:
    found, right = unpacked(mas.state_dict()), checkpoint.read(path)
    assert found.keys() == right.keys()
    for key, value in right.items():
        if key in checkpoint.GROUPS:
            assert {n: t.dtype for n, t in found[key].items()} == {
                n: t.dtype for n, t in value.items()
            }
            assert all(torch.equal(t, value[n]) for n, t in whole(found[key]).items()), key
        elif key != "merge":
            assert found[key] == value, key
    assert list(found["merge"]) == list(right["merge"])


def ways(world: World) -> Iterator[tuple[str, Any]]:
    """How a model is spread over the processes."""
    yield "fsdp", sharded
    mesh = init_device_mesh("cpu", (world.size,))
    yield "tensor parallel", lambda model: tensor_parallel(model, mesh)
    if world.size == 4:
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        yield (
            "both",
            lambda model: sharded(tensor_parallel(model, both["model"]), mesh=both["data"]),
        )


def fresh(name: str, spread: Any) -> tuple[nn.Module, MAS]:
    """A new MAS of a model with other parameters, with room for an open task."""
    model = spread(net(DTYPES[name], seed=7))
    mas = MAS(model, **{**settings(name), "lambda_reg": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tensor parallelism is slow
        mas.update_importance([samples(2, DTYPES[name])], estimator="batch")
    return model, mas


def shared(world: World) -> Path:
    return world.folder.parent / "shared"


def check_loading_a_file(world: World) -> None:
    for name in DTYPES:
        for _, spread in ways(world):
            _, mas = fresh(name, spread)
            mas.load(shared(world) / f"{name}.file")
            assert_is_original(mas, shared(world) / f"{name}.file")
            up = mas.importance["blocks.0.up.weight"]
            assert up.to_local().numel() * world.size == up.numel()


def check_loading_what_others_saved(world: World) -> None:
    """The library's own format and safetensors, by whatever number of processes."""
    for folder in sorted(shared(world).glob("*.dcp")):
        name, form = folder.name.split("-")[:2]
        for _, spread in ways(world):
            model, mas = fresh(name, spread)
            assert isinstance(mas, Stateful)
            with pytest.MonkeyPatch.context() as patch:
                if form == "safetensors":
                    patch.setattr(torch, "load", _refuse)
                reader = READERS[form](str(folder))
                dcp.load({"model": model.state_dict(), "mas": mas}, storage_reader=reader)
            assert_is_original(mas, shared(world) / f"{name}.file")


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("something was unpickled")


def check_saving(world: World) -> None:
    for name in DTYPES:
        for way, spread in ways(world):
            model, mas = fresh(name, spread)
            mas.load(shared(world) / f"{name}.file")
            for form, writer in WRITERS.items():
                path = shared(world) / f"{name}-{form}-{way}-of-{world.size}.dcp"
                dcp.save(
                    {"model": model.state_dict(), "mas": mas}, storage_writer=writer(str(path))
                )


def check_a_file_is_the_same_as_of_one_process(world: World) -> None:
    for name in DTYPES:
        for way, spread in ways(world):
            _, mas = fresh(name, spread)
            mas.load(shared(world) / f"{name}.file")
            path = shared(world) / f"{way}-of-{world.size}.file"
            mas.save(path)
            assert path.read_bytes() == (shared(world) / f"{name}.file").read_bytes()
            dist.barrier()


def check_no_process_holds_all_while_it_saves(world: World) -> None:
    """One whole tensor at a time, on every rank."""
    _, mas = fresh("float32", sharded)
    alive: list[weakref.ref] = []

    def whole_and_watched(tensor: torch.Tensor) -> torch.Tensor:
        if sum(ref() is not None for ref in alive) > 1:
            gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1
        made = tensor.full_tensor().clone()
        alive.append(weakref.ref(made))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "full_tensor", whole_and_watched)
        mas.save(shared(world) / "watched.file")
    assert len(alive) == sum(len(dict(group)) for group in (mas.importance, mas.anchor)) + len(
        unpacked(mas.state_dict())["open"]
    )


def check_an_error_of_the_writer_is_raised_everywhere(world: World) -> None:
    _, mas = fresh("float32", sharded)
    before = {name: t.clone() for name, t in whole(unpacked(mas.state_dict())["open"]).items()}
    error = FileNotFoundError if world.rank == 0 else RuntimeError
    with pytest.raises(error, match=r"rank 0 failed|No such file"):
        mas.save(shared(world) / "no such folder" / "mas")
    after = whole(unpacked(mas.state_dict())["open"])
    assert all(torch.equal(after[name], t) for name, t in before.items())


def check_room_that_is_missing_is_asked_for(world: World) -> None:
    """Never is a part of a state left out without a word."""
    for name, message in {
        "float32": "in the middle of a task",
        "bfloat16": "'sum_of_sums'",
    }.items():
        model = sharded(net(DTYPES[name]))
        mas = MAS(model, state_dtype=name)
        if name == "bfloat16":
            mas.update_importance([samples(2, DTYPES[name])])
        folder = next(shared(world).glob(f"{name}-safetensors-*-of-{world.size}.dcp"))
        reader = dcp.HuggingFaceStorageReader(str(folder))
        before = unpacked(mas.state_dict())
        with pytest.raises(ValueError, match=message):
            dcp.load({"mas": mas}, storage_reader=reader)
        assert unpacked(mas.state_dict())["num_tasks"] == before["num_tasks"] == 0


def check_a_measurement_in_step_is_not_kept(world: World) -> None:
    _, mas = fresh("float32", sharded)
    with pytest.raises(ValueError, match=r"checkpoint: .*'per_sample_sharded' cannot be taken up"):
        mas.update_importance(
            [samples(2)], estimator="per_sample_sharded", checkpoint=world.folder / "measuring"
        )
