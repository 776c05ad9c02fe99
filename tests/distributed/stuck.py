"""One rank never comes: for the test of what starts the processes."""

from __future__ import annotations

import time

from tests.distributed.worker import World


def check_that_ends(world: World) -> None:
    pass


def check_that_does_not(world: World) -> None:
    if world.rank == 1:
        time.sleep(3600)
