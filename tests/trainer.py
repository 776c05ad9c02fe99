"""Small models, data and a training for the Trainer of transformers."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments


class Classifier(nn.Module):
    """In float64, and called as the Trainer calls a model."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    def forward(self, x, labels=None):
        logits = self.body(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def llama(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.1,  # so that a resumed run needs the random numbers too
    )
    return transformers.LlamaForCausalLM(config)


def vectors(seed, count=20):
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=numbers, dtype=torch.float64)
    y = torch.randint(4, (count,), generator=numbers)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def texts(seed, count=24):
    tokens = torch.randint(32, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=0.05,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **{"num_train_epochs": 2, "save_strategy": "no", "logging_steps": 2, **options},
    )


def learn(model, train, callback, folder, trainer=Trainer, resume=None, others=(), **options):
    optimizers = options.pop("optimizers", (None, None))
    trainer = trainer(
        model,
        arguments(folder, **options),
        train_dataset=train,
        callbacks=[callback, *others],
        optimizers=optimizers,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
