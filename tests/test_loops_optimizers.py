"""Optimizers of other kinds: one a parameter inside backward, 8-bit states, sharded states."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

import mas_ext
from mas_ext import MAS
from tests.hand_loop import AdamW, Memory, Sgd, assert_trained, by_hand
from tests.models import mlp, vectors

X = vectors()
STEPS = 5


def learned(model: nn.Module, x: Tensor, lambda_reg: float = 5.0) -> MAS:
    mas = MAS(model, lambda_reg)
    mas.consolidate([x])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    return mas


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - 1).pow(2).mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loss=loss_of) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


# ================================================================================================
# An optimizer a parameter, which steps as soon as its gradient is there
# ================================================================================================
def attached_sgd(p: nn.Parameter, mas: MAS, mode: str) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([p], 0.05, momentum=0.9)
    mas.attach(optimizer, mode)
    return optimizer


def own_sgd(p: nn.Parameter, mas: MAS, mode: str) -> torch.optim.Optimizer:
    return mas_ext.optim.SGD([p], 0.05, momentum=0.9, mas=mas, mode=mode)


def step_in_backward(model: nn.Module, optimizers: dict) -> None:
    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize("make", [attached_sgd, own_sgd])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_optimizers_in_backward(make, mode):
    model = mlp()
    mas = learned(model, X)
    start = copy.deepcopy(model)
    expected = by_hand(
        model, Memory.of(mas), Sgd(0.05, 0.9), [[loss_of]] * STEPS, proximal=mode == "proximal"
    )
    step_in_backward(model, {p: make(p, mas, mode) for p in model.parameters()})
    for _ in range(STEPS):
        loss_of(model).backward()
        assert all(p.grad is None for p in model.parameters())
    assert_trained(model, expected, start, 1e-10)


def test_each_reports_the_share_of_its_own_parameter():
    model = mlp()
    mas = learned(model, X)
    whole = mas.penalty().item()
    optimizers = {p: torch.optim.SGD([p], 0.05) for p in model.parameters()}
    handles = [mas.attach(optimizer) for optimizer in optimizers.values()]
    step_in_backward(model, optimizers)
    loss_of(model).backward()
    assert sum(handle.last_penalty.item() for handle in handles) == pytest.approx(whole)


# ================================================================================================
# States in 8 bits: the gradients are ordinary, and that is where the penalty goes
# ================================================================================================
WIDE = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))


def wide() -> nn.Sequential:
    """With weights large enough (4096 elements) to be kept in 8 bits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))


def wide_loss(model: nn.Module) -> Tensor:
    return (model(WIDE.to(next(model.parameters()).dtype)) - 1).pow(2).mean()


def bitsandbytes_adamw(params):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(params, lr=0.01, weight_decay=0.01)


def torchao_adamw(params):
    torchao = pytest.importorskip("torchao.optim")
    return torchao.AdamW8bit(params, lr=0.01, weight_decay=0.01)


EIGHT_BITS = [
    bitsandbytes_adamw,
    pytest.param(torchao_adamw, marks=pytest.mark.slow),  # it compiles its step with inductor
]


def is_in_8_bits(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> bool:
    moments = [value for name, value in optimizer.state[p].items() if name in ("state1", "exp_avg")]
    codes = [getattr(value, "codes", value) for value in moments]
    return [code.dtype for code in codes] == [torch.uint8]


@pytest.mark.parametrize("make", EIGHT_BITS)
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_8_bit_states(make, mode):
    """Near float64's AdamW, and nearer to the same optimizer with the penalty by hand."""
    model, beside = wide(), wide()
    mas = learned(model, WIDE)
    beside.load_state_dict(model.state_dict())
    start, memory = copy.deepcopy(model), Memory.of(mas)
    exact = by_hand(
        copy.deepcopy(model).double(),
        memory,
        AdamW(0.01),
        [[wide_loss]] * STEPS,
        proximal=mode == "proximal",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer, other = make(model.parameters()), make(beside.parameters())
        mas.attach(optimizer, mode)
        train(model, optimizer, wide_loss)
        for _ in range(STEPS):
            other.zero_grad()
            wide_loss(beside).backward()
            step_by_hand(beside, other, memory, mode)
    assert is_in_8_bits(optimizer, model[0].weight)
    same = {n: p.detach().double() for n, p in beside.named_parameters()}
    assert_trained(model, same, start, 0.002)
    assert_trained(model, exact, start, 0.3)  # the worst of 4096; AdamW divides small by small


@torch.no_grad()
def step_by_hand(model: nn.Module, optimizer, memory: Memory, mode: str) -> None:
    if mode == "gradient":
        for name, p in model.named_parameters():
            p.grad += memory.pull(name, p.double()).float()
    with torch.enable_grad():
        optimizer.step()
    if mode == "proximal":
        for name, p in model.named_parameters():
            p.copy_(memory.towards_anchor(name, p.double(), 0.01))


# ================================================================================================
# ZeRO: each process keeps the optimizer's state of some parameters
# ================================================================================================
@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("how", ["attached", "ours"])
def test_zero_redundancy_optimizer(one_process, how, mode):
    model = mlp()
    mas = learned(model, X)
    start = copy.deepcopy(model)
    expected = by_hand(
        model, Memory.of(mas), AdamW(0.01), [[loss_of]] * STEPS, proximal=mode == "proximal"
    )
    if how == "attached":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
        mas.attach(optimizer, mode)
    else:
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), mas_ext.optim.AdamW, lr=0.01, mas=mas, mode=mode
        )
    train(model, optimizer)
    assert_trained(model, expected, start, 1e-6)  # torch counts Adam's steps in float32


