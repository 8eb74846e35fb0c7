"""GLM-4-0414: norms on both sides of each branch, RoPE on pairs of half of each head's channels.

Queries, keys and values have biases; checkpoints hold gate and up as one tensor. Reference:
[GLM-4](https://arxiv.org/abs/2406.12793).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import llama, phi3
from functional_llm.backbones.family import (
    COMMON_KEYS,
    Family,
    PartialRotaryConfig,
    complete_common_keys,
)
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import sandwich
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import on_first_channels, rotary_pairs
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(PartialRotaryConfig):
    """The numbers of a GLM-4, beside those of `PartialRotaryConfig`."""

    attention_bias: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_with_one_rope(config, build_decoder, ["full_attention"] * config.num_layers)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    epsilon, bias = config.layer_norm_epsilon, config.attention_bias
    rotate = on_first_channels(rotary_pairs())
    self_attention = attention(
        query=[heads(queries, size, "query", bias), rotate],
        key=[heads(keys, size, "key", bias), rotate],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return sandwich(name, lambda part: rms_norm(epsilon, part), self_attention, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072}
    own |= {"rms_norm_eps": 1.5625e-7, "attention_bias": True, "partial_rotary_factor": 0.5}
    return complete_common_keys(own | keys)


_SPLIT = ("gate_proj", "up_proj", "post_attention_layernorm")
_NORM = "model.layers.{}.%s_layernorm.weight"
WEIGHTS = [
    *(row for row in llama.WEIGHTS if not any(name in row[0] for name in _SPLIT)),
    *phi3.GATE_AND_UP,
    (_NORM % "post_self_attn", "decoder_{}/attention_post_norm/scale", "same"),
    (_NORM % "post_attention", "decoder_{}/mlp_norm/scale", "same"),
    (_NORM % "post_mlp", "decoder_{}/mlp_post_norm/scale", "same"),
]

FAMILY = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    models="GLM-4-0414 9B, 32B",
    config_class=Config,
    build=build,
    config_keys={
        **COMMON_KEYS,
        "attention_bias": "attention_bias",
        "partial_rotary_factor": "partial_rotary_factor",
    },
    complete_keys=complete_keys,
    weights=WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="glm4",
)
