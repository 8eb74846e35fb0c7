"""Seed-OSS: a Llama with biases on queries, keys and values, or on the output of attention.

The head size is a number of its own. Reference:
[Seed-OSS](https://github.com/ByteDance-Seed/seed-oss).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import llama
from functional_llm.backbones.family import Family
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """The numbers of a Seed-OSS, beside those of a Llama."""

    attention_out_bias: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_with_one_rope(config, build_decoder, ["full_attention"] * config.num_layers)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    epsilon, bias = config.layer_norm_epsilon, config.attention_bias
    out_bias = config.attention_out_bias
    self_attention = attention(
        query=[heads(queries, size, "query", bias), rotary()],
        key=[heads(keys, size, "key", bias), rotary()],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=out_bias, name="output"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation, config.mlp_bias)
    return pre_norm(name, lambda part: rms_norm(epsilon, part), self_attention, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {
        "num_key_value_heads": 8,
        "max_position_embeddings": 524288,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
    }
    return llama.complete_keys(own | keys)


FAMILY = Family(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    models="Seed-OSS",
    config_class=Config,
    build=build,
    config_keys={**llama.FAMILY.config_keys, "attention_out_bias": "attention_out_bias"},
    config_nulls=("num_key_value_heads", "head_dim"),
    complete_keys=complete_keys,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="seed_oss",
)
