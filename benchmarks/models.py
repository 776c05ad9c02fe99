"""The models of the benchmarks, none with dropout, so that evaluation mode changes no cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

# The input, or (input, labels); or keyword arguments, and "labels" if there are any.
Batch = Tensor | tuple[Tensor, Tensor] | dict[str, Tensor]

WIDTH, LENGTH, LAYERS, HEADS, VOCABULARY = 256, 64, 4, 4, 8192  # of the language models


# -- networks --------------------------------------------------------------------------------------
def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after, is_pooled in ((3, 32, 0), (32, 64, 1), (64, 128, 1), (128, 128, 1)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * is_pooled
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def resnet18(classes: int = 1000) -> nn.Module:
    from torchvision.models import resnet18 as model

    return model(num_classes=classes)


def vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    sizes = {"image_size": 32, "patch_size": 4, "hidden_dim": 192, "mlp_dim": 768}
    model = VisionTransformer(**sizes, num_layers=6, num_heads=3, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision's zeros give no gradient
    return model


def gpt2(
    width: int = WIDTH, layers: int = LAYERS, vocabulary: int = VOCABULARY, length: int = LENGTH
) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": vocabulary, "n_positions": length, "n_embd": width, "n_layer": layers}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(**sizes, **no_dropout, **tokens, n_head=HEADS, use_cache=False)
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        hidden_size=WIDTH,
        intermediate_size=688,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class TokensToRow(nn.Module):
    """A language model that returns one row per sample, as Avalanche needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits.flatten(1)


# -- what they are given ---------------------------------------------------------------------------
def _labelled(*shape: int, classes: int = 10) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda count: (torch.randn(count, *shape), torch.randint(classes, (count,)))


def _tokens(count: int) -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (count, LENGTH))
    return {"input_ids": tokens, "labels": tokens}


def _text(count: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (count, LENGTH + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@dataclass(frozen=True)
class Workload:
    """A model and the random data for it.

    Attributes:
        build: makes the model.
        sample: makes data for a number of samples: a batch, or for a training step (inputs,
            targets).
        batches: that a call that measures importance adds: several where one takes little time.
        task: samples of a task, for the benchmark of a task's end.
        optimizer: name of a class in torch.optim; ``momentum``: its momentum, if it has one.
    """

    title: str
    details: str
    build: Callable[[], nn.Module]
    sample: Callable[[int], Any]
    batch_size: int = 32
    batches: int = 1
    task: int = 0
    optimizer: str = ""
    momentum: float | None = None

    def model(self) -> nn.Module:
        """In evaluation mode, with the same weights at every call."""
        torch.manual_seed(0)
        return self.build().eval()

    def batch(self, size: int | None = None) -> Any:
        torch.manual_seed(1)
        return self.sample(size or self.batch_size)


_WIDTHS, _IMAGES = "784-256-256-10", "torchvision's, 3×32×32"
_LANGUAGE = f"d={WIDTH}, T={LENGTH}, {LAYERS} layers, V={VOCABULARY:,}"

# Small enough to wait for batch size 1.
WORKLOADS = {
    "mlp": Workload(
        "MLP", "784-1024-1024-10", lambda: mlp(784, 1024, 1024, 10), _labelled(784), 128, batches=8
    ),
    "cnn": Workload("CNN", "3×32×32, 32-64-128-128", cnn, _labelled(3, 32, 32), batches=8),
    "resnet18": Workload(
        "ResNet-18", "3×64×64", resnet18, _labelled(3, 64, 64, classes=1000), batches=8
    ),
    "vit": Workload("ViT", "d=192, T=65, 6 layers", vit, _labelled(3, 32, 32), batches=2),
    "gpt2": Workload("GPT-2", f"{_LANGUAGE}, tied head", gpt2, _tokens),
    "llama": Workload("Llama", _LANGUAGE, llama, _tokens),
}

# With the batch, the task and the optimizer that such a model is usually trained with.
TRAINING = {
    "mlp": Workload(
        "MLP", _WIDTHS, lambda: mlp(784, 256, 256, 10), _labelled(784), 128, 1, 256, "SGD", 0.9
    ),
    "resnet18": Workload(
        "ResNet-18", _IMAGES, lambda: resnet18(10), _labelled(3, 32, 32), 64, 1, 128, "SGD", 0.9
    ),
    "gpt2": Workload("GPT-2", _LANGUAGE, lambda: TokensToRow(gpt2()), _text, 16, 1, 32, "AdamW"),
}
