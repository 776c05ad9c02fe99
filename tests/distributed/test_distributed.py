"""Importance, penalty, training and states on several processes, against one and by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.distributed import checkpoints, models
from tests.support.processes import World, checks, run

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="a build of PyTorch without torch.distributed"
)

PROGRAMS = ["spreads", "fsdp2", "replicas", "failures", "checkpoints"]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """What one process saved: a plain file, and both of torch.distributed.checkpoint's formats."""
    folder = tmp_path / "shared"
    folder.mkdir()
    for name in checkpoints.DTYPES:
        model, mas = checkpoints.original(name)
        mas.save(folder / f"{name}.file")
        for form, writer in checkpoints.WRITERS.items():
            path = folder / f"{name}-{form}-of-1.dcp"
            dcp.save({"model": model, "mas": mas}, storage_writer=writer(str(path)))
    return folder


def load_all_on_one_process(shared: Path) -> int:
    folders = sorted(shared.glob("*.dcp"))
    for folder in folders:
        name, form = folder.name.split("-")[:2]
        model, mas = checkpoints.fresh(name, lambda model: model)
        reader = checkpoints.READERS[form](str(folder))
        dcp.load({"model": model, "mas": mas}, storage_reader=reader)
        checkpoints.assert_is_original(mas, shared / f"{name}.file")
    return len(folders)


@pytest.mark.filterwarnings("ignore")  # that there is no process group
def test_on_two_ranks(tmp_path: Path, shared: Path) -> None:
    run(PROGRAMS, 2, tmp_path / "ranks2")
    assert load_all_on_one_process(shared) == 4 + 2 * 4


def test_on_one_rank(tmp_path: Path) -> None:
    """Here: a group of one process needs no other."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for check in [*checks("spreads"), *checks("fsdp2")]:
            torch.manual_seed(0)
            check(World(0, 1, tmp_path))
    finally:
        models.alone.cache_clear()
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_on_four_ranks(tmp_path: Path, shared: Path) -> None:
    run(["checkpoints"], 2, tmp_path / "ranks2")
    run(PROGRAMS, 4, tmp_path / "ranks4")
    assert load_all_on_one_process(shared) == 4 + 2 * 4 + 3 * 4
    check = "checkpoints:check_loading_what_others_saved"
    run([check], 2, tmp_path / "again")  # of what four saved


@pytest.mark.slow
@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_trainers_on_two_processes_measure_and_train_as_one(tmp_path: Path, library: str) -> None:
    """As torchrun starts them."""
    pytest.importorskip({"transformers": "accelerate"}.get(library, library))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.run(
        [*start, "-m", "tests.distributed.trainers", library, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-6000:]
