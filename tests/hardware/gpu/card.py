"""The card, and kernels that are built for it, in place.

Offline: ``setup.py`` needs only torch, setuptools, nvcc and a C++ compiler.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable

import torch

from tests.hardware.gpu.device import needs_gpu
from tests.hardware.gpu.steps import ROOT


def test_this_machine(record_property: Callable[[str, object], None]) -> None:
    """Results mean nothing without it."""
    record_property("platform", platform.platform())
    record_property("python", platform.python_version())
    record_property("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    record_property("nvcc", output_of("nvcc", "--version").rpartition("\n")[2] or "none")
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    record_property("devices", output_of("nvidia-smi", query, "--format=csv,noheader") or "none")


def output_of(*command: str) -> str:
    """Nothing where the program is missing or does not answer."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip()


@needs_gpu
def test_there_is_a_gpu() -> None:
    assert torch.cuda.is_available(), (
        f"torch {torch.__version__} finds no GPU that it can use; --device cpu is a rehearsal"
    )
    torch.ones(1, device="cuda").add_(1).item()


@needs_gpu
def test_kernels_are_built() -> None:
    """For this card. Where there is ninja, only what is out of date is compiled."""
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    choices = {"TORCH_CUDA_ARCH_LIST": architecture, "MAS_EXT_CUDA": "1", "MAS_EXT_NATIVE": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **choices}, check=True)


@needs_gpu
def test_kernels_serve_cuda_tensors() -> None:
    import mas_ext
    from mas_ext._operators.declarations import OPERATORS

    assert mas_ext.build_info()["cuda_kernels"]
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mas_ext::{name}", "CUDA"), name
