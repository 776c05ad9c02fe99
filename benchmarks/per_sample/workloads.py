"""Six kinds of model and a batch for each, small enough that batch size 1 can be waited for.

No dropout anywhere, so that evaluation mode costs nobody anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = Tensor | dict[str, Tensor]  # the input, or keyword arguments

WIDTH, LENGTH, LAYERS, HEADS, VOCABULARY = 256, 64, 4, 4, 8192  # of the language models


@dataclass(frozen=True)
class Workload:
    title: str
    details: str
    build: Callable[[], nn.Module]
    sample: Callable[[int], Batch]  # from the number of samples
    batch_size: int = 32
    goal: float = 1.3  # times the inexact estimate

    def model(self) -> nn.Module:
        """The same weights at every call."""
        torch.manual_seed(0)
        return self.build().eval()

    def batch(self) -> Batch:
        torch.manual_seed(1)
        return self.sample(self.batch_size)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after, is_pooled in ((3, 32, 0), (32, 64, 1), (64, 128, 1), (128, 128, 1)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * is_pooled
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18()


def vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=6,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=10,
    )
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision's zeros give no gradient
    return model


def gpt2(
    width: int = WIDTH, layers: int = LAYERS, vocabulary: int = VOCABULARY, length: int = LENGTH
) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


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


def _vectors(count: int) -> Tensor:
    return torch.randn(count, 784)


def _images(side: int) -> Callable[[int], Tensor]:
    return lambda count: torch.randn(count, 3, side, side)


def _tokens(count: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(VOCABULARY, (count, LENGTH))}


_LANGUAGE = f"d={WIDTH}, T={LENGTH}, {LAYERS} layers, V={VOCABULARY:,}"
WORKLOADS = {
    "mlp": Workload("MLP", "784-1024-1024-10", mlp, _vectors, batch_size=128, goal=1.0),
    "cnn": Workload("CNN", "3×32×32, 32-64-128-128", cnn, _images(32), goal=1.0),
    "resnet18": Workload("ResNet-18", "3×64×64", resnet, _images(64)),
    "vit": Workload("ViT", "d=192, T=65, 6 layers", vit, _images(32)),
    "gpt2": Workload("GPT-2", f"{_LANGUAGE}, tied head", gpt2, _tokens),
    "llama": Workload("Llama", _LANGUAGE, llama, _tokens),
}
QUICK = ("mlp", "cnn")
