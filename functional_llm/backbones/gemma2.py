"""Gemma 2: a Gemma with norms on both sides of each branch, soft caps, and windows in turn.

Scores and logits are bounded by tanh; every other layer sees a window; the scale of the scores is a
number of its own. Reference: [Gemma 2](https://arxiv.org/abs/2408.00118).
"""

from dataclasses import dataclass
from typing import Any

import keras

from functional_llm.backbones import gemma
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import sandwich
from functional_llm.blocks.language_model import LayerType, soft_cap
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import offset_rms_norm
from functional_llm.blocks.rope import Rope, RopeScaling, rotary
from functional_llm.composite import CompositeLayer
from functional_llm.family import COMMON_KEYS, Family, Graph
from functional_llm.layers import AttentionDotProduct


@dataclass(frozen=True, kw_only=True)
class Config:
    """The numbers of a Gemma 2."""

    vocabulary_size: int
    num_layers: int
    hidden_dim: int
    intermediate_dim: int
    num_query_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_max_wavelength: float
    rope_scaling: RopeScaling | None
    layer_norm_epsilon: float
    max_sequence_length: int
    activation: str
    query_pre_attention_scalar: float
    attention_logit_soft_cap: float | None
    final_logit_soft_cap: float | None
    layer_types: tuple[str, ...]
    sliding_window: int | None
    tie_word_embeddings: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    rope = Rope(config.head_dim, config.rope_max_wavelength, config.rope_scaling)
    layer_types = {
        "full_attention": LayerType(rope),
        "sliding_attention": LayerType(rope, config.sliding_window),
    }
    layers = [build_decoder(config, f"decoder_{i}") for i in range(config.num_layers)]
    caps = [soft_cap(bound) for bound in [config.final_logit_soft_cap] if bound is not None]
    return gemma.build_stack(config, config.layer_types, layers, layer_types, caps)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    epsilon, size = config.layer_norm_epsilon, config.head_dim
    self_attention = attention(
        query=[heads(config.num_query_heads, size, "query"), rotary()],
        key=[heads(config.num_key_value_heads, size, "key"), rotary()],
        value=[heads(config.num_key_value_heads, size, "value")],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
        product=AttentionDotProduct(
            scale=config.query_pre_attention_scalar**-0.5,
            soft_cap=config.attention_logit_soft_cap,
            name="dot_product",
        ),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return sandwich(name, lambda part: offset_rms_norm(epsilon, part), self_attention, mlp)


CONFIG_KEYS: dict[str, str | None] = {
    **COMMON_KEYS,
    "hidden_act": None,
    "hidden_activation": "activation",
    "query_pre_attn_scalar": "query_pre_attention_scalar",
    "attn_logit_softcapping": "attention_logit_soft_cap",
    "final_logit_softcapping": "final_logit_soft_cap",
    "layer_types": "layer_types",
    "sliding_window": "sliding_window",
    "sliding_window_size": None,  # the first releases say it twice
}


def complete_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Adds what Transformers takes where a `config.json` is silent."""
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(keys[_LAYERS])]
    window = keys.get("sliding_window_size", keys.get("sliding_window", 4096))
    if keys.get("sliding_window", window) != window:
        raise ValueError(
            "config.json: expected one window in sliding_window and sliding_window_size, received "
            f"{keys['sliding_window']} and {window}."
        )
    own = {
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "layer_types": kinds,
        "sliding_window": window,
    }
    return gemma.complete_keys(own | keys)


def gguf_defaults(keys: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp takes: only the 27B models scale by another number than the head size."""
    is_large = keys[_LAYERS] in (46, 62)
    share = keys["hidden_size"] // keys["num_attention_heads"]
    return {"query_pre_attn_scalar": share if is_large else keys["head_dim"]}


_LAYERS, _LAYER = "num_hidden_layers", "model.layers.{}"
WEIGHTS = [
    *(row for row in gemma.FAMILY.weights if "post_attention_layernorm" not in row[0]),
    (f"{_LAYER}.post_attention_layernorm.weight", "decoder_{}/attention_post_norm/scale", "same"),
    (f"{_LAYER}.pre_feedforward_layernorm.weight", "decoder_{}/mlp_norm/scale", "same"),
    (f"{_LAYER}.post_feedforward_layernorm.weight", "decoder_{}/mlp_post_norm/scale", "same"),
]

FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    config_class=Config,
    build=build,
    config_keys=CONFIG_KEYS,
    config_constants=gemma.CONSTANTS,
    complete_keys=complete_keys,
    weights=WEIGHTS,
    gguf_architecture="gemma2",
    gguf_defaults=gguf_defaults,
    gguf_offset=gemma.FAMILY.gguf_offset,
)
