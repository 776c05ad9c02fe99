"""One rank never comes: for the test of what starts the processes."""

import time


def check_that_ends(world):
    pass


def check_that_does_not(world):
    if world.rank == 1:
        time.sleep(3600)
