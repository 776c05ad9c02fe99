"""What other implementations compute, written from their formulas in plain autograd.

Each is a class with ``end_task(model, batches)`` and ``penalty(model, lambda_reg)``: as slow and as
literal as possible, sharing no code with mas_ext. ``omega`` and ``anchor`` go by parameter name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def magnitudes(model: nn.Module, scalar: Tensor) -> Tensors:
    """|∂ scalar/∂θ|, as their loops find it in ``.grad``."""
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(scalar, list(named.values()), allow_unused=True)
    return {n: g.abs() for n, g in zip(named, grads, strict=True) if g is not None}


class Implementation:
    def __init__(self) -> None:
        self.omega: Tensors = {}
        self.anchor: Tensors = {}

    def end_task(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        new = self.measure(model, batches)
        self.omega = {n: self.merge(self.omega.get(n), new[n]) for n in new}
        self.anchor = {n: p.detach().clone() for n, p in model.named_parameters() if n in new}

    def distance(self, model: nn.Module) -> Tensor:
        """Σ Ω δ²."""
        named = dict(model.named_parameters())
        terms = [(self.omega[n] * (named[n] - self.anchor[n]) ** 2).sum() for n in self.omega]
        return torch.stack(terms).sum()

    def measure(self, model: nn.Module, batches: Sequence[Tensor]) -> Tensors:
        raise NotImplementedError

    def merge(self, old: Tensor | None, new: Tensor) -> Tensor:
        raise NotImplementedError

    def penalty(self, model: nn.Module, lambda_reg: float) -> Tensor:
        raise NotImplementedError


class Paper(Implementation):
    """Equations 1 to 3: samples one at a time, summed over tasks, no ½."""

    def measure(self, model, batches):
        model.eval()
        samples = torch.cat(list(batches))
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for x in samples:
            for n, g in magnitudes(model, model(x[None]).pow(2).sum()).items():
                total[n] += g / len(samples)
        return total

    def merge(self, old, new):
        return new if old is None else old + new

    def penalty(self, model, lambda_reg):
        return lambda_reg * self.distance(model)


class Official(Paper):
    """A running mean: Ω ← (Ω·kB + |∇ sum over the batch|)/((k+1)B), B this batch's size."""

    def measure(self, model, batches):
        model.eval()
        omega = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for k, x in enumerate(batches):
            for n, g in magnitudes(model, model(x).pow(2).sum()).items():
                omega[n] = (omega[n] * (k * len(x)) + g) / ((k + 1) * len(x))
        return omega

    def gradient(self, model, lambda_reg):
        """What its optimizer adds to a gradient."""
        named = dict(model.named_parameters())
        return {
            n: 2 * lambda_reg * self.omega[n] * (named[n].detach() - self.anchor[n])
            for n in self.omega
        }


class MeanOfBatches(Implementation):
    """Training mode, the squared norm's mean over the batch, the mean over batches."""

    alpha = 0.5

    def measure(self, model, batches):
        model.train()
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for x in batches:
            for n, g in magnitudes(model, model(x).norm(dim=1).pow(2).mean()).items():
                total[n] += g
        return {n: t / len(batches) for n, t in total.items()}


class Avalanche(MeanOfBatches):
    """Starts with the first task's Ω; no ½."""

    def merge(self, old, new):
        return new if old is None else self.alpha * old + (1 - self.alpha) * new

    def penalty(self, model, lambda_reg):
        return lambda_reg * self.distance(model)


class CapyMOA(MeanOfBatches):
    """Starts from zero; ½."""

    def merge(self, old, new):
        old = torch.zeros_like(new) if old is None else old
        return self.alpha * old + (1 - self.alpha) * new

    def penalty(self, model, lambda_reg):
        return 0.5 * lambda_reg * self.distance(model)


class Facil(CapyMOA):
    """The norm of all heads' joined outputs, not squared; the body only; whole batches only."""

    def measure(self, model, batches):
        model.train()
        size = len(batches[0])
        whole = sum(map(len, batches)) // size
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters() if is_body(n)}
        for x in batches[:whole]:
            outputs = model(x)
            joined = torch.cat(outputs, dim=1) if isinstance(outputs, list) else outputs
            for n, g in magnitudes(model, joined.norm(dim=1).mean()).items():
                if is_body(n):
                    total[n] += g * len(x)
        return {n: t / (whole * size) for n, t in total.items()}


def is_body(name: str) -> bool:
    return "heads" not in name


class Seed(Implementation):
    """Starts each measurement from the sum of the Ω that were kept after every task; ½."""

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[Tensors] = []

    def measure(self, model, batches):
        out = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for guard in self.guards:
            for n in out:
                out[n] += guard[n]
        model.eval()
        for x in batches:
            for n, g in magnitudes(model, model(x).pow(2).sum(dim=1).mean()).items():
                out[n] += (g**2).sqrt() / len(batches)
        self.guards.append(out)
        return out

    def merge(self, old, new):
        return new

    def penalty(self, model, lambda_reg):
        return lambda_reg / 2 * self.distance(model)


IMPLEMENTATIONS: dict[str, type[Implementation]] = {
    "paper": Paper,
    "official": Official,
    "avalanche": Avalanche,
    "facil": Facil,
    "capymoa": CapyMOA,
    "seed": Seed,
}
