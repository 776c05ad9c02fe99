"""A pytest plugin: tests that were written for the CPU run the operators on the device.

Their tensors stay on the CPU. An operator is given copies on the device, with the same strides,
offsets, gaps and shared memory, and what it has written is copied back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.hardware.gpu.device import DEVICE


class Redirect(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "mas_ext":
            return func(*args, **(kwargs or {}))
        copies = Copies()
        result = func(
            *map(copies.of_argument, args), **tree_map_only(Tensor, copies.of, kwargs or {})
        )
        copies.write_back()
        Redirect.calls += 1
        return tree_map_only(Tensor, Tensor.cpu, result)


class Copies:
    """Of whole storages: tensors that share memory on the CPU share it on the device."""

    def __init__(self) -> None:
        self.of_storage: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.of_storage:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.of_storage[storage.data_ptr()] = whole, whole.to(DEVICE, copy=True)
        _, there = self.of_storage[storage.data_ptr()]
        empty = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return empty.set_(there.untyped_storage(), *place)

    def of_argument(self, argument: Any) -> Any:
        """Scalars may be on either side: here float64 stays on the CPU, as numbers do."""
        if isinstance(argument, Tensor) and argument.dim() == 0:
            return argument if argument.dtype == torch.float64 else argument.to(DEVICE)
        return tree_map_only(Tensor, self.of, argument)

    def write_back(self) -> None:
        for here, there in self.of_storage.values():
            here.copy_(there)


@pytest.fixture(autouse=True)
def redirected() -> Iterator[None]:
    with Redirect():
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where no call was redirected, nothing was shown about the device."""
    if not Redirect.calls:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
