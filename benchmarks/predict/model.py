"""Predicted time of one call: what it moves, over how fast that can go, and what launching costs.

A call takes as long as the device needs for its kernels, or the host to launch them, whichever is
longer: calls are thought to follow each other, as in a benchmark's loop. A kernel takes as long as
its bytes from memory, its bytes from the cache, or its arithmetic, and the time before the first
byte arrives. A kernel that does not fill the device is given the share of the bandwidth that the
bytes it has under way can ask for (Little's law).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.predict.gpus import Gpu, find_gpu
from benchmarks.predict.launches import Launch, launches
from benchmarks.predict.traffic import (
    AUTOGRAD,
    COMPILED,
    EAGER,
    FLOPS,
    FOREACH,
    FUSED,
    FUSED_AUTOGRAD,
    JOBS,
    LISTS,
    Way,
    width,
)

MICRO = 1e-6


@dataclass(frozen=True)
class Host:
    """Seconds of one thread, before what it costs to launch a kernel."""

    call: float
    tensor: float  # for each tensor of each list
    kernel: float
    new: float = 0  # for each tensor that is made


@dataclass(frozen=True)
class Assumptions:
    """Every figure here is a guess with a reason, which a GPU can refute; see the README."""

    of_bandwidth: float = 0.90  # the share of the data sheet's that long kernels reach
    of_cache: float = 0.6  # the share of L2 in which something is found again
    l2_bytes: float = 24  # that an SM gets from L2 a clock
    latency: float = 0.8 * MICRO  # from asking memory to the first byte
    l2_latency: float = 0.3 * MICRO
    kernel: float = 1.5 * MICRO  # of the device, before the next kernel of a stream begins
    launch: float = 2.5 * MICRO  # of the host: cudaLaunchKernel
    host: float = 1.0  # how much slower than the measured one the host is


LIKELY = Assumptions()
FAST = Assumptions(0.94, 0.8, 40, 0.6 * MICRO, 0.2 * MICRO, 1.0 * MICRO, 1.8 * MICRO, 0.6)
SLOW = Assumptions(0.82, 0.4, 16, 1.0 * MICRO, 0.4 * MICRO, 2.5 * MICRO, 4.0 * MICRO, 1.6)

# Measured on a core of an AMD EPYC (Zen 4) with tensors of one element, by
# `python -m benchmarks.predict.host`. Of foreach and compiled code a CPU tells nothing: assumed.
HOSTS = {
    FUSED: Host(15 * MICRO, 0.33 * MICRO, 0, 1.3 * MICRO),
    FUSED_AUTOGRAD: Host(150 * MICRO, 1.5 * MICRO, 0),
    EAGER: Host(3 * MICRO, 0, 1.7 * MICRO),
    AUTOGRAD: Host(40 * MICRO, 0, 3.3 * MICRO),
    FOREACH: Host(10 * MICRO, 0.2 * MICRO, 0),
    COMPILED: Host(25 * MICRO, 0.3 * MICRO, 0),
}


@dataclass(frozen=True)
class Prediction:
    """Not a measurement. ``low`` and ``high`` are from the assumptions' two ends."""

    seconds: float
    low: float
    high: float
    bound: str  # "memory", "L2", "latency", "arithmetic" or "host"
    device_seconds: float
    host_seconds: float
    bytes: float  # read and written
    missed_bytes: float  # of them, from and to memory
    flops: int  # of one pass, as ours is
    launches: int
    memory: float  # that the tensors and the temporaries of a call need

    def __str__(self) -> str:
        spread = f"{duration(self.low)} to {duration(self.high)}"
        return f"{duration(self.seconds)} predicted ({spread}), bound by {self.bound}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def evenly(numel: int, tensors: int) -> list[int]:
    """Sizes of a list whose own are not known."""
    if not 0 < tensors <= numel:
        raise ValueError(f"{numel} elements do not make {tensors} tensors")
    small, more = divmod(numel, tensors)
    return [small + 1] * more + [small] * (tensors - more)


