"""MAS on a model sharded by fully_shard (FSDP2): how much it forgets with and without a budget.

    torchrun --nproc-per-node 2 examples/fsdp2.py

A small transformer learns to continue sequences by one rule (task A), then by another (task B).
Each process has its own samples and its own shard of the model, the importance and the anchors.
It runs on CPUs, with gloo, in under a minute.
"""

from __future__ import annotations

import time
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import mas_ext

SYMBOLS, LENGTH, WIDTH, HEADS = 32, 16, 64, 4
STEPS, BATCH = 100, 32
RULES = {"A": (3, 1), "B": (5, 7)}  # the next symbol: (a·x + b) mod SYMBOLS


class Block(nn.Module):
    """Causal attention and an MLP, each after a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[samples, positions, WIDTH] → the same shape."""
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """Symbols [samples, positions], the first of which names the task → logits of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS + len(RULES), WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        """Symbols → logits [samples, positions, SYMBOLS]."""
        return self.head(self.blocks(self.symbols(x) + self.positions))


def sequences(task: str, count: int) -> Tensor:
    """The name of the task, a random symbol, and the symbols that follow by the task's rule."""
    factor, shift = RULES[task]
    rows = [torch.randint(SYMBOLS, (count,))]
    for _ in range(LENGTH - 1):
        rows.append((factor * rows[-1] + shift) % SYMBOLS)
    name = torch.full((count,), SYMBOLS + list(RULES).index(task))
    return torch.stack([name, *rows], 1)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of all symbols except the first, which is random."""
    logits = model(batch[:, :-1])[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 2:].flatten())


def sharded_model() -> nn.Module:
    """The same model on each process, sharded block by block."""
    torch.manual_seed(0)
    model = Transformer()
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, task: str) -> None:
    """An ordinary training loop."""
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, sequences(task, BATCH)).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, task: str) -> float:
    """The mean loss over the sequences of all processes."""
    value = loss(model, sequences(task, 256))
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def learn_both(budget: float) -> dict[str, float]:
    """The loss of A before B is learned, and the loss of both afterwards."""
    model = sharded_model()
    torch.manual_seed(1 + dist.get_rank())  # every process its own samples
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    mas = mas_ext.MAS(model, budget=budget)
    mas.attach(optimizer, mode="proximal")
    train(model, optimizer, "A")
    learned = evaluate(model, "A")
    batches = 2 + dist.get_rank()  # processes need not have the same number
    mas.consolidate(sequences("A", 32)[:, :-1] for _ in range(batches))
    train(model, optimizer, "B")
    mas.settle()
    return {"A": learned, "A after B": evaluate(model, "A"), "B": evaluate(model, "B")}


def main() -> None:
    """Trains without and with MAS; the first process prints the losses."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing is done in place
    dist.init_process_group("gloo")
    # How far B may change what the model says about A, in nats per symbol.
    for name, budget in {"without a limit": 1e9, "with a budget": 0.08}.items():
        losses = learn_both(budget)
        if dist.get_rank() == 0:
            print(f"{name:15}", "  ".join(f"{k}: {v:.3f}" for k, v in losses.items()))
    # A thread of gloo's that still holds the last tensor when Python leaves would abort the process
    # (pytorch/pytorch#190489): it needs a moment in which nothing else runs to let go of it.
    time.sleep(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
