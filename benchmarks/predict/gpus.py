"""What NVIDIA says its GPUs do: peaks from data sheets and white papers, reached by no program.

``mma_sync`` alone is of no data sheet: Hopper's full rate needs instructions of four warps, and
published micro-benchmarks of the older one end near 0.62. Blackwell's 0.3 is a guess, Hopper's rate
an SM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

TERA, GIGA, MEGA = 1e12, 1e9, 1e6
MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """Peaks a second; bytes. ``name`` is what the driver calls it, without the maker's name."""

    name: str
    source: str
    bandwidth: float  # of its memory
    memory: float
    l2: float
    sms: int
    fp32: float  # FLOP/s, a fused multiply-add being two
    fp64: float
    tensor_bf16: float  # dense, accumulated in float32; float16 is the same
    fp32_lanes: int = 128  # of an SM
    threads: int = 2048  # resident on an SM
    mma_sync: float = 1.0  # of the tensor cores' peak, what the warp-wide instruction can reach
    is_measured: bool = False  # the bandwidth is what a copy reached, and no peak

    @property
    def clock(self) -> float:
        """At which the peaks are stated, Hz."""
        return self.fp32 / (2 * self.fp32_lanes * self.sms)

    def with_bandwidth(self, measured: float) -> Gpu:
        """The same GPU by the bandwidth that a large copy reached on it, in bytes a second."""
        return replace(self, bandwidth=measured, is_measured=True)


def _ampere(name: str, bandwidth: float, memory: float) -> Gpu:
    return Gpu(
        name,
        "NVIDIA A100 data sheet; L2, SMs: A100 architecture white paper",
        bandwidth * GIGA,
        memory * GIGA,
        40 * MIB,
        108,
        19.5 * TERA,
        9.7 * TERA,
        312 * TERA,
        fp32_lanes=64,
    )


_HOPPER = "L2, SMs: H100 architecture white paper"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture white paper"
_ADA = "NVIDIA Ada GPU architecture white paper"
_H100 = Gpu(
    "H100 80GB HBM3",
    f"NVIDIA H100 data sheet (SXM); {_HOPPER}",
    bandwidth=3.35 * TERA,
    memory=80 * GIGA,
    l2=50 * MIB,
    sms=132,
    fp32=66.9 * TERA,
    fp64=33.5 * TERA,
    tensor_bf16=989.4 * TERA,
    mma_sync=0.62,
)
GPUS = {
    "a100-40": _ampere("A100-SXM4-40GB", 1555, 40),
    "a100-80": _ampere("A100-SXM4-80GB", 2039, 80),
    "h100": _H100,
    "h100-pcie": Gpu(
        "H100 PCIe",
        f"NVIDIA H100 data sheet (PCIe); {_HOPPER}",
        bandwidth=2.0 * TERA,
        memory=80 * GIGA,
        l2=50 * MIB,
        sms=114,
        fp32=51.2 * TERA,
        fp64=25.6 * TERA,
        tensor_bf16=756 * TERA,
        mma_sync=0.62,
    ),
    "h200": replace(  # the same chip beside other memory
        _H100,
        name="H200",
        source=f"NVIDIA H200 data sheet (SXM); {_HOPPER}",
        bandwidth=4.8 * TERA,
        memory=141 * GIGA,
    ),
    "b200": Gpu(
        "B200",
        "NVIDIA HGX B200 data sheet, an eighth of it; L2, SMs: as the driver reports them",
        bandwidth=8.0 * TERA,
        memory=180 * GIGA,
        l2=126 * MIB,
        sms=148,
        fp32=75 * TERA,
        fp64=37 * TERA,
        tensor_bf16=2250 * TERA,
        mma_sync=0.3,
    ),
    "l4": Gpu(
        "L4",
        f"NVIDIA L4 data sheet; L2, SMs: {_ADA}",
        bandwidth=300 * GIGA,
        memory=24 * GIGA,
        l2=48 * MIB,
        sms=58,
        fp32=30.3 * TERA,
        fp64=0.47 * TERA,
        tensor_bf16=121 * TERA,
        threads=1536,
    ),
    "l40s": Gpu(
        "L40S",
        f"NVIDIA L40S data sheet; L2, SMs: {_ADA}",
        bandwidth=864 * GIGA,
        memory=48 * GIGA,
        l2=96 * MIB,
        sms=142,
        fp32=91.6 * TERA,
        fp64=1.43 * TERA,
        tensor_bf16=362 * TERA,
        threads=1536,
    ),
    "rtx4090": Gpu(
        "RTX 4090",
        _ADA,
        bandwidth=1008 * GIGA,
        memory=24 * GIGA,
        l2=72 * MIB,
        sms=128,
        fp32=82.6 * TERA,
        fp64=1.29 * TERA,
        tensor_bf16=165.2 * TERA,
        threads=1536,
    ),
    "rtx5090": Gpu(
        "RTX 5090",
        _BLACKWELL,
        bandwidth=1792 * GIGA,
        memory=32 * GIGA,
        l2=96 * MIB,
        sms=170,
        fp32=104.8 * TERA,
        fp64=1.64 * TERA,
        tensor_bf16=209.5 * TERA,
        threads=1536,
    ),
}


def find_gpu(name: str) -> Gpu | None:
    """By our key, or by what ``torch.cuda.get_device_name()`` gives; None if there is no row.

    The whole name must agree: a slice of a GPU, or another card of its family, is not that GPU.
    """
    if name in GPUS:
        return GPUS[name]
    plain = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    return next((gpu for gpu in GPUS.values() if gpu.name == plain), None)
