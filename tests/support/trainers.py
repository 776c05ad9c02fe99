"""The Trainers of transformers and of Lightning, called alike: one small model, one kind of data.

What is in :class:`Transformers` and in :class:`Lightning` by the same name does the same.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from tests.support.zoo.small import mlp

BATCH, SAMPLES, EPOCHS, STOP = 4, 20, 2, 8


class Stop(Exception):
    """Ends a training in the middle."""


def body(seed: int, dropout: float, dtype: torch.dtype) -> nn.Sequential:
    """With parameters that differ by the seed."""
    model = mlp(dtype)
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    model.insert(2, nn.Dropout(dropout))
    return model


def vectors(seed: int, count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=numbers, dtype=torch.float64)
    return x, torch.randint(4, (count,), generator=numbers)


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """In the order that a Trainer takes them in."""
    return list(zip(*(t.split(BATCH) for t in vectors(seed)), strict=True))


class Endless(IterableDataset):
    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        while True:
            yield from self.rows


class Transformers:
    """Its Trainer."""

    name, dropout = "transformers", 0.5  # its checkpoints have the random numbers

    def __init__(self) -> None:
        pytest.importorskip("accelerate", reason="needs mas_ext[transformers]")
        self.library: Any = pytest.importorskip(
            "transformers", reason="needs mas_ext[transformers]"
        )
        self.MASCallback = importlib.import_module("mas_ext.integrations.transformers").MASCallback
        outer = self.library

        class Sequential(outer.Trainer):
            def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
                return SequentialSampler(self.train_dataset)

        class Stopping(outer.TrainerCallback):
            def __init__(self, at: int) -> None:
                self.at = at

            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == self.at:
                    raise Stop

        class Recorder(outer.TrainerCallback):
            """What callbacks that come later are given to log."""

            def __init__(self, key: str = "mas_penalty") -> None:
                self.key, self.logged = key, []

            def on_log(self, args, state, control, logs=None, **kwargs):
                if "loss" in logs:
                    self.logged.append(logs.get(self.key))

        self.Sequential, self.Stopping, self.Recorder = Sequential, Stopping, Recorder
        self.Callback = outer.TrainerCallback

    def model(self, seed: int = 0, dropout: float = 0.0) -> nn.Module:
        class Classifier(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = body(seed, dropout, torch.float64)

            def forward(self, x, labels=None):
                logits = self.body(x)
                loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
                return {"loss": loss, "logits": logits}

        return Classifier()

    def data(self, seed: int, count: int = SAMPLES) -> Sequence[Any]:
        return [{"x": x, "labels": y} for x, y in zip(*vectors(seed, count), strict=True)]

    def endless(self) -> Any:
        return Endless(self.data(1))

    def learn(
        self,
        model: nn.Module,
        data: Any,
        callback: Any,
        folder: Path,
        *,
        trainer: Any = None,
        accumulate: int = 1,
        clip: float = 1e9,
        lr: float = 0.5,
        momentum: float = 0.0,
        optimizer: Any = None,
        others: Iterable[Any] = (),
        saves: bool = False,
        resume: Any = None,
        **options: Any,
    ) -> Any:
        arguments = self.library.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            lr_scheduler_type="constant",
            gradient_accumulation_steps=accumulate,
            max_grad_norm=clip,
            **{
                "num_train_epochs": EPOCHS,
                "save_strategy": "steps" if saves else "no",
                "save_steps": 1,
                "logging_steps": 1,
                **options,
            },
        )
        made = optimizer or torch.optim.SGD(model.parameters(), lr, momentum=momentum)
        made = (trainer or self.Sequential)(
            model,
            arguments,
            train_dataset=data,
            callbacks=[callback, *others],
            optimizers=(made, None),
        )
        self.last = made
        made.train(resume_from_checkpoint=resume)
        return made

    def checkpoint(self, folder: Path, step: int) -> str:
        return str(folder / f"checkpoint-{step}")

    def optimizer(self, trainer: Any) -> torch.optim.Optimizer:
        return trainer.optimizer.optimizer

    def divisor(self, micro_batches: int, accumulate: int) -> int:
        return micro_batches


class Lightning:
    """Its Trainer."""

    name, dropout = "lightning", 0.0

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optional parts that are not installed
            reason = "needs mas_ext[lightning]"
            outer = self.library = pytest.importorskip("lightning.pytorch", reason=reason)
        self.MASCallback = importlib.import_module("mas_ext.integrations.lightning").MASCallback

        class Module(outer.LightningModule):
            def __init__(self, seed, dropout, dtype) -> None:
                super().__init__()
                self.body, self.lr, self.momentum = body(seed, dropout, dtype), 0.5, 0.0

            def forward(self, x):
                return self.body(x)

            def training_step(self, batch, batch_idx):
                return nn.functional.cross_entropy(self(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), self.lr, momentum=self.momentum)

        class Stopping(outer.Callback):
            def __init__(self, at: int) -> None:
                self.at = at

            def on_train_batch_start(self, trainer, *args):
                if trainer.global_step == self.at:
                    raise Stop

        class Recorder(outer.Callback):
            """What is logged when a step has been taken."""

            def __init__(self, key: str = "mas_penalty") -> None:
                self.key, self.logged = key, []

            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                every = trainer.accumulate_grad_batches
                if (batch_idx + 1) % every == 0 or batch_idx + 1 == trainer.num_training_batches:
                    value = trainer.callback_metrics.get(self.key)
                    self.logged.append(None if value is None else float(value))

        self.Module, self.Stopping, self.Recorder = Module, Stopping, Recorder
        self.Callback = outer.Callback

    def model(self, seed: int = 0, dropout: float = 0.0, dtype=torch.float64) -> nn.Module:
        return self.Module(seed, dropout, dtype)

    def data(self, seed: int, count: int = SAMPLES) -> Any:
        return DataLoader(list(zip(*vectors(seed, count), strict=True)), BATCH)

    def endless(self) -> Any:
        return DataLoader(Endless(list(zip(*vectors(1), strict=True))), BATCH)

    def learn(
        self,
        model: Any,
        data: Any,
        callback: Any,
        folder: Path,
        *,
        accumulate: int = 1,
        clip: float | None = None,
        lr: float = 0.5,
        momentum: float = 0.0,
        others: Iterable[Any] = (),
        saves: bool = False,
        resume: Any = None,
        **options: Any,
    ) -> Any:
        model.lr, model.momentum = lr, momentum
        callbacks = [callback, *others]
        if saves:
            callbacks.append(
                importlib.import_module("lightning.pytorch.callbacks").ModelCheckpoint(
                    dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
                )
            )
        made = self.last = self.library.Trainer(
            default_root_dir=folder,
            callbacks=callbacks,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=saves,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            **{"max_epochs": EPOCHS, **options},
        )
        made.fit(model, data, ckpt_path=resume)
        return made

    def checkpoint(self, folder: Path, step: int) -> str:
        return str(folder / f"step={step}.ckpt")

    def optimizer(self, trainer: Any) -> torch.optim.Optimizer:
        return trainer.optimizers[0]

    def divisor(self, micro_batches: int, accumulate: int) -> int:
        return accumulate  # also where an epoch's last step has fewer


LIBRARIES = {kind.name: kind for kind in (Transformers, Lightning)}


def logits(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output["logits"] if isinstance(output, dict) else output


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(logits(model, batch[0]), batch[1])
