"""What the programs measure, and by what they judge it: autograd in float64, sample by sample."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from mas_ext import MAS
from mas_ext._strength.auto import COHERENCE, LASTING
from tests.support.hand_loop import Protection
from tests.support.oracle import assert_exact, one_by_one

WIDTH, HIDDEN, OUTPUTS, POSITIONS = 10, 12, 3, 4  # four ranks share WIDTH unevenly, and OUTPUTS not


class Block(nn.Module):
    """A residual layer of a transformer, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.parting = nn.Identity()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(self.parting(x)))))


class Net(nn.Module):
    """[samples, positions, 6] → [samples, 3]; the matrix ``mix`` belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.head = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(x.mean(1) @ self.mix))


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    """The same on every rank."""
    torch.manual_seed(seed)
    return Net().to(dtype)


def sharded(model: Net, **options: Any) -> Net:
    """By ``fully_shard``, in place: every block, and the rest."""
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


IN_STEP = {"estimator": "per_sample_sharded"}
MIXED = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}


def tensor_parallel(model: Net, mesh: DeviceMesh) -> Net:
    """In place: one block's norm is plain, and that of the other has partial sums for gradients."""
    up_down = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model.blocks[0], mesh, up_down)
    over_positions = {
        "parting": PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=True),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(),
    }
    parallelize_module(model.blocks[1], mesh, over_positions)
    return model


def samples(count: int = 19, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, POSITIONS, 6, generator=generator, dtype=torch.float64).to(dtype)


RAGGED = {1: [[5, 3, 1, 2, 8]], 2: [[5, 3, 1], [2, 8]], 4: [[5, 3], [], [1, 2, 4], [4]]}
IDLE = {1: [[10, 9]], 2: [[10, 9], []], 4: [[], [10, 9], [], []]}


def batches(x: Tensor, sizes: list[list[int]]) -> list[list[Tensor]]:
    """The samples in order, in batches of these sizes for every rank."""
    parts = list(x.split([size for share in sizes for size in share]))
    return [[parts.pop(0) for _ in share] for share in sizes]


@functools.cache
def alone() -> dist.ProcessGroup:
    """This rank's own process group, by which a whole model is measured for comparison."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def exact(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Ω by the definition, of a model that is whole."""
    return one_by_one(copy.deepcopy(model).double(), [x.double()])


def assert_strength_found(mas: MAS, x: Tensor) -> None:
    """λ of ``"auto"`` by the equation, of a whole model and all samples."""
    model, omega = net().double(), exact(net(), x)
    energy = float(model(x.double()).square().sum(1).detach().mean())
    scale = COHERENCE / (mas.drift * energy)  # type: ignore[operator]
    push = LASTING * float(sum(o.sum() for o in omega.values())) / (2 * energy**0.5)
    numel = sum(o.numel() for o in omega.values())
    for found, right in ((mas.lambda_reg, scale * push), (mas.lambda_proximal, scale * numel)):
        assert abs(found - right) <= 1e-5 * right, (found, right)  # type: ignore[operator]


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of DTensors all, on every rank."""
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach()
        for name, t in tensors.items()
    }


def protection(mas: MAS) -> Protection:
    """What a MAS of DTensors remembers, whole."""
    omega, anchor = (
        {name: t.double() for name, t in whole(group).items()}
        for group in (mas.importance, mas.anchor)
    )
    return Protection(mas.lambda_reg, omega, anchor)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Whole, by canonical name."""
    return whole({n.removeprefix("module."): p for n, p in model.named_parameters()})


def assert_same(
    ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Relative to the largest entry of each."""
    assert list(ours) == list(expected), f"{list(ours)} != {list(expected)}"
    assert_exact(whole(ours), {n: t.double() for n, t in expected.items()}, rtol=tolerance, floor=0)
