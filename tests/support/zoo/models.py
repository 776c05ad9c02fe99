"""Whole models of several libraries, small or at their published size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.zoo.layers import (
    StandardizedConv,
    gated_mlp,
    rms_norm,
    tied_language_model,
    time_first,
)
from tests.support.zoo.small import B, ids, noise, padding


# -- torchvision -----------------------------------------------------------------------------------
def vision(name: str, size: int = 32, **options: Any) -> tuple:
    import torchvision

    model = getattr(torchvision.models, name)(num_classes=10, **options)
    return model, noise(3, size, size)


def partly_frozen() -> tuple:
    model, images = vision("resnet18")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("layer4", "fc")) or "bn" in name)
    return model, images


def segmentation() -> tuple:
    """The output is a dictionary, from which ``forward=`` picks one."""
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    return model, noise(3, 32, 32), lambda model, images: model(images)["out"]


def small_vit() -> tuple:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # zero at first
    return model, noise(3, 32, 32)


def small_convnext() -> tuple:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 1)]
    return ConvNeXt(blocks, num_classes=10), noise(3, 32, 32)


def small_swin(version: int) -> tuple:
    """9×9 patches, so windows are padded and shifted.

    Version 2 has attention by cosine, its position bias made by a network of parameters only.
    """
    from torchvision.models import swin_transformer as swin

    options: dict[str, Any] = {"num_classes": 10}
    if version == 2:
        options["block"] = swin.SwinTransformerBlockV2
        options["downsample_layer"] = swin.PatchMergingV2
    model = swin.SwinTransformer([4, 4], 16, [3 - version] * 2, [2, 4], [4, 4], **options)
    return model, noise(3, 36, 36)


def small_maxvit() -> tuple:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.2, num_classes=10), noise(3, 64, 64)


def small_video_swin() -> tuple:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    model = SwinTransformer3d([2, 4, 4], 16, [1, 1], [2, 4], [2, 4, 4], num_classes=10)
    return model, noise(3, 4, 32, 32)


# -- transformers and peft -------------------------------------------------------------------------
_BODY = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
_TINY = {**_BODY, "vocab_size": 19, "num_attention_heads": 4}
GROUPED = {**_TINY, "num_key_value_heads": 2, "use_cache": False}
_SHORT = {**_TINY, "max_position_embeddings": 8}
# The positions of special tokens in a vocabulary of 19.
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = {**_SPECIAL, "vocab_size": 19, "decoder_start_token_id": 0}


def transformer(model: str, *settings: dict, **more: Any) -> nn.Module:
    import transformers

    kind = getattr(transformers, model)
    merged = {key: value for part in settings for key, value in part.items()}
    return kind(kind.config_class(**{**merged, **more}))


def text(t: int = 6, **more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids(t, below=19), "attention_mask": padding(t), **more}


def gpt2(**options: Any) -> nn.Module:
    sizes = {"vocab_size": 19, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformer("GPT2LMHeadModel", sizes, _SPECIAL, options)


def longformer() -> tuple:
    """Windows along the sequence, padding to whole ones, and tokens that see all others."""
    options = {"attention_window": 4, "pad_token_id": 0, "max_position_embeddings": 16}
    model = transformer("LongformerForMaskedLM", _TINY, options)
    first = torch.zeros(B, 6, dtype=torch.long).index_fill_(1, torch.tensor([0]), 1)
    return model, text(global_attention_mask=first)


def hugging_face(
    model: str, *settings: dict, batch: Callable[[], dict[str, Tensor]] = text, **more: Any
) -> Callable[[], tuple]:
    return lambda: (transformer(model, *settings, **more), batch())


def llama() -> tuple:
    return transformer("LlamaForCausalLM", GROUPED, _SPECIAL), text()


def layers() -> tuple:
    convolutions = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 3)), noise(3, 8, 8)


def adapted(base: Callable[[], tuple], kind: str, **options: Any) -> Callable[[], tuple]:
    def make() -> tuple:
        import peft

        model, batch = base()
        return peft.get_peft_model(model, getattr(peft, kind)(**options)), batch

    return make


# -- torch -----------------------------------------------------------------------------------------
def encoder(batch_first: bool, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def padded_encoder() -> tuple:
    batch = {"src": noise(6, 8), "src_key_padding_mask": padding(6) == 0}
    return encoder(True, norm_first=True, activation="gelu"), batch


def embedded_lstm() -> tuple:
    lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)
    return nn.Sequential(nn.Embedding(7, 4), lstm), ids(6)


def standardized_convolutions() -> nn.Sequential:
    last = StandardizedConv(4, 4, 3, groups=2, bias=False)
    return nn.Sequential(StandardizedConv(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), last)


GPT2_LAYERS = {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
LAYERS = {"r": 2, "target_modules": ["0", "2", "4"]}
MODELS: dict[str, Callable[[], tuple]] = {
    "resnet18": lambda: vision("resnet18"),
    "resnet18, partly frozen": partly_frozen,
    "mobilenet_v3_small": lambda: vision("mobilenet_v3_small"),
    "efficientnet_b0": lambda: vision("efficientnet_b0"),
    "squeezenet1_1": lambda: vision("squeezenet1_1", 40),
    "shufflenet_v2_x0_5": lambda: vision("shufflenet_v2_x0_5"),
    "lraspp": segmentation,
    "maxvit, small": small_maxvit,
    "swin, small": lambda: small_swin(1),
    "swin v2, small": lambda: small_swin(2),
    "video swin, small": small_video_swin,
    "densenet121": lambda: vision("densenet121"),
    "regnet_y_400mf": lambda: vision("regnet_y_400mf"),
    "googlenet": lambda: vision("googlenet", aux_logits=False, init_weights=False),
    "googlenet with auxiliary heads": lambda: vision("googlenet", 64, init_weights=False),
    "convnext, small": small_convnext,
    "vit, small": small_vit,
    "gpt2": lambda: (gpt2(), text()),
    "gpt2, eager attention": lambda: (gpt2(attn_implementation="eager"), text()),
    "llama": hugging_face("LlamaForCausalLM", GROUPED),
    "mistral": hugging_face("MistralForCausalLM", GROUPED, sliding_window=3),
    "mixtral": hugging_face(
        *("MixtralForCausalLM", GROUPED, _SPECIAL),
        **{"num_local_experts": 4, "num_experts_per_tok": 2},
        experts_implementation="eager",  # the grouped matrix products know no float64
    ),
    "bert": hugging_face(
        *("BertForSequenceClassification", _SHORT),
        batch=lambda: text(token_type_ids=ids(6, below=2)),
    ),
    "distilbert": hugging_face(
        "DistilBertForSequenceClassification",
        **{"vocab_size": 19, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        max_position_embeddings=8,
    ),
    "t5": hugging_face(
        *("T5ForConditionalGeneration", _SEQ2SEQ),
        **{"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
        relative_attention_num_buckets=8,
        batch=lambda: text(decoder_input_ids=ids(4, below=19)),
    ),
    "opt": hugging_face(*("OPTForCausalLM", _SHORT, _SPECIAL), ffn_dim=24, word_embed_proj_dim=8),
    "hf vit": hugging_face(
        *("ViTForImageClassification", _BODY),
        **{"num_attention_heads": 4, "image_size": 16, "patch_size": 8, "num_labels": 3},
        batch=lambda: {"pixel_values": noise(3, 16, 16)},
    ),
    "whisper": hugging_face(
        *("WhisperForConditionalGeneration", _SEQ2SEQ),
        **{"d_model": 16, "num_mel_bins": 6, "encoder_layers": 1, "decoder_layers": 1},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24},
        **{"decoder_ffn_dim": 24, "max_source_positions": 8, "max_target_positions": 8},
        batch=lambda: {"input_features": noise(6, 16), "decoder_input_ids": ids(4, below=19)},
    ),
    "albert": hugging_face("AlbertForMaskedLM", _SHORT, embedding_size=8),
    "deberta": hugging_face(  # relative positions go through the same projections as the tokens
        *("DebertaV2ForSequenceClassification", _SHORT),
        **{"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4},
        **{"share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
    ),
    "longformer": longformer,
    "bloom": hugging_face(
        *("BloomForCausalLM", _SPECIAL),
        **{"vocab_size": 19, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    ),
    "mamba2": hugging_face(  # a state-space model: depthwise convolutions and scans in chunks
        *("Mamba2ForCausalLM", _SPECIAL),
        **{"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        **{"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4, "use_cache": False},
        batch=lambda: {"input_ids": ids(6, below=19)},
    ),
    "wav2vec2": hugging_face(  # convolutions over sound, one weight-normalized along dimension 2
        *("Wav2Vec2ForCTC", _TINY),
        **{"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (5, 3), "mask_time_prob": 0},
        **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
        batch=lambda: {"input_values": noise(100)},
    ),
    "segformer": hugging_face(
        "SegformerForSemanticSegmentation",
        **{"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "decoder_hidden_size": 8},
        **{"num_attention_heads": [1, 2, 2, 2], "mlp_ratios": [2] * 4},
        batch=lambda: {"pixel_values": noise(3, 64, 64)},
    ),
    "gemma3": hugging_face("Gemma3ForCausalLM", GROUPED, head_dim=4, sliding_window=3),
    "neox": hugging_face("GPTNeoXForCausalLM", _TINY),
    "peft lora": adapted(lambda: (gpt2(), text()), "LoraConfig", **GPT2_LAYERS),
    "peft dora": adapted(lambda: (gpt2(), text()), "LoraConfig", use_dora=True, **GPT2_LAYERS),
    "peft ia3": adapted(
        *(llama, "IA3Config"),
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
    "peft loha": adapted(llama, "LoHaConfig", target_modules=["q_proj", "down_proj"], r=2),
    "peft oft": adapted(
        llama, "OFTConfig", target_modules=["q_proj", "v_proj"], r=0, oft_block_size=4
    ),
    "peft fourier": adapted(llama, "FourierFTConfig", target_modules=["q_proj"], n_frequency=6),
    "peft prompt": adapted(
        llama, "PromptTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=3
    ),
    "peft dora, convolutions": adapted(layers, "LoraConfig", use_dora=True, **LAYERS),
    "peft lokr, convolutions": adapted(layers, "LoKrConfig", decompose_both=True, **LAYERS),
    "encoder, batch first": lambda: (encoder(True), noise(6, 8)),
    "encoder, time first": lambda: (time_first(encoder(False)), noise(6, 8)),
    "encoder, norm first, gelu, padded": padded_encoder,
    "transformer": lambda: (
        nn.Transformer(8, 2, 1, 1, 12, batch_first=True),
        {"src": noise(6, 8), "tgt": noise(4, 8)},
    ),
    "embedded lstm": embedded_lstm,
    "tied language model": lambda: (tied_language_model(9, 4), ids(6)),
    "gated mlp": lambda: (nn.Sequential(rms_norm(6), gated_mlp(6, 8)), noise(4, 6)),
    "standardized convolutions": lambda: (standardized_convolutions(), noise(3, 8, 8)),
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
