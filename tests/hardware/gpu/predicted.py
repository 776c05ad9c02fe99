"""What the performance model says of a measurement, to stand beside it.

A rehearsal on the CPU shows the prediction for an H100, only to run the same code.
"""

from __future__ import annotations

import torch

from benchmarks.predict import GPUS, Gpu, Problem, find_gpu, predict, predict_abs_matmul
from tests.hardware.gpu.checks import Session

NONE = "–"  # no data sheet of this device


def gpu_of(session: Session) -> Gpu | None:
    return GPUS["h100"] if session.rehearsal else find_gpu(torch.cuda.get_device_name())


def column(session: Session) -> str:
    gpu = gpu_of(session)
    return f"µs predicted, {gpu.name}" if gpu else "µs predicted"


def operator(session: Session, op: str, dtype: str, numel: int) -> str:
    """µs of one call on a list of one tensor."""
    gpu = gpu_of(session)
    return f"{predict(op, 'mas_ext', dtype, [numel], gpu).seconds * 1e6:.1f}" if gpu else NONE


def product(session: Session, dtype: str, problem: Problem) -> str:
    """µs of one call of accumulate_abs_matmul_."""
    gpu = gpu_of(session)
    return (
        f"{predict_abs_matmul('mas_ext', dtype, problem, gpu).seconds * 1e6:.1f}" if gpu else NONE
    )
