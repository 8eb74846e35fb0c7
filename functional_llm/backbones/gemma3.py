"""Gemma 3, text: a Gemma 2 that normalises queries and keys instead of capping their scores.

Of six layers, five see a window and have a RoPE of their own. Reference:
[Gemma 3](https://arxiv.org/abs/2503.19786).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import gemma, gemma2, qwen3
from functional_llm.backbones.family import DecoderConfig, Family
from functional_llm.backbones.keras_hub import gemmas
from functional_llm.backbones.wrapper import llava
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import sandwich
from functional_llm.blocks.language_model import Graph, LayerType
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import offset_rms_norm
from functional_llm.blocks.rope import Rope, rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON
from functional_llm.layers.attention import AttentionDotProduct


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of a Gemma 3, beside those of `DecoderConfig`."""

    local_rope_max_wavelength: float
    query_pre_attention_scalar: float
    final_logit_soft_cap: float | None
    layer_types: tuple[str, ...]
    sliding_window: int | None


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    types = two_ropes(config, config.local_rope_max_wavelength, config.sliding_window)
    cap = config.final_logit_soft_cap
    return gemma.build_stack(config, build_decoder, config.layer_types, types, cap)


def two_ropes(
    config: DecoderConfig, local_max_wavelength: float, window: int | None
) -> dict[str, LayerType]:
    """Returns the types of layers of which those with a window have a RoPE of their own."""
    full = Rope(config.head_dim, config.rope_max_wavelength, config.rope_scaling)
    sliding = Rope(config.head_dim, local_max_wavelength)
    return {"full_attention": LayerType(full), "sliding_attention": LayerType(sliding, window)}


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    epsilon, size = config.layer_norm_epsilon, config.head_dim
    queries, keys = config.num_query_heads, config.num_key_value_heads
    self_attention = attention(
        query=[heads(queries, size, "query"), offset_rms_norm(epsilon, "query_norm"), rotary()],
        key=[heads(keys, size, "key"), offset_rms_norm(epsilon, "key_norm"), rotary()],
        value=[heads(keys, size, "value")],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
        product=AttentionDotProduct(config.query_pre_attention_scalar**-0.5, name="dot_product"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return sandwich(name, lambda part: offset_rms_norm(epsilon, part), self_attention, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    pattern, num_layers = keys.get("sliding_window_pattern", 6), keys["num_hidden_layers"]
    if pattern < 1:
        raise ValueError(
            "config.json: expected a positive integer for sliding_window_pattern, received "
            f"{pattern}."
        )
    own = {
        "final_logit_softcapping": None,
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "layer_types": [
            "sliding_attention" if (i + 1) % pattern else "full_attention"
            for i in range(num_layers)
        ],
    }
    return gemma2.complete_keys(own | keys)


SCORES_CAP = "attn_logit_softcapping"
FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    models="Gemma 3, text",
    config_class=Config,
    build=build,
    config_keys={
        **{key: field for key, field in gemma2.CONFIG_KEYS.items() if key != SCORES_CAP},
        "rope_local_base_freq": "local_rope_max_wavelength",
        "sliding_window_pattern": int,
    },
    config_ignored=gemma2.FAMILY.config_ignored,
    config_constants={
        **gemma2.FAMILY.config_constants,
        SCORES_CAP: None,  # Transformers would ignore it
    },
    complete_keys=complete_keys,
    weights=[*gemma2.WEIGHTS, *qwen3.QK_NORMS],
    ignored=gemma2.FAMILY.ignored,
    wrappers=[
        # The 4B says none of these numbers: they are the defaults of Gemma3TextConfig.
        llava(
            "gemma3",
            "gemma3_text",
            vocab_size=262_208,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
        )
    ],
    gguf_architecture="gemma3",
    gguf_defaults=gemma2.gguf_defaults,
    gguf_offset=gemma2.FAMILY.gguf_offset,
    keras_hub=gemmas.GEMMA3,
)
