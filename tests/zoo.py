"""Real models and layers, with data: what exact importance must be exact on.

THE place to add a model: a row is a name and a function that returns ``(model, batch)`` or
``(model, batch, forward)``. ``build`` makes both float64, and every parameter matter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests import layers

B = 5  # samples in a batch


class Specimen(NamedTuple):
    model: nn.Module
    batch: Any
    forward: Callable[[nn.Module, Any], Any] | None = None


def build(name: str) -> Specimen:
    """The model of that name in float64 and evaluation mode; the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        specimen = Specimen(*{**LAYERS, **MODELS, **LARGE_MODELS}[name]())
        stir(specimen.model.double().eval())
    return specimen


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Makes what starts as a constant random: a zero (LoRA's B) would hide whatever follows it."""
    for p in model.parameters():
        if p.numel() > 0 and bool((p == p.flatten()[0]).all()):
            p.add_(torch.randn_like(p), alpha=0.3)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)


# ================================================================================================
# Data
# ================================================================================================
def noise(*shape: int) -> Tensor:
    return torch.randn(B, *shape, dtype=torch.float64)


def ids(*shape: int, below: int = 7) -> Tensor:
    return torch.randint(below, (B, *shape))


def padding(t: int) -> Tensor:
    """1 for a token, 0 for padding after it; one sample is full, one a single token."""
    lengths = torch.tensor([t, 1, *torch.randint(1, t, (B - 2,)).tolist()])
    return (torch.arange(t) < lengths[:, None]).long()


# ================================================================================================
# Models
# ================================================================================================
def vision(name: str, size: int = 32, **options: Any) -> tuple:
    import torchvision

    model = getattr(torchvision.models, name)(num_classes=10, **options)
    return model, noise(3, size, size)


def small_vit() -> tuple:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # zero at first
    return model, noise(3, 32, 32)


def small_swin() -> tuple:
    from torchvision.models import SwinTransformer

    model = SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10)
    return model, noise(3, 36, 36)  # 9×9 patches: windows are padded and shifted


def small_convnext() -> tuple:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 1)]
    return ConvNeXt(blocks, num_classes=10), noise(3, 32, 32)


_TINY = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
_HEADS = {"num_attention_heads": 4}
_GROUPED = {**_TINY, **_HEADS, "num_key_value_heads": 2, "use_cache": False}
# The position of special tokens in a vocabulary of 19.
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = {**_SPECIAL, "decoder_start_token_id": 0}


