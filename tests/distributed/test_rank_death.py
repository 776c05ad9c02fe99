"""One of several processes dies: the others notice in time, and all go on to the same bits."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mas_ext import MAS
from tests.distributed.models import net, samples, sharded
from tests.support.killed import BETWEEN, MEASURING, SAVING, kill_while_learning
from tests.support.processes import leave

TIMEOUT = 30.0  # seconds that a process waits for another, which may share its core with three
TASKS, SAMPLES = 2, 24
WAYS = {"ddp": nn.parallel.DistributedDataParallel, "fsdp": sharded}


def share(task, rank, size):
    """The batches of a rank, of which the last one has the most."""
    x = samples(SAMPLES * size, seed=task)
    few = SAMPLES // 2
    own = x[few * rank : few * (rank + 1)] if rank < size - 1 else x[few * rank :]
    return list(own.split(2))


def learn(folder, stage, rank, size, way):
    """One of the processes; it takes up what was saved before."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{stage.store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    model = WAYS[way](net())
    mas = MAS(model)
    start = [p.detach().clone() for p in model.parameters()]
    if (folder / "mas").exists():
        mas.load(folder / "mas")
    for task in range(mas.num_tasks, TASKS):
        with torch.no_grad():
            for p, before in zip(model.parameters(), start, strict=True):
                p.copy_(before * (1 + 0.1 * task))

        def progress(done, before=task * SAMPLES):
            stage.done = before + done

        stage.phase = MEASURING
        how = {"checkpoint": folder / "measuring", "save_every": 4, "progress": progress}
        mas.consolidate(share(task, rank, size), **how)
        stage.phase = SAVING
        if way == "fsdp" or rank == 0:
            mas.save(folder / "mas")
        dist.barrier()
        stage.phase = BETWEEN
    leave()


def moment(chance):
    """Half of the first task's samples is its end for most of them: what follows is saving."""
    return chance.choice([chance.randrange(TASKS * SAMPLES), SAMPLES // 2])


def run_with_deaths(folder, size, way, kills, seed):
    more = {"moment": moment, "longest": 0.05, "patience": TIMEOUT + 10}
    return kill_while_learning(learn, folder, size, way, ranks=size, kills=kills, seed=seed, **more)


def test_when_a_process_dies_the_others_raise_and_all_go_on_to_the_same_bits(tmp_path):
    assert MEASURING in run_with_deaths(tmp_path, 2, "fsdp", 2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "way"), [(2, "fsdp"), (2, "ddp"), (4, "fsdp"), (4, "ddp")])
def test_many_deaths(tmp_path, size, way):
    assert MEASURING in run_with_deaths(tmp_path, size, way, 3, seed=1)
