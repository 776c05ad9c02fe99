"""Every test starts from the same global state, and leaves none of its own behind."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

import pytest
import torch

try:
    import numpy as np
except ImportError:  # `make gpu` needs only torch and pytest
    np = None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds or a lot of memory")
    config.addinivalue_line("markers", "hardware: compiles CUDA code and runs it on the host")
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)  # the workers share the cores already


@pytest.fixture(autouse=True)
def isolated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds by the test's name, so order and selection change nothing; puts global state back."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    states = random.getstate(), np and np.random.get_state(), torch.get_rng_state()
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    if np:
        np.random.seed(seed)
    torch.manual_seed(seed)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    random.setstate(states[0])
    if np:
        np.random.set_state(states[1])
    torch.set_rng_state(states[2])
