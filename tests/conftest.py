"""What every test starts from, and what none leaves behind."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# These need a GPU; `make gpu` asks for them.
collect_ignore = [] if os.environ.get("MAS_EXT_TEST_DEVICE") == "cuda" else ["test_cuda.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds or a lot of memory")
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)  # the workers share the cores already


@pytest.fixture(autouse=True)
def isolated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds by the test's name, so order and selection change nothing; puts global state back."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
