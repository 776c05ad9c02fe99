"""accumulate_abs_matmul_: Ω[p,d] += Σ_b |Σ_t left·right|, bound by arithmetic and what feeds it.

Each roof is the time that one part of the device needs by itself; the tallest is the least time
that a call can take, and we predict a share of that speed. Two kernels of ours: float32 and float64
multiply on the ordinary lanes; bfloat16 and float16 on tensor cores, where every sample's positions
are padded to a multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.predict.gpus import Gpu, find_gpu
from benchmarks.predict.model import FAST, LIKELY, SLOW, Assumptions, duration
from benchmarks.predict.traffic import ITEMSIZE, omega_itemsize

TILE = 64  # rows and columns of Ω a block: kTile
WARPS = 4
DEPTH = 16  # positions of a step: kPairs, and the tensor cores' own
SAMPLE_ENDS = 2  # instructions an element of Ω and sample: add the magnitude, start again
# The ordinary lanes' kernel, a thread and position: it has 8 × 4 elements of Ω.
FMAS, SHARED_LOADS, LOOP, STAGING = 32, 3, 2, 12
SHARED_BYTES = 128  # that an SM's shared memory gives a clock
L2_PORT = 64  # bytes that one SM can take from L2 a clock

# Shares of the tallest roof that are reached: by the kernels here, which wait for every step's
# loads, and by cuBLAS on ordinary lanes and on tensor cores.
OF_ROOF = {"mas_ext": (0.75, 0.9, 0.5), "lanes": (0.8, 0.9, 0.65), "tensor": (0.7, 0.8, 0.5)}

OURS, CHUNKS, BMM, MM = "mas_ext", "bmm in chunks", "bmm", "mm"
WAYS = (OURS, CHUNKS, BMM, MM)


@dataclass(frozen=True)
class Problem:
    samples: int
    positions: int
    p: int
    d: int

    @property
    def flops(self) -> int:
        return 2 * self.samples * self.positions * self.p * self.d

    @property
    def tiles(self) -> int:
        return -(-self.p // TILE) * -(-self.d // TILE)


@dataclass(frozen=True)
class AbsMatmulPrediction:
    """Not a measurement. ``roofs``: seconds that each part of the device needs by itself."""

    seconds: float
    low: float
    high: float
    bound: str
    roofs: dict[str, float]
    flops: int

    def __str__(self) -> str:
        spread = f"{duration(self.low)} to {duration(self.high)}"
        return f"{duration(self.seconds)} predicted ({spread}), bound by {self.bound}"


def predict_abs_matmul(
    way: str, dtype: str, problem: Problem, gpu: Gpu | str
) -> AbsMatmulPrediction:
    """One call in one of ``WAYS``; ``"mm"`` is one plain product, which a batch's mean costs."""
    found = find_gpu(gpu) if isinstance(gpu, str) else gpu
    if found is None:
        raise ValueError(f"no data sheet of {gpu!r} here; build a Gpu, or use one of find_gpu's")
    likely, fast, slow = (
        _predict(way, dtype, problem, found, assume, number)
        for number, assume in enumerate((LIKELY, FAST, SLOW))
    )
    return replace(likely, low=fast.seconds, high=slow.seconds)


def _predict(
    way: str, dtype: str, problem: Problem, gpu: Gpu, assume: Assumptions, number: int
) -> AbsMatmulPrediction:
    kernels, roofs = 1, {}
    if way == OURS:
        of_roof = OF_ROOF[OURS][number]
        roofs = our_roofs(dtype, problem, gpu, assume)
    else:
        of_roof = 1.0
        roofs["cuBLAS"] = problem.flops / _blas(dtype, gpu, number)
        roofs["memory"] = _factors(dtype, problem) / _memory_rate(gpu, assume)
    device = max(roofs.values()) / of_roof
    if way in (BMM, CHUNKS):
        kernels, roofs["products"] = _products(way, dtype, problem, gpu, assume)
        device += roofs["products"]
    device += kernels * (assume.kernel + assume.latency)
    host = 10e-6 * assume.host + kernels * (1.5e-6 * assume.host + assume.launch)
    bound = "host" if host > device else max(roofs, key=roofs.__getitem__)
    seconds = max(device, host)
    return AbsMatmulPrediction(seconds, seconds, seconds, bound, roofs, problem.flops)