def predict(
    job: str,
    way: str,
    dtype: str,
    sizes: Sequence[int],
    gpu: Gpu | str,
    is_warm: bool = True,
) -> Prediction:
    """One call of ``job`` (a key of ``JOBS``) done in ``way`` over tensors of these sizes.

    Args:
        job, way: see ``traffic.JOBS``; ``"mas_ext"`` is ours.
        dtype: of the parameters; Ω is float64 beside float64, else float32.
        sizes: elements of each tensor.
        gpu: a row of ``GPUS``, its key, or the driver's name for it.
        is_warm: calls follow each other, so that a small model stays in the cache. Within training
            it does not.
    """
    found = find_gpu(gpu) if isinstance(gpu, str) else gpu
    if found is None:
        raise ValueError(f"no data sheet of {gpu!r} here; build a Gpu, or use one of find_gpu's")
    likely, fast, slow = (
        _predict(job, JOBS[job][way], dtype, sizes, found, assume, is_warm)
        for assume in (LIKELY, FAST, SLOW)
    )
    return replace(likely, low=fast.seconds, high=slow.seconds)


def _predict(
    job: str,
    way: Way,
    dtype: str,
    sizes: Sequence[int],
    gpu: Gpu,
    assume: Assumptions,
    is_warm: bool,
) -> Prediction:
    kernels = launches(way, dtype, sizes, gpu, assume.of_cache * gpu.l2, is_warm)
    parts = {"latency": sum(kernel.count for kernel in kernels) * assume.kernel}
    for kernel in kernels:
        bound, seconds = _kernel(kernel, FLOPS[job], dtype, gpu, assume)
        parts[bound] = parts.get(bound, 0) + kernel.count * seconds
    device = sum(parts.values())
    host = _host(way, sizes, sum(kernel.count for kernel in kernels), assume)
    seconds = max(device, host)
    return Prediction(
        seconds=seconds,
        low=seconds,
        high=seconds,
        bound="host" if host > device else max(parts, key=parts.__getitem__),
        device_seconds=device,
        host_seconds=host,
        bytes=sum(k.count * k.moved for k in kernels),
        missed_bytes=sum(k.count * k.missed for k in kernels),
        flops=FLOPS[job] * sum(sizes),
        launches=sum(k.count for k in kernels),
        memory=_memory(way, dtype, sizes),
    )


def _kernel(
    kernel: Launch, flops: int, dtype: str, gpu: Gpu, assume: Assumptions
) -> tuple[str, float]:
    """What decides a kernel's time on the device, and that time."""
    latency = assume.latency if kernel.missed else assume.l2_latency
    rate = gpu.bandwidth * (1 if gpu.is_measured else assume.of_bandwidth)
    peak = gpu.fp64 if dtype == "float64" else gpu.fp32
    times = {
        "memory": kernel.missed / rate,
        "L2": kernel.moved / (assume.l2_bytes * gpu.sms * gpu.clock),
        "arithmetic": flops * kernel.elements / peak,
        "latency": _waves(kernel, gpu) * latency,
    }
    bound = max(times, key=times.__getitem__)
    return bound, latency + times[bound]


def _waves(kernel: Launch, gpu: Gpu) -> float:
    """How many latencies a kernel takes if nothing but latency holds it back: blocks wait for
    their bytes several times, and as many run at once as fit.
    """
    at_once = gpu.sms * min(kernel.resident, kernel.blocks)
    waits = kernel.moved / kernel.blocks / kernel.in_flight
    return -(-kernel.blocks // at_once) * waits


def _host(way: Way, sizes: Sequence[int], kernels: int, assume: Assumptions) -> float:
    host, tensors = HOSTS[way.style], 1 if way.is_flat else len(sizes)
    streams = [
        set("".join(kernel.reads + kernel.writes for kernel in phase)) for phase in way.phases
    ]
    given = sum(len(phase & set(LISTS)) for phase in streams)
    new = sum(len(phase - set(LISTS)) for phase in streams)
    seconds = host.call + tensors * (given * host.tensor + new * host.new) + kernels * host.kernel
    return assume.host * seconds + assume.launch * kernels


def _memory(way: Way, dtype: str, sizes: Sequence[int]) -> float:
    """The lists, and what is new: of all tensors if it is kept, else of the largest."""
    phases = way.of(dtype)
    touched = [{s for k in phase for s in k.reads + k.writes} for phase in phases]
    every = set().union(*touched)
    kept = {s for s in every if sum(s in streams for streams in touched) > 1} - set(LISTS)
    new = {s for s in every - set(LISTS) if not any(s in k.reads for p in phases for k in p)}
    held = sum(width(s, dtype) for s in every & set(LISTS) | kept | new)
    passing = sum(width(s, dtype) for s in every - set(LISTS) - kept - new)
    return sum(sizes) * held + max(sizes) * passing
