"""What inductor's kernels for a GPU read and write: ``python -m benchmarks.predict.inductor``.

The Triton code is generated for a device that is not there, from fake tensors and an H100's
properties, and never compiled. That reaches into torch's internals (2.14); nothing else here does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from benchmarks.lists.accumulate import by_formula as accumulate
from benchmarks.lists.penalty import by_formula as add_penalty_grad
from benchmarks.predict.gpus import GPUS

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
PROPERTIES = SimpleNamespace(
    name=GPUS["h100"].name,
    major=9,
    minor=0,
    multi_processor_count=GPUS["h100"].sms,
    total_memory=int(GPUS["h100"].memory),
    max_threads_per_multi_processor=GPUS["h100"].threads,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    warp_size=32,
    L2_cache_size=GPUS["h100"].l2,
)
LAMBDA, LR = 0.1, 0.5
Lists = list[list[Tensor]]


class Generated(NamedTuple):
    """A kernel, in bytes an element; single numbers that it reads or writes are left out."""

    name: str
    elements: int
    read: int
    written: int


def _add(lists: Lists) -> Tensor:
    return add_penalty_grad(*lists, LAMBDA)


def _accumulate(lists: Lists) -> Tensor:
    accumulate(lists[3], lists[0], LAMBDA)
    return torch.zeros(())


def _value(lists: Lists) -> Tensor:
    energy = torch.zeros(())
    for _, p, a, o in zip(*lists, strict=True):
        energy = energy + (o * (p - a) ** 2).sum()
    return LAMBDA / 2 * energy


def _both(lists: Lists) -> Tensor:
    """The gradients are written to the first list, as new memory would be."""
    energy = torch.zeros(())
    for g, p, a, o in zip(*lists, strict=True):
        delta = p - a
        weighted = o * delta
        g.copy_(LAMBDA * weighted)
        energy = energy + (weighted * delta).sum()
    return LAMBDA / 2 * energy


def _proximal(lists: Lists) -> Tensor:
    energy = torch.zeros(())
    for _, p, a, o in zip(*lists, strict=True):
        c = LAMBDA * LR * o
        p.sub_((p - a) * (c / (1 + c)))
        energy = energy + (o * (p - a) ** 2).sum()
    return LAMBDA / 2 * energy


FORMULAS: dict[str, Callable[[Lists], Tensor]] = {
    "accumulate_importance_": _accumulate,
    "add_penalty_grad_": _add,
    "penalty": _value,
    "penalty_and_grad": _both,
    "proximal_step_": _proximal,
}


@contextmanager
def _pretend() -> Iterator[None]:
    """A GPU as far as inductor asks for one."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import scheduler
    from torch._inductor.async_compile import AsyncCompile
    from torch.utils import _triton

    def properties(device: object = None) -> SimpleNamespace:
        return PROPERTIES

    answers = (
        (CudaInterface.Worker, "get_device_properties", properties),
        (CudaInterface, "get_device_properties", properties),
        (CudaInterface, "get_compute_capability", lambda device=None: 90),
        (CudaInterface, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
        (scheduler, "has_triton", lambda *args: True),
        (_triton, "triton_hash_with_backend", lambda: "none"),
        (AsyncCompile, "triton", lambda *args, **kwargs: None),
    )
    with ExitStack() as stack:
        for owner, name, answer in answers:
            static = isinstance(owner, type) and owner is not AsyncCompile
            value = staticmethod(answer) if static else answer
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def triton_code(job: str, dtype: str, sizes: list[int]) -> str:
    from torch._inductor.compile_fx import view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    fake = FakeTensorMode(shape_env=ShapeEnv())
    wanted = getattr(torch, dtype)
    wide = torch.float64 if wanted == torch.float64 else torch.float32
    dtypes = (wanted, wanted, wanted, wide)
    with _pretend(), torch.no_grad(), V.set_fake_mode(fake), V.set_debug_handler(DebugContext()):
        with fake:
            tensors = [torch.empty(n, dtype=t, device="cuda") for t in dtypes for n in sizes]

            def call(*flat: Tensor) -> tuple[Tensor]:
                count = len(sizes)
                return (FORMULAS[job]([list(flat[i * count : (i + 1) * count]) for i in range(4)]),)

            graph = make_fx(torch.func.functionalize(call), select_decomp_table(), "fake")(*tensors)
        view_to_reshape(graph)
        post_grad_passes(graph, True)
        lowering = GraphLowering(graph, shape_env=fake.shape_env)
        with V.set_graph_handler(lowering):
            lowering.run(*tensors)
            return lowering.codegen()[0].value


def kernels(job: str, dtype: str, sizes: list[int]) -> list[Generated]:
    code = triton_code(job, dtype, sizes)
    bodies = dict(re.findall(r"(triton_\w+) = async_compile\.triton\(\S+ '''(.*?)'''", code, re.S))
    return [_read(name, bodies[name]) for name in re.findall(r"(triton_\w+)\.run\(", code)]


def _read(name: str, body: str) -> Generated:
    widths = {n: BYTES[t] for n, t in re.findall(r"'(\w+)': '\*(\w+)'", body)}
    numels = dict(re.findall(r"^    (xnumel|r0_numel) = (\d+)", body, re.M))
    index = {"poi": "x0", "red": "r0_", "per": "r0_"}[name.split("_")[1]]
    sums = {"load": 0, "store": 0}
    for kind, pointer, where in re.findall(r"tl\.(load|store)\((\w+) \+ (.*)", body):
        if index in where.split(", tmp")[0]:
            sums[kind] += widths[pointer]
    elements = int(numels.get("xnumel", 1)) * int(numels.get("r0_numel", 1))
    return Generated(name, elements, sums["load"], sums["store"])


def main() -> None:
    for job in FORMULAS:
        for dtype in ("float32", "bfloat16"):
            for numel in (2**26, 25_557_032):
                print(f"{job}, {dtype}, {numel:,} elements")
                for kernel in kernels(job, dtype, [numel]):
                    print(f"    {kernel.name:22} {kernel.elements:>11,} elements", end="")
                    print(f", reads {kernel.read} B each, writes {kernel.written} B each")


if __name__ == "__main__":
    main()
