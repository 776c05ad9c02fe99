"""Several processes (gloo): importance, penalty and training against one process and by hand.

What is checked is in ``tests/distributed/``; every test here is one start of the processes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="a build of PyTorch without torch.distributed"
)


def _assert_all_is_well(programs: list[str], ranks: int, folder: Path) -> None:
    found = run(programs, ranks, folder)
    wrong = {check: problems for check, problems in found.items() if problems}
    report = [f"{check}\n{text}" for check, problems in wrong.items() for text in problems]
    assert not wrong, "\n".join(report)
    for program in programs:
        assert any(check.startswith(f"{program}.") for check in found), f"{program} has no checks"


def test_on_two_ranks(tmp_path: Path) -> None:
    _assert_all_is_well(["fsdp2", "replicas", "failures", "meshes"], 2, tmp_path)


def test_on_one_rank(tmp_path: Path) -> None:
    _assert_all_is_well(["fsdp2"], 1, tmp_path)


@pytest.mark.slow
def test_what_hangs_is_ended_and_told(tmp_path: Path) -> None:
    found = run(["stuck"], 2, tmp_path, silence=10)
    assert found["stuck.check_that_ends"] == []
    ended = [key for key in found if "ended with -9" in key]
    assert len(ended) == 2, found


@pytest.mark.slow
def test_loops_and_models_as_people_write_them(tmp_path: Path) -> None:
    _assert_all_is_well(["corners"], 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["fsdp2", "meshes", "replicas", "failures"])
def test_on_four_ranks(program: str, tmp_path: Path) -> None:
    _assert_all_is_well([program], 4, tmp_path)
