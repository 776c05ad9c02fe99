"""The end of a process that has talked to others."""

import time

import torch.distributed as dist


def leave() -> None:
    """Leaves the group, when gloo's threads have let go of their last tensors.

    They need the GIL for it. Asked for when Python is already leaving, it aborts the process
    (pytorch/pytorch#190489); a group that a device mesh knows keeps its threads until then.
    """
    time.sleep(0.5)
    dist.destroy_process_group()
