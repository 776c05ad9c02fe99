"""One of several processes dies: the others notice in time, and all go on to the same bits."""

import os
import random

import pytest

from mas_ext._state import checkpoint
from tests.distributed import deaths
from tests.support import killed

NEVER = 10**6
END = deaths.SAMPLES // 2  # of the first task, for most of them: what follows is saving


def run_with_deaths(folder, size, way, count, seed):
    """Kills one process at a time, so often, and compares with processes that nobody killed.

    Returns:
        The phases in which one was killed.
    """
    chance, phases, attempt = random.Random(seed), [], 0
    for name in ("whole", "parts"):
        (folder / name).mkdir()
    codes, _, _ = deaths.together(folder / "whole", size, way, 0, 0, NEVER, 0)
    assert codes == [0] * size
    whole = (folder / "whole" / "mas").read_bytes()
    parts = folder / "parts"
    while len(phases) < count:
        attempt += 1
        victim = chance.randrange(size)
        codes, took, phase = deaths.together(
            parts,
            size,
            way,
            attempt,
            victim,
            moment=chance.choice([chance.randrange(deaths.TASKS * deaths.SAMPLES), END]),
            delay=chance.uniform(0, 0.05),
        )
        assert took < deaths.TIMEOUT + 10, "nobody waits for the dead longer than the timeout"
        assert set(codes) <= {0, 1, -9}, codes
        if codes[victim] == -9:
            phases.append(phase)
            others = codes[:victim] + codes[victim + 1 :]
            ended = (parts / "mas").exists() and checkpoint.read(parts / "mas")["num_tasks"] == 2
            assert set(others) == {1} or ended, "those who are left raise an error"
        if codes == [0] * size:
            assert (parts / "mas").read_bytes() == whole
            (parts / "mas").unlink()
    codes, _, _ = deaths.together(parts, size, way, attempt + 1, 0, NEVER, 0)
    assert codes == [0] * size
    assert (parts / "mas").read_bytes() == whole
    left = [n for n in os.listdir(parts) if not n.startswith(("error.", "store.", "mas"))]
    assert left == [], "nothing piles up"
    return phases


def test_when_a_process_dies_the_others_raise_and_all_go_on_to_the_same_bits(tmp_path):
    assert killed.MEASURING in run_with_deaths(tmp_path, 2, "fsdp", 2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "way"), [(2, "fsdp"), (2, "ddp"), (4, "fsdp"), (4, "ddp")])
def test_many_deaths(tmp_path, size, way):
    phases = run_with_deaths(tmp_path, size, way, 3, seed=1)
    assert killed.MEASURING in phases
