"""Which path computes a parameter's importance, where it is not ``"direct"``.

Layer or model → pattern of parameter names → path. The first pattern that matches decides.
"""

SUBGRAPH = {"*": "subgraph"}
GENERIC = {"*": "generic"}
UNDER_NORM = {"*bias": "direct", "*": "subgraph"}  # the weight is computed from parameters
POSITIONS = {"*relative_*bias*": "subgraph"}

PATHS: dict[str, dict[str, str]] = {
    # layers
    "addmm, scaled": {"bias": "generic"},
    "cosine head": SUBGRAPH,
    "low rank": SUBGRAPH,
    "weight norm": UNDER_NORM,
    "weight norm, old": UNDER_NORM,
    "spectral norm": UNDER_NORM,
    "spectral norm, old": UNDER_NORM,
    "orthogonal": UNDER_NORM,
    "distances": GENERIC,
    "functional": SUBGRAPH,
    "embedding bag, max": GENERIC,
    "embedding bag, weighted": GENERIC,
    "batch as length": GENERIC,
    "prelu": GENERIC,
    "prelu, channels": GENERIC,
    "gain": {"log_scale": "subgraph"},
    "mask token": {"token": "generic"},
    "a rounded quotient": GENERIC,
    "relative bias": {"table": "subgraph"},
    "fourier": SUBGRAPH,
    "added to a spectrum": GENERIC,
    "times a spectrum": GENERIC,
    "complex matrices": {"*": "one sample at a time"},
    "two heads": {"other.*": "unused"},
    "custom function": {"out.*": "direct", "*": "generic"},
    "an output that is not used": GENERIC,
    "the other output": GENERIC,
    "in place": {"shift": "subgraph"},
    # models
    "maxvit, small": POSITIONS,
    "swin, small": POSITIONS,
    "swin_t": POSITIONS,
    "video swin, small": POSITIONS,
    "swin v2, small": {
        "*logit_scale": "subgraph",
        "*qkv.bias": "subgraph",
        "*cpb_mlp*": "subgraph",
    },
    "googlenet with auxiliary heads": {"aux*": "unused"},
    "mixtral": {"*": "one sample at a time"},  # the data chooses the expert
    "t5": POSITIONS,
    "deberta": {
        "*query_proj*": "subgraph",
        "*key_proj*": "subgraph",
        "*rel_embeddings*": "subgraph",
        "deberta.encoder.LayerNorm*": "subgraph",
    },
    "mamba2": {"*A_log": "subgraph"},
    "wav2vec2": {"*parametrizations*": "subgraph"},
    "gemma3": {"*norm.weight": "subgraph"},  # which it adds 1 to
    "peft dora": {"*magnitude*": "subgraph"},
    "peft ia3": SUBGRAPH,
    "peft loha": SUBGRAPH,
    "peft oft": SUBGRAPH,
    "peft fourier": SUBGRAPH,
    "peft dora, convolutions": {"*magnitude*": "subgraph"},
    "peft lokr, convolutions": SUBGRAPH,
    "standardized convolutions": {"[03].weight": "subgraph"},
}
