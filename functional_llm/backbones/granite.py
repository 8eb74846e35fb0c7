"""Granite 3: a Llama with four multipliers: of embeddings, scores, branches, and logits.

Reference: [Granite 3.0](https://github.com/ibm-granite/granite-3.0-language-models), which takes
them from [Power Scheduler](https://arxiv.org/abs/2408.13359).
"""

from collections.abc import Callable
from dataclasses import dataclass

import keras

from functional_llm.backbones import llama
from functional_llm.backbones.family import DecoderConfig, Family
from functional_llm.backbones.stacks import build_around, one_rope
from functional_llm.blocks.attention import Part, attention, heads
from functional_llm.blocks.decoder import decoder
from functional_llm.blocks.language_model import Graph, scale
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON
from functional_llm.layers.attention import AttentionDotProduct


@dataclass(frozen=True, kw_only=True)
class MultipliedConfig(DecoderConfig):
    """The numbers of a Granite and its kin, beside those of `DecoderConfig`."""

    attention_bias: bool
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float  # a divisor


@dataclass(frozen=True, kw_only=True)
class Config(MultipliedConfig):
    """The numbers of a Granite, beside those of its kin."""

    mlp_bias: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""

    def build_mlp() -> CompositeLayer:
        width, inner = config.hidden_dim, config.intermediate_dim
        return gated_mlp(inner, width, config.activation, config.mlp_bias)

    return build_stack(config, build_mlp)


def build_stack(config: MultipliedConfig, build_mlp: Callable[[], Part]) -> Graph:
    """Returns the graph, for this family and its kin; `build_mlp` makes the MLP of a layer."""

    def build_layer(name: str) -> CompositeLayer:
        return build_decoder(config, name, self_attention(config, rotary()), build_mlp())

    layers = [("full_attention", build_layer(f"decoder_{i}")) for i in range(config.num_layers)]
    return build_around(config, layers, one_rope(config), **multiplied(config))


def multiplied(config: MultipliedConfig) -> JSON:
    """Returns what multiplies embeddings and logits, for `causal_lm`."""
    return {
        "embedding_parts": [scale(config.embedding_multiplier)],
        "logit_parts": [scale(1 / config.logits_scaling)],
    }


def self_attention(config: MultipliedConfig, *turn: Part) -> CompositeLayer:
    """Returns self-attention; `turn` is what queries and keys go through."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    bias = config.attention_bias
    return attention(
        query=[heads(queries, size, "query", bias), *turn],
        key=[heads(keys, size, "key", bias), *turn],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
        product=AttentionDotProduct(config.attention_multiplier, name="dot_product"),
    )


def build_decoder(
    config: MultipliedConfig, name: str, mixer: CompositeLayer, mlp: Part
) -> CompositeLayer:
    """Returns one decoder layer of two branches."""
    epsilon, scaled = config.layer_norm_epsilon, scale(config.residual_multiplier)
    return decoder(
        name,
        [
            [rms_norm(epsilon, f"{mixer.name}_norm"), mixer, scaled],
            [rms_norm(epsilon, "mlp_norm"), mlp, scaled],
        ],
    )


# Key of a GGUF file -> that of a config.json, and our field.
MULTIPLIERS = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    return llama.complete_keys(dict.fromkeys(MULTIPLIERS.values(), 1.0) | keys)


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    models="Granite 3.0–3.3, and the dense 4.1",
    config_class=Config,
    build=build,
    config_keys={**llama.FAMILY.config_keys, **{x: x for x in MULTIPLIERS.values()}},
    complete_keys=complete_keys,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="granite",
    gguf_keys=MULTIPLIERS,
    gguf_defaults=lambda keys: {"attention_multiplier": keys["head_dim"] ** -0.5},
    gguf_permuted=llama.FAMILY.gguf_permuted,
)
