"""One training run of a pretrained language model on a new text, and what it keeps of the old."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from benchmarks.benchmark import Result
from benchmarks.measure import peak_of, return_free_memory
from benchmarks.retention.methods import BY_MAS, UNIFORM, Training
from benchmarks.retention.questions import answered
from benchmarks.retention.texts import WATCHED, Texts
from mas_ext import EWC, L2SP, MAS, DriftBudget
from mas_ext._drift.settling import Path as WayBack
from mas_ext.quadratic import QuadraticRegularizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
REGULARIZERS = {"MAS": MAS, "EWC": EWC, "L2-SP": L2SP}
RANK = 16  # of LoRA
TOGETHER = 4  # blocks in a forward pass
WARM_UP = 0.05  # the part of the steps in which the learning rate rises


@dataclass(frozen=True)
class Setting:
    """What all methods share.

    Attributes:
        rate, lora_rate: learning rates that suit plain training, of all weights and of adapters.
        steps: of training, with ``TOGETHER`` blocks each.
        tested: after how many of them the model is tested.
        kept, held_out: blocks of each watched text that are kept, and of each text that is tested.
        uniform_way, weighted_way: c on the way back, without and with Ω, in units of the one that
            moves the parameters about halfway. A few parameters have most of ΣΩ.
    """

    rate: float = 1e-4
    lora_rate: float = 1e-3
    steps: int = 60
    tested: tuple[int, ...] = (15, 30, 60)
    kept: int = 12
    held_out: int = 16
    uniform_way: tuple[float, ...] = (0.25, 0.75, 2.0)
    weighted_way: tuple[float, ...] = (0.02, 0.07, 0.25, 0.6)


QUICK = Setting(steps=3, tested=(3,), kept=2, held_out=2)


class Trial:
    """The model before it learns the new text, and how far from there it is.

    Args:
        folder: of :mod:`benchmarks.retention.material`.
        new: the name of the new text.
        setting: sizes and learning rates.
        training: how it is learned.
    """

    def __init__(self, folder: Path, new: str, setting: Setting, training: Training) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # Weights stay float32; products are of bfloat16 numbers, as on an accelerator.
        torch.set_float32_matmul_precision("medium")
        self.setting, self.training = setting, training
        self.cost = {"seconds": 0.0, "peak_bytes": 0}
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        self.texts = Texts.read(
            folder, new, self.tokenizer, kept=setting.kept, tested=setting.held_out
        )
        self.before = {n: log_probabilities(model, self.texts.held_out[n]) for n in WATCHED}
        model.config.use_cache = False
        self.model: nn.Module = _with_adapters(model) if training.lora else model

    # -- training ----------------------------------------------------------------------------------
    def learn(self, seed: int, measured: Path) -> Iterator[int]:
        """Trains; yields the step where the model is to be tested. ``cost`` leaves tests out."""
        setting, random_order = self.setting, random.Random(seed)
        torch.manual_seed(seed)
        params = [p for p in self.model.parameters() if p.requires_grad]
        rate = (setting.lora_rate if self.training.lora else setting.rate) * self.training.rate
        optimizer = torch.optim.AdamW(params, rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._warm_up_and_decay)
        self._hold(optimizer, measured)
        return_free_memory()

        def train(steps: int) -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                self._loss(random_order).backward()
                nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()
                schedule.step()

        for begin, end in pairwise((0, *setting.tested)):
            self.model.train()
            before = time.process_time()
            peak = peak_of(partial(train, end - begin))
            self.cost["seconds"] += time.process_time() - before
            self.cost["peak_bytes"] = max(self.cost["peak_bytes"], peak)
            yield end

    def _warm_up_and_decay(self, step: int) -> float:
        steps = self.setting.steps
        rising = max(1, round(WARM_UP * steps))
        return min(1.0, (step + 1) / rising) * 0.5 * (1 + math.cos(math.pi * step / steps))

    def _hold(self, optimizer: torch.optim.Optimizer, measured: Path) -> None:
        training = self.training
        if training.regularizer is None:
            return
        budget = DriftBudget(training.target, slack=1.0, every=10)
        regularizer = self._regularizer(training.regularizer, measured, budget)
        regularizer.attach(optimizer, "gradient" if training.lora else "proximal", every=1)

    def _regularizer(
        self, name: str, measured: Path, budget: DriftBudget | None = None
    ) -> QuadraticRegularizer:
        """As it is before the new text is learned."""
        adapters = "merged" if self.training.lora else "separate"
        found = REGULARIZERS[name](self.model, budget=budget, adapters=adapters)
        if name == "L2-SP":
            found.consolidate(batches(self.texts.kept))
        else:
            found.load(measured / name)
        return found

    def _loss(self, order: random.Random) -> Tensor:
        tokens = torch.stack([self._sample(order) for _ in range(TOGETHER)])
        loss = cross_entropy_of(self._logits(tokens), tokens)
        if self.training.divergence:
            chosen = order.sample(range(len(self.texts.kept)), TOGETHER)
            now = self._logits(self.texts.kept[chosen]).log_softmax(-1)
            before = self._kept_before[chosen].float()
            loss = loss + self.training.divergence * divergence(before, now)
        return loss

    def _sample(self, order: random.Random) -> Tensor:
        texts = self.texts
        source = texts.old if order.random() < self.training.replay else texts.learned
        return source[order.randrange(len(source))]

    def _logits(self, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(input_ids=tokens).logits.float()

    @cached_property
    def _kept_before(self) -> Tensor:
        """The log-probabilities of the start, of the kept text, where the loss compares them."""
        return log_probabilities(self.model, self.texts.kept).half()

    # -- on the way back ---------------------------------------------------------------------------
    @torch.no_grad()
    def move_back(self, way: str, measured: Path) -> Iterator[float]:
        """Moves the result towards the start, as :meth:`mas_ext.MAS.settle` does; yields each c."""
        name = BY_MAS if way == UNIFORM else way  # θ* is the same in every file
        held = self._regularizer(name, measured).protected
        is_uniform, setting = way == UNIFORM, self.setting
        weights = "uniform" if is_uniform else "importance"
        path = WayBack(held.find(), held.updates(), self.model, {}, weights)
        unit = path.unit()
        for c in reversed(setting.uniform_way if is_uniform else setting.weighted_way):
            path.put(c * unit)
            yield c
        path.put(0.0)

    # -- tests -------------------------------------------------------------------------------------
    @torch.no_grad()
    def test(self) -> Result:
        """On held-out text: perplexities, drifts in nats per prediction; questions answered."""
        self.model.eval()
        perplexity, drift = {}, {}
        for name, blocks in self.texts.held_out.items():
            now = log_probabilities(self.model, blocks)
            perplexity[name] = math.exp(float(cross_entropy_of(now, blocks)))
            if name in self.before:
                drift[name] = float(divergence(self.before[name], now))
        return {
            "perplexity": perplexity,
            "drifts": drift,
            "drift": sum(drift.values()) / len(drift),
            "answered": answered(self.model, self.tokenizer),
        }


# -- functions of tokens and logits ----------------------------------------------------------------
def batches(blocks: Tensor) -> list[dict[str, Tensor]]:
    """As the model takes them by keyword."""
    return [{"input_ids": part} for part in blocks.split(TOGETHER)]


@torch.no_grad()
def log_probabilities(model: nn.Module, blocks: Tensor) -> Tensor:
    """[N, LENGTH, tokens of the vocabulary]."""
    parts = [model(**batch).logits.log_softmax(-1) for batch in batches(blocks)]
    return torch.cat(parts)


def cross_entropy_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of each token but a block's first, given those before it; in nats per token."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def divergence(before: Tensor, now: Tensor) -> Tensor:
    """KL(before ‖ now) in nats per position, of log-probabilities."""
    return kl_div(now, before, reduction="sum", log_target=True) / now[..., 0].numel()


def _with_adapters(model: Any) -> Any:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return peft.get_peft_model(model, config)
