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

# csrc/cuda: tests/test_predictions.py holds these against the sources.
TILE = 64  # rows and columns of Ω a block
FMA_ROWS = 8  # of the tile, a thread's; as many columns in float32, half of them in float64
FRAGMENT, FRAGMENTS = 16, 2  # of the tensor cores; rows and columns of them a warp
BLOCKS, LEAST_PAIRS = 512, 128  # samples are dealt out over as many blocks, if each has that much
WARP = 32
# Instructions, guessed from the source: what a thread issues for a slot (a step of 16 slots on
# tensor cores) beside its multiplications, and for an element of Ω at the end of a sample.
LOOP, STAGING = 8, 10
STEP = 72
SAMPLE_ENDS = 2  # add the magnitude, start again
ISSUED = 4 * WARP  # instructions of threads that an SM issues a clock
SHARED_BYTES = 128  # that its shared memory gives a clock
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

    def as_magnitudes(self) -> Problem:
        """With one position |l·r| = |l|·|r|: one sample, whose positions the samples are."""
        return self if self.positions > 1 else Problem(1, self.samples, self.p, self.d)

    @property
    def parts(self) -> int:
        """Blocks a tile, each with some of the samples."""
        pairs = self.samples * self.positions
        return max(1, min(BLOCKS // self.tiles, pairs // LEAST_PAIRS, self.samples))

    def part(self) -> Problem:
        """What one block sums, the largest of them."""
        return replace(self, samples=-(-self.samples // self.parts)).as_magnitudes()


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
        kernels = 1 if problem.parts == 1 else 2
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
    """Seconds by what bounds. A device's SMs wait for the one that has the most blocks."""
    blocks = problem.tiles * problem.parts
    l2_bytes = min(assume.l2_bytes * gpu.sms, L2_PORT * min(blocks, gpu.sms))
    pairs = problem.samples * problem.positions
    loaded = problem.tiles * pairs * 2 * TILE * ITEMSIZE[dtype]
    sums = 0 if problem.parts == 1 else problem.parts  # written, and read again
    moved = _factors(dtype, problem) + 2 * (1 + sums) * _omega(dtype, problem)
    local = _tensor_core_tile if is_on_tensor_cores(dtype) else _fma_tile
    return {
        "L2": loaded / (l2_bytes * gpu.clock),
        "memory": moved / _memory_rate(gpu, assume),
        **local(dtype, problem.part(), gpu, turns=-(-blocks // gpu.sms)),
    }


def _fma_tile(dtype: str, problem: Problem, gpu: Gpu, turns: int) -> dict[str, float]:
    """A slot is a position. A block of fewer than four warps leaves schedulers of its SM idle."""
    columns = FMA_ROWS if dtype == "float32" else FMA_ROWS // 2
    threads, own = TILE * TILE // (FMA_ROWS * columns), FMA_ROWS * columns
    slots = problem.samples * problem.positions
    busy = max(turns, ISSUED / threads)
    peak = (gpu.fp64 if dtype == "float64" else gpu.fp32) / gpu.sms
    issued = slots * (own + LOOP + STAGING) + problem.samples * SAMPLE_ENDS * own
    # What several threads of a warp want is read once; each value is written once.
    across, down = TILE // columns, WARP * columns // TILE
    read = threads // WARP * (across * columns + down * FMA_ROWS)
    shared = slots * (read + 2 * TILE) * ITEMSIZE[dtype]
    return {
        "multiply-adds": busy * 2 * TILE * TILE * slots / peak,
        "instructions": busy * issued * threads / (ISSUED * gpu.clock),
        "shared memory": turns * shared / (SHARED_BYTES * gpu.clock),
    }


def _tensor_core_tile(dtype: str, problem: Problem, gpu: Gpu, turns: int) -> dict[str, float]:
    """Every sample is filled up to whole fragments."""
    steps = problem.samples * -(-problem.positions // FRAGMENT)
    warps = (TILE // (FRAGMENT * FRAGMENTS)) ** 2
    own = TILE * TILE // (warps * WARP)
    peak = gpu.tensor_bf16 * gpu.mma_sync / gpu.sms
    issued = steps * STEP + problem.samples * SAMPLE_ENDS * own
    read = warps * 2 * FRAGMENTS * FRAGMENT * FRAGMENT
    shared = steps * (read + 2 * TILE * FRAGMENT) * ITEMSIZE[dtype]
    return {
        "tensor cores": turns * 2 * TILE * TILE * FRAGMENT * steps / peak,
        "instructions": turns * issued * warps * WARP / (ISSUED * gpu.clock),
        "shared memory": turns * shared / (SHARED_BYTES * gpu.clock),
    }


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
