"""Builds the kernels in place for this card: where they are missing, old, or for other cards.

Offline: ``setup.py`` needs only torch, setuptools, nvcc and a C++ compiler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.hardware.gpu.checks import NeedsGpu, Session
from tests.hardware.gpu.steps import ROOT

Capability = tuple[int, int]


def run(session: Session) -> None:
    if session.rehearsal:
        session.check("the kernels are built", rehearse)
        return
    capability = torch.cuda.get_device_capability()
    if session.check("the kernels are built", build_if_needed, capability):
        session.check("they serve CUDA tensors", kernels_are_registered)


def rehearse() -> str:
    raise NeedsGpu(f"here {reason_to_build(ROOT, (8, 0)) or 'they are up to date'}")


def build_if_needed(capability: Capability) -> str:
    reason = reason_to_build(ROOT, capability)
    if reason is None:
        return "they were up to date"
    build(f"{capability[0]}.{capability[1]}")
    if left := reason_to_build(ROOT, capability):
        raise RuntimeError(f"built, and still {left}")
    return f"built for sm_{capability[0]}{capability[1]}, since {reason}"


def build(architecture: str) -> None:
    environment = {
        **os.environ,
        "TORCH_CUDA_ARCH_LIST": architecture,
        "MAS_EXT_CUDA": "1",
        "MAS_EXT_NATIVE": "1",
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def reason_to_build(root: Path, capability: Capability) -> str | None:
    """Looks at files and asks another process, since a library cannot be loaded twice."""
    libraries = [*root.glob("mas_ext/_kernels*.so"), *root.glob("mas_ext/_C*.so")]
    if len(libraries) < 2:
        return "they are missing"
    sources = [root / "setup.py", *(p for p in root.glob("csrc/**/*") if p.is_file())]
    if max(p.stat().st_mtime for p in sources) > min(p.stat().st_mtime for p in libraries):
        return "csrc/ or setup.py is newer than they are"
    built_for = architectures()
    if not covers(built_for, capability):
        return f"they are built for {', '.join(built_for) or 'no GPU'}"
    return None


def architectures() -> list[str]:
    code = "import mas_ext; print(*mas_ext.build_info()['cuda_architectures'])"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return said.stdout.split()


def covers(built_for: Sequence[str], capability: Capability) -> bool:
    """Machine code runs on its own major version from its minor on; PTX on everything later."""
    for architecture in built_for:
        major, minor, ptx = re.fullmatch(r"(\d+)\.(\d+)a?(\+PTX)?", architecture).groups()
        version = int(major), int(minor)
        if version <= capability and (version[0] == capability[0] or ptx):
            return True
    return False


def kernels_are_registered() -> str:
    import mas_ext
    from mas_ext._operators.declarations import OPERATORS

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = [n for n in OPERATORS if not has_kernel(f"mas_ext::{n}", "CUDA")]
    assert not missing, f"no CUDA kernel for {missing}: {mas_ext.build_info()}"
    return f"all {len(OPERATORS)} operators"
