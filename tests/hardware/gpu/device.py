"""The device that is tested, and a pytest plugin for every step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from json import dumps

import pytest
import torch

from tests.hardware.gpu import stand_in

DEVICE = os.environ.get("MAS_EXT_TEST_DEVICE", "cpu")
REHEARSAL = DEVICE == "cpu"

needs_gpu = pytest.mark.skipif(REHEARSAL, reason="needs a GPU")


def pytest_configure() -> None:
    if REHEARSAL:
        stand_in.install()


@pytest.fixture(autouse=True)
def waits_for_the_device() -> Iterator[None]:
    """What a kernel did wrong belongs to the test that launched it."""
    yield
    torch.cuda.synchronize()


@pytest.fixture
def add_row(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Adds a row to a table of the report, by the table's title and columns."""

    def add(title: str, columns: list[str], *cells: str) -> None:
        record_property("row", dumps([title, columns, cells]))

    return add
