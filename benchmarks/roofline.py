"""The roofline: a plain C++ loop that moves the bytes of one fused pass over the same tensors."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

NAME = "roofline"
SOURCE = Path(__file__).with_name("roofline.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
WRITTEN = {2: 1, 3: 1, 4: 1, 5: 2, 6: 3}  # number of streams → how many of them are written
_FloatPointers = ctypes.POINTER(ctypes.c_void_p)


@cache
def _library() -> ctypes.CDLL:
    """Compiled for this processor at first use; a file would not fit another one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "roofline.so")
        compiler = os.environ.get("CXX", "g++")
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(path)], check=True)
        # torch has loaded OpenMP already, and the loader shares it by name: a second pool of
        # threads would spin beside the first one and slow down the call that comes next.
        library = ctypes.CDLL(str(path))
    for function in (getattr(library, f"stream{streams}") for streams in WRITTEN):
        function.restype = None
        function.argtypes = [
            ctypes.POINTER(_FloatPointers),
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_int64,
            ctypes.c_float,
            ctypes.c_int,
        ]
    return library


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def make(streams: list[list[Tensor]], factor: float = 0.0) -> Callable[[], None]:
    """A call that reads every stream and adds factor · Σ(only read) to those that are written."""
    function = getattr(_library(), f"stream{len(streams)}")
    tables = [_pointers(stream) for stream in streams]
    table = (_FloatPointers * len(tables))(*(ctypes.cast(t, _FloatPointers) for t in tables))
    sizes = (ctypes.c_int64 * len(streams[0]))(*(t.numel() for t in streams[0]))
    threads = torch.get_num_threads()

    def run(keep_alive: object = (tables, streams)) -> None:
        function(table, sizes, len(sizes), factor, threads)

    return run


def copy_of(moved: int, device: torch.device) -> Callable[[], None]:
    """On a GPU: a copy that reads half of so many bytes and writes the other half."""
    source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def check(streams: int) -> None:
    """Asserts that the loop visits every element once, also if tensors don't split evenly."""
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.rand(n, generator=generator) for n in (1, 1001, 7, 64)] for _ in range(streams)]
    written = WRITTEN[streams]
    sums = [torch.stack(tensors).sum(0) for tensors in zip(*lists[written:], strict=True)]
    expected = [torch._foreach_add(tensors, sums) for tensors in lists[:written]]
    make(lists, factor=1.0)()
    torch.testing.assert_close(lists[:written], expected)