def is_on_tensor_cores(dtype: str) -> bool:
    return ITEMSIZE[dtype] == 2


def our_roofs(
    dtype: str, problem: Problem, gpu: Gpu, assume: Assumptions = LIKELY
) -> dict[str, float]:
    """Seconds by what bounds. A device's SMs wait for the one that has the most tiles."""
    tensor = is_on_tensor_cores(dtype)
    padded = -(-problem.positions // DEPTH) * DEPTH if tensor else problem.positions
    pairs = problem.samples * padded
    turns = -(-problem.tiles // gpu.sms)  # tiles of the busiest SM
    tile_flops = 2 * TILE * TILE * pairs
    ends = SAMPLE_ENDS * TILE * TILE * problem.samples / (128 * gpu.clock)
    l2_bytes = min(assume.l2_bytes * gpu.sms, L2_PORT * min(problem.tiles, gpu.sms))
    loaded = problem.tiles * problem.samples * problem.positions * 2 * TILE * ITEMSIZE[dtype]
    roofs = {
        "L2": loaded / (l2_bytes * gpu.clock),
        "memory": (_factors(dtype, problem) + 2 * _omega(dtype, problem))
        / _memory_rate(gpu, assume),
    }
    if tensor:
        # Four warps of 32 × 32 read both factors twice, and every value is written once.
        shared = pairs * (2 * 2 * TILE + 2 * TILE) * ITEMSIZE[dtype]
        peak = gpu.tensor_bf16 * gpu.mma_sync / gpu.sms
        roofs["tensor cores"] = turns * tile_flops / peak
        roofs["samples' ends"] = turns * ends
    else:
        # What a warp's threads share they are given at once; each value is written once.
        shared = pairs * (WARPS * (2 * 8 + TILE) + 2 * TILE) * omega_itemsize(dtype)
        peak = (gpu.fp64 if dtype == "float64" else gpu.fp32) / gpu.sms
        issued = pairs * (FMAS + SHARED_LOADS + LOOP + STAGING) / gpu.clock
        roofs["multiply-adds"] = turns * tile_flops / peak
        roofs["instructions"] = turns * (issued + ends)
    roofs["shared memory"] = turns * shared / (SHARED_BYTES * gpu.clock)
    return roofs


def _factors(dtype: str, problem: Problem) -> float:
    return problem.samples * problem.positions * (problem.p + problem.d) * ITEMSIZE[dtype]


def _omega(dtype: str, problem: Problem) -> float:
    return problem.p * problem.d * omega_itemsize(dtype)


def _memory_rate(gpu: Gpu, assume: Assumptions) -> float:
    return gpu.bandwidth * (1 if gpu.is_measured else assume.of_bandwidth)


def _blas(dtype: str, gpu: Gpu, number: int) -> float:
    if is_on_tensor_cores(dtype):
        return OF_ROOF["tensor"][number] * gpu.tensor_bf16
    return OF_ROOF["lanes"][number] * (gpu.fp64 if dtype == "float64" else gpu.fp32)


def _products(
    way: str, dtype: str, problem: Problem, gpu: Gpu, assume: Assumptions
) -> tuple[int, float]:
    """Kernels, and seconds for every sample's own product: written, made positive, summed.

    In chunks, as many samples as the cache holds, if it holds one; Ω is added to for each of them.
    """
    a_sample = problem.p * problem.d * ITEMSIZE[dtype]
    chunk = int(assume.of_cache * gpu.l2 // a_sample)
    if way == CHUNKS and chunk >= 1:
        chunks, rate = -(-problem.samples // chunk), assume.l2_bytes * gpu.sms * gpu.clock
    else:
        chunks, rate = 1, _memory_rate(gpu, assume)
    moved = 4 * problem.samples * a_sample + chunks * 4 * _omega(dtype, problem)
    return 4 * chunks, moved / rate