@pytest.mark.parametrize("how", ["attached", "ours"])
def test_zero_redundancy_optimizer_under_a_scaler(one_process, how):
    """An Inf of the penalty's is caught, whoever of the two steps."""
    model = mlp(torch.float32)
    mas = learned(model, X.float())
    clean, start = mas.state_dict(), copy.deepcopy(model)
    expected = by_hand(
        copy.deepcopy(model).double(),
        Memory.of(mas),
        AdamW(0.01),
        [[float_loss]] * STEPS,
        skipped=[2],
    )
    if how == "attached":
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
        mas.attach(optimizer)
    else:
        optimizer = ZeroRedundancyOptimizer(
            model.parameters(), mas_ext.optim.AdamW, lr=0.01, mas=mas
        )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(float_loss(model)).backward()
        if number == 2:
            mas.importance["0.weight"][0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        mas.load_state_dict(clean)
    assert scaler.get_scale() == 512.0
    assert_trained(model, expected, start, 1e-4)


def float_loss(model: nn.Module) -> Tensor:
    return (model(X.to(next(model.parameters()).dtype)) - 1).pow(2).mean()


def test_what_zero_cannot_do_is_refused(one_process):
    model = mlp()
    mas = learned(model, X)
    with_penalty = ZeroRedundancyOptimizer(
        model.parameters(), mas_ext.optim.AdamW, lr=0.01, mas=mas
    )
    with pytest.raises(ValueError, match=r"includes the penalty already.*leave attach\(\) out"):
        mas.attach(with_penalty)
    overlapping = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, lr=0.01, overlap_with_ddp=True
    )
    with pytest.raises(ValueError, match=r"overlap_with_ddp=True.*leave overlap_with_ddp out"):
        mas.attach(overlapping)


# ================================================================================================
# Parameters of which every process holds a part
# ================================================================================================
def sharded_steps_under_a_scaler(rank: int, folder: str) -> None:
    """Four steps of each kind; in the third, Ω is infinite in rank 1's part."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    ends = {}
    for how in ("attached", "ours"):
        model = fully_shard(mlp(torch.float32), mesh=mesh)
        mas = learned(model, X.float())
        if how == "attached":
            optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
            mas.attach(optimizer)
        else:
            optimizer = mas_ext.optim.SGD(model.parameters(), 0.05, momentum=0.9, mas=mas)
        scaler, clean = torch.amp.GradScaler("cpu", init_scale=8.0), mas.state_dict()
        for number in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(float_loss(model)).backward()
            if number == 2 and rank == 1:
                mas.importance["0.weight"].to_local()[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            mas.load_state_dict(clean)
        whole = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
        ends[how] = scaler.get_scale(), whole
    torch.save(ends, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_an_inf_in_one_ranks_part_skips_the_step_of_all(tmp_path):
    torch.multiprocessing.spawn(sharded_steps_under_a_scaler, (str(tmp_path),), nprocs=2)
    model = mlp(torch.float32)
    memory, start = Memory.of(learned(model, X.float())), copy.deepcopy(model)
    double = copy.deepcopy(model).double()
    expected = by_hand(double, memory, Sgd(0.05, 0.9), [[float_loss]] * STEPS, skipped=[2])
    for rank in range(2):
        for scale, values in torch.load(tmp_path / str(rank)).values():
            assert scale == 4.0
            model.load_state_dict(values)
            assert_trained(model, expected, start, 1e-4)