def transformer(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


def text(t: int = 6, **more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids(t, below=19), "attention_mask": padding(t), **more}


def gpt2(**options: Any) -> nn.Module:
    sizes = {"vocab_size": 19, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformer("GPT2LMHeadModel", "GPT2Config", **{**sizes, **_SPECIAL, **options})


def bert() -> tuple:
    model = transformer(
        "BertForSequenceClassification", "BertConfig", **_TINY, **_HEADS, max_position_embeddings=8
    )
    return model, text(token_type_ids=ids(6, below=2))


def distilbert() -> tuple:
    model = transformer(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        **{"vocab_size": 19, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        max_position_embeddings=8,
    )
    return model, text()


def t5() -> tuple:
    model = transformer(
        "T5ForConditionalGeneration",
        "T5Config",
        **{"vocab_size": 19, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2},
        **{"num_heads": 4, "relative_attention_num_buckets": 8, **_SEQ2SEQ},
    )
    return model, text(decoder_input_ids=ids(4, below=19))


def opt() -> tuple:
    model = transformer(
        "OPTForCausalLM",
        "OPTConfig",
        **{"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24},
        **{**_HEADS, "max_position_embeddings": 8, "word_embed_proj_dim": 8, **_SPECIAL},
    )
    return model, text()


def hf_vit() -> tuple:
    sizes = {k: v for k, v in _TINY.items() if k != "vocab_size"}
    model = transformer(
        "ViTForImageClassification",
        "ViTConfig",
        **{**sizes, **_HEADS, "image_size": 16, "patch_size": 8, "num_labels": 3},
    )
    return model, {"pixel_values": noise(3, 16, 16)}


def mixtral() -> tuple:
    model = transformer(
        "MixtralForCausalLM",
        "MixtralConfig",
        **{**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, **_SPECIAL},
        experts_implementation="eager",  # the grouped matrix products know no float64
    )
    return model, text()


def whisper() -> tuple:
    model = transformer(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        **{"vocab_size": 19, "d_model": 16, "num_mel_bins": 6, "max_source_positions": 8},
        **{"encoder_layers": 1, "decoder_layers": 1, "max_target_positions": 8},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, **_SEQ2SEQ},
    )
    return model, {"input_features": noise(6, 16), "decoder_input_ids": ids(4, below=19)}


def segmentation() -> tuple:
    """Outputs in a dictionary: a forward of the user's picks one."""
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    return model, noise(3, 32, 32), lambda model, images: model(images)["out"]


def small_swin_v2() -> tuple:
    """Attention by cosine, its position bias made by a small network of parameters only."""
    from torchvision.models import swin_transformer as swin

    model = swin.SwinTransformer(
        *([4, 4], 16, [1, 1], [2, 4], [4, 4]),
        num_classes=10,
        block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2,
    )
    return model, noise(3, 36, 36)


def small_maxvit() -> tuple:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.2, num_classes=10), noise(3, 64, 64)


def small_video_swin() -> tuple:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    model = SwinTransformer3d([2, 4, 4], 16, [1, 1], [2, 4], [2, 4, 4], num_classes=10)
    return model, noise(3, 4, 32, 32)


def albert() -> tuple:
    """All layers are one."""
    model = transformer(
        "AlbertForMaskedLM",
        "AlbertConfig",
        **{**_TINY, **_HEADS, "embedding_size": 8, "max_position_embeddings": 8},
    )
    return model, text()


def deberta() -> tuple:
    """Relative positions go through the same projections as the tokens."""
    model = transformer(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        **{**_TINY, **_HEADS, "max_position_embeddings": 8, "relative_attention": True},
        **{"pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "share_att_key": True},
        **{"norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
    )
    return model, text()


def longformer() -> tuple:
    """Windows along the sequence, padding to whole ones, and tokens that see all others."""
    model = transformer(
        "LongformerForMaskedLM",
        "LongformerConfig",
        **{**_TINY, **_HEADS, "attention_window": 4, "pad_token_id": 0},
        max_position_embeddings=16,
    )
    first = torch.zeros(B, 6, dtype=torch.long).index_fill_(1, torch.tensor([0]), 1)
    return model, text(global_attention_mask=first)


def bloom() -> tuple:
    model = transformer(
        "BloomForCausalLM",
        "BloomConfig",
        **{"vocab_size": 19, "hidden_size": 16, "n_layer": 2, "n_head": 4, **_SPECIAL},
    )
    return model, text()


def mamba2() -> tuple:
    """A state-space model: depthwise convolutions and scans in chunks."""
    model = transformer(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        **{"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        **{"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4, "use_cache": False},
        **_SPECIAL,
    )
    return model, {"input_ids": ids(6, below=19)}


def wav2vec2() -> tuple:
    """Convolutions over samples of sound, one of them weight-normalised along dimension 2."""
    model = transformer(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        **{**_TINY, **_HEADS, "conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (5, 3)},
        **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        mask_time_prob=0,
    )
    return model, {"input_values": noise(100)}


def segformer() -> tuple:
    model = transformer(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        **{"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "decoder_hidden_size": 8},
        **{"num_attention_heads": [1, 2, 2, 2], "mlp_ratios": [2] * 4},
    )
    return model, {"pixel_values": noise(3, 64, 64)}


def peft_llama(kind: str, **options: Any) -> tuple:
    import peft

    model = transformer("LlamaForCausalLM", "LlamaConfig", **_GROUPED, **_SPECIAL)
    return peft.get_peft_model(model, getattr(peft, kind)(**options)), text()


class SmallConvNet(nn.Sequential):
    """Something for adapters of convolutions."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
        self.append(nn.Linear(8 * 16, 3))


def peft_cnn(kind: str, **options: Any) -> tuple:
    import peft

    config = getattr(peft, kind)(r=2, target_modules=["0", "2", "4"], **options)
    return peft.get_peft_model(SmallConvNet(), config), noise(3, 8, 8)


def peft_gpt2(**options: Any) -> tuple:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **options)
    return peft.get_peft_model(gpt2(), config), text()


def encoder(batch_first: bool, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def embedded_lstm() -> tuple:
    lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)
    return nn.Sequential(nn.Embedding(7, 4), lstm), ids(6)


def partly_frozen() -> tuple:
    model, images = vision("resnet18")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("layer4", "fc")) or "bn" in name)
    return model, images


MODELS: dict[str, Callable[[], tuple]] = {
    "resnet18": lambda: vision("resnet18"),
    "resnet18, partly frozen": partly_frozen,
    "mobilenet_v3_small": lambda: vision("mobilenet_v3_small"),
    "efficientnet_b0": lambda: vision("efficientnet_b0"),
    "squeezenet1_1": lambda: vision("squeezenet1_1", 40),
    "shufflenet_v2_x0_5": lambda: vision("shufflenet_v2_x0_5"),
    "lraspp": segmentation,
    "maxvit, small": small_maxvit,
    "swin v2, small": small_swin_v2,
    "video swin, small": small_video_swin,
    "densenet121": lambda: vision("densenet121"),
    "regnet_y_400mf": lambda: vision("regnet_y_400mf"),
    "googlenet": lambda: vision("googlenet", aux_logits=False, init_weights=False),
    "googlenet with auxiliary heads": lambda: vision("googlenet", 64, init_weights=False),
    "convnext, small": small_convnext,
    "vit, small": small_vit,
    "swin, small": small_swin,
    "gpt2": lambda: (gpt2(), text()),
    "gpt2, eager attention": lambda: (gpt2(attn_implementation="eager"), text()),
    "llama": lambda: (transformer("LlamaForCausalLM", "LlamaConfig", **_GROUPED), text()),
    "mistral": lambda: (
        transformer("MistralForCausalLM", "MistralConfig", **_GROUPED, sliding_window=3),
        text(),
    ),
    "mixtral": mixtral,
    "bert": bert,
    "distilbert": distilbert,
    "t5": t5,
    "opt": opt,
    "hf vit": hf_vit,
    "whisper": whisper,
    "peft lora": peft_gpt2,
    "peft dora": lambda: peft_gpt2(use_dora=True),
    "peft ia3": lambda: peft_llama(
        "IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "peft loha": lambda: peft_llama("LoHaConfig", target_modules=["q_proj", "down_proj"], r=2),
    "peft oft": lambda: peft_llama(
        "OFTConfig", target_modules=["q_proj", "v_proj"], r=0, oft_block_size=4
    ),
    "peft fourier": lambda: peft_llama("FourierFTConfig", target_modules=["q_proj"], n_frequency=6),
    "peft prompt": lambda: peft_llama(
        "PromptTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=3
    ),
    "peft dora, convolutions": lambda: peft_cnn("LoraConfig", use_dora=True),
    "peft lokr, convolutions": lambda: peft_cnn("LoKrConfig", decompose_both=True),
    "albert": albert,
    "deberta": deberta,
    "longformer": longformer,
    "bloom": bloom,
    "mamba2": mamba2,
    "wav2vec2": wav2vec2,
    "segformer": segformer,
    "gemma3": lambda: (
        transformer(
            "Gemma3ForCausalLM", "Gemma3TextConfig", **_GROUPED, head_dim=4, sliding_window=3
        ),
        text(),
    ),
    "neox": lambda: (transformer("GPTNeoXForCausalLM", "GPTNeoXConfig", **_TINY, **_HEADS), text()),
    "encoder, batch first": lambda: (encoder(True), noise(6, 8)),
    "encoder, time first": lambda: (layers.TimeFirst(encoder(False)), noise(6, 8)),
    "encoder, norm first, gelu, padded": lambda: (
        encoder(True, norm_first=True, activation="gelu"),
        {"src": noise(6, 8), "src_key_padding_mask": padding(6) == 0},
    ),
    "transformer": lambda: (
        nn.Transformer(8, 2, 1, 1, 12, batch_first=True),
        {"src": noise(6, 8), "tgt": noise(4, 8)},
    ),
    "embedded lstm": embedded_lstm,
    "tied language model": lambda: (layers.TiedLM(9, 4), ids(6)),
    "gated mlp": lambda: (nn.Sequential(layers.RMSNorm(6), layers.Gated(6, 8)), noise(4, 6)),
    "standardised convolutions": lambda: (
        nn.Sequential(
            layers.StandardisedConv(3, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            layers.StandardisedConv(4, 4, 3, groups=2, bias=False),
        ),
        noise(3, 8, 8),
    ),
}

# At their published size: minutes together, and gigabytes.
LARGE_MODELS: dict[str, Callable[[], tuple]] = {
    "convnext_tiny": lambda: vision("convnext_tiny"),
    "vit_b_16": lambda: vision("vit_b_16", image_size=32),
    "swin_t": lambda: vision("swin_t", 64),
    "inception_v3": lambda: vision("inception_v3", 80, aux_logits=False, init_weights=False),
    "resnext50_32x4d": lambda: vision("resnext50_32x4d"),
    "efficientnet_v2_s": lambda: vision("efficientnet_v2_s"),
}


# ================================================================================================
# Layers
# ================================================================================================
def recurrent(kind: type[nn.RNNBase], batch_first: bool, **options: Any) -> tuple:
    layer = kind(4, 3, num_layers=2, bidirectional=True, batch_first=batch_first, **options)
    return layer if batch_first else layers.TimeFirst(layer), noise(6, 4)


def query_key_value(kdim: int = 6, vdim: int = 4) -> dict[str, Tensor]:
    return {"query": noise(3, 8), "key": noise(7, kdim), "value": noise(7, vdim)}


def attention(batch_first: bool, kdim: int = 6, vdim: int = 4, **options: Any) -> tuple:
    kind = nn.MultiheadAttention if batch_first else layers.TimeFirstAttention
    layer = kind(8, 2, kdim=kdim, vdim=vdim, batch_first=batch_first, **options)
    return layer, query_key_value(kdim, vdim)


def normed_mlp(norm: Callable[[nn.Module], nn.Module]) -> tuple:
    model = nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), norm(nn.Linear(6, 3)))
    for _ in range(9):
        model(torch.randn(2, 4))  # spectral norm finds its singular vectors in training mode
    return model, noise(4)


def shared_positions() -> tuple:
    """A forward of the user's: positions that belong to no sample, and an odd batch."""
    model = nn.ModuleDict({"position": nn.Embedding(4, 3), "linear": nn.Linear(3, 2)})

    def forward(model: nn.ModuleDict, batch: dict) -> Tensor:
        return model["linear"](batch["x"][0] + model["position"](torch.arange(4))).tanh()

    return model, {"x": [noise(4, 3)], "name": "odd"}, forward


PARAMETRIZATIONS = nn.utils.parametrizations

LAYERS: dict[str, Callable[[], tuple]] = {
    # matrices
    "linear": lambda: (nn.Linear(6, 4), noise(6)),
    "linear, 3-d": lambda: (nn.Linear(6, 4), noise(3, 6)),
    "linear, 3-d, no bias": lambda: (nn.Linear(6, 4, bias=False), noise(3, 6)),
    "linear, 4-d": lambda: (nn.Linear(6, 4), noise(2, 3, 6)),
    "linear, 4-d, no bias": lambda: (nn.Linear(6, 4, bias=False), noise(2, 3, 6)),
    "linear, twice": lambda: (layers.Twice(4), noise(3, 4)),
    "bilinear": lambda: (nn.Bilinear(3, 4, 2), {"input1": noise(3), "input2": noise(4)}),
    "bilinear, 3-d": lambda: (nn.Bilinear(3, 4, 2), {"input1": noise(2, 3), "input2": noise(2, 4)}),
    "vector weight": lambda: (layers.VectorWeight(4), noise(4)),
    "vector weight, sequence": lambda: (layers.VectorWeight(4), noise(3, 4)),
    "columns": lambda: (layers.Columns(6, 4), noise(6)),
    "addmm, scaled": lambda: (layers.ScaledAddmm(4, 3), noise(4)),
    "einsum": lambda: (layers.Heads(6, 2, 3), noise(4, 6)),
    "einsum over heads": lambda: (layers.SplitHeads(2, 3, 4), noise(4, 2, 3)),
    "slices": lambda: (layers.Slices(5, 4), noise(5)),
    "cosine head": lambda: (layers.CosineHead(4, 3), noise(4)),
    "low rank": lambda: (layers.LowRank(6, 4, 2), noise(6)),
    "weight norm": lambda: normed_mlp(PARAMETRIZATIONS.weight_norm),
    "weight norm, old": lambda: normed_mlp(nn.utils.weight_norm),
    "spectral norm": lambda: normed_mlp(PARAMETRIZATIONS.spectral_norm),
    "spectral norm, old": lambda: normed_mlp(nn.utils.spectral_norm),
    "orthogonal": lambda: (PARAMETRIZATIONS.orthogonal(nn.Linear(4, 4)), noise(4)),
    "distances": lambda: (layers.Distances(3, 4), noise(4)),
    "functional": lambda: (layers.Functional(4), noise(4)),
    "hypernetwork": lambda: (layers.Hypernetwork(3, 4), noise(3)),
    "two views": lambda: (layers.TwoViews(4), noise(4)),
    "crops": lambda: (layers.Crops(4), noise(4)),
    # tables
    "embedding": lambda: (nn.Embedding(7, 3), ids(6)),
    "embedding, ids alone": lambda: (nn.Embedding(7, 3), ids()),
    "embedding, padding": lambda: (nn.Embedding(7, 3, padding_idx=0), ids(6)),
    "embedding, by frequency": lambda: (nn.Embedding(7, 3, scale_grad_by_freq=True), ids(6)),
    "embedding, sparse": lambda: (nn.Embedding(7, 3, sparse=True), ids(6)),
    "embedding, max norm": lambda: (nn.Embedding(7, 3, max_norm=1.0), ids(6)),
    "embedding bag, sum": lambda: (nn.EmbeddingBag(7, 3, mode="sum"), ids(6)),
    "embedding bag, mean": lambda: (nn.EmbeddingBag(7, 3, mode="mean"), ids(6)),
    "embedding bag, max": lambda: (nn.EmbeddingBag(7, 3, mode="max"), ids(6)),
    "embedding bag, padding": lambda: (nn.EmbeddingBag(7, 3, padding_idx=0), ids(6)),
    "embedding bag, weighted": lambda: (
        nn.EmbeddingBag(7, 3, mode="sum"),
        {"input": ids(6), "per_sample_weights": noise(6)},
    ),
    "prototypes": lambda: (layers.Prototypes(3, 4), {"x": noise(4), "ids": ids(below=3)}),
    # convolutions
    "conv1d": lambda: (nn.Conv1d(4, 6, 3), noise(4, 8)),
    "conv1d, groups": lambda: (nn.Conv1d(4, 6, 3, groups=2, bias=False), noise(4, 8)),
    "conv1d, dilated, same": lambda: (
        nn.Conv1d(4, 6, 4, dilation=2, padding="same"),
        noise(4, 9),
    ),
    "conv2d": lambda: (nn.Conv2d(3, 4, 3, padding=1), noise(3, 6, 6)),
    "conv2d, pointwise": lambda: (nn.Conv2d(3, 4, 1), noise(3, 4, 4)),
    "conv2d, depthwise": lambda: (nn.Conv2d(4, 4, 3, padding=1, groups=4), noise(4, 5, 5)),
    "conv2d, depth multiplier": lambda: (nn.Conv2d(4, 8, 3, groups=4), noise(4, 5, 5)),
    "conv2d, stride with a rest": lambda: (nn.Conv2d(3, 4, 3, stride=3), noise(3, 8, 10)),
    "conv2d, uneven": lambda: (
        nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), (1, 2), groups=2),
        noise(4, 8, 7),
    ),
    "conv2d, same, even kernel": lambda: (nn.Conv2d(3, 4, 4, padding="same"), noise(3, 5, 5)),
    "conv2d, reflect": lambda: (
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        noise(3, 5, 5),
    ),
    "conv2d, circular": lambda: (
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        noise(3, 5, 5),
    ),
    "conv2d, whole image": lambda: (nn.Conv2d(3, 4, 5), noise(3, 5, 5)),
    "conv2d, channels last": lambda: (
        nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        noise(3, 6, 6).to(memory_format=torch.channels_last),
    ),
    "conv3d": lambda: (nn.Conv3d(2, 4, 2), noise(2, 4, 4, 4)),
    "conv3d, groups, stride": lambda: (nn.Conv3d(2, 4, 3, 2, 1, groups=2), noise(2, 4, 5, 4)),
    "transposed 1d": lambda: (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), noise(4, 5)),
    "transposed 2d": lambda: (nn.ConvTranspose2d(3, 4, 3, stride=2), noise(3, 4, 4)),
    "transposed 2d, uneven": lambda: (
        nn.ConvTranspose2d(4, 2, (3, 2), (2, 3), 1, (1, 2), groups=2, dilation=(2, 1), bias=False),
        noise(4, 4, 3),
    ),
    "transposed 3d": lambda: (nn.ConvTranspose3d(2, 3, 2), noise(2, 2, 3, 2)),
    "batch as channels": lambda: (layers.BatchAsChannels(3, 2), noise(3, 5, 5)),
    "batch as length": lambda: (layers.PointwiseOverBatch(4, 3), noise(4)),
    "unfold": lambda: (nn.Sequential(nn.Unfold(2), nn.Linear(9, 3)), noise(2, 4, 4)),
    # scales and shifts
    "prelu": lambda: (nn.PReLU(), noise(3, 4)),
    "prelu, channels": lambda: (nn.PReLU(3), noise(3, 4)),
    "layer norm": lambda: (nn.LayerNorm(4), noise(3, 4)),
    "layer norm, 2-d": lambda: (nn.LayerNorm((3, 4)), noise(2, 3, 4)),
    "layer norm, no bias": lambda: (nn.LayerNorm(4, bias=False), noise(4)),
    "rms norm": lambda: (nn.RMSNorm(4), noise(3, 4)),
    "rms norm, by hand": lambda: (layers.RMSNorm(4), noise(3, 4)),
    "group norm": lambda: (nn.GroupNorm(2, 4), noise(4, 3, 3)),
    "instance norm": lambda: (nn.InstanceNorm2d(3, affine=True), noise(3, 4, 4)),
    "instance norm, running": lambda: (
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        noise(3, 4),
    ),
    "batch norm, vectors": lambda: (nn.BatchNorm1d(4), noise(4)),
    "batch norm, sequences": lambda: (nn.BatchNorm1d(4), noise(4, 6)),
    "batch norm, volumes": lambda: (nn.BatchNorm3d(2), noise(2, 2, 3, 2)),
    "gain": lambda: (layers.Gain(4), noise(4)),
    "mask token": lambda: (layers.MaskToken(4), {"x": noise(3, 4), "mask": ids(3, below=2) > 0}),
    "parameters out": lambda: (layers.ParametersOut(4), noise(4)),
    # sequences
    "lstm, batch first": lambda: recurrent(nn.LSTM, True),
    "lstm, time first": lambda: recurrent(nn.LSTM, False),
    "lstm, projected": lambda: recurrent(nn.LSTM, True, proj_size=2),
    "gru, batch first": lambda: recurrent(nn.GRU, True),
    "gru, time first": lambda: recurrent(nn.GRU, False),
    "gru, learned start": lambda: (layers.LearnedStart(4, 3), noise(6, 4)),
    "rnn by hand": lambda: (layers.HandRNN(4, 3), noise(6, 4)),
    "attention, batch first": lambda: attention(True, add_bias_kv=True),
    "attention, time first": lambda: attention(False, add_bias_kv=True),
    "attention, one width": lambda: attention(False, 8, 8, add_zero_attn=True),
    "class token": lambda: (layers.ClassToken(3, 4), noise(3, 4)),
    "learned queries": lambda: (layers.LearnedQueries(2, 4), noise(3, 4)),
    "prefix": lambda: (layers.Prefix(2, 4), noise(3, 4)),
    "relative bias": lambda: (layers.RelativeBias(6, 4), noise(6, 4)),
    "last token": lambda: (layers.LastToken(4), noise(6, 4)),
    "fourier": lambda: (layers.Fourier(6, 3), noise(6, 3)),
    # autograd
    "two heads": lambda: (layers.TwoHeads(4), noise(4)),
    "custom function": lambda: (layers.CustomFunction(4, 3), noise(2, 4)),
    "force field": lambda: (layers.ForceField(4, 3), noise(4)),
    "in place": lambda: (layers.InPlace(4), noise(4)),
    "views": lambda: (layers.ViewsOut(3, 4), noise(3, 8)),
    "custom forward": shared_positions,
}
