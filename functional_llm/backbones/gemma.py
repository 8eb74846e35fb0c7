"""Gemma: norms scaled by 1 + w, a gated GELU, an embedding multiplied by sqrt(D), a tied head.

The head size is a number of its own. Reference: [Gemma](https://arxiv.org/abs/2403.08295).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from functional_llm.backbones import llama
from functional_llm.backbones.family import COMMON_KEYS, Family, complete_common_keys
from functional_llm.blocks.attention import Part, attention, heads, key_value_shapes
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph, LayerType, causal_lm, scale
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import offset_rms_norm
from functional_llm.blocks.rope import Rope, RopeScaling, rotary
from functional_llm.graph.composite import CompositeLayer


@dataclass(frozen=True, kw_only=True)
class Config:
    """The numbers of a Gemma."""

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
    tie_word_embeddings: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    rope = Rope(config.head_dim, config.rope_max_wavelength, config.rope_scaling)
    layers = [build_decoder(config, f"decoder_{i}") for i in range(config.num_layers)]
    kinds = ["full_attention"] * config.num_layers
    return build_stack(config, kinds, layers, {"full_attention": LayerType(rope)})


def build_stack(
    config: Any,
    kinds: Sequence[str],
    layers: Sequence[CompositeLayer],
    layer_types: Mapping[str, LayerType],
    logit_parts: Sequence[Part] = (),
) -> Graph:
    """Returns the graph around decoder layers, `kinds` their types, for this family and its kin."""
    return causal_lm(
        vocabulary_size=config.vocabulary_size,
        hidden_dim=config.hidden_dim,
        embedding_parts=[scale(config.hidden_dim**0.5)],
        layer_types=layer_types,
        layers=list(zip(kinds, layers, strict=True)),
        keeps=key_value_shapes(config.num_key_value_heads, config.head_dim),
        final_norm=offset_rms_norm(config.layer_norm_epsilon, "final_norm"),
        tie_word_embeddings=config.tie_word_embeddings,
        logit_parts=logit_parts,
    )


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    epsilon, size = config.layer_norm_epsilon, config.head_dim
    self_attention = attention(
        query=[heads(config.num_query_heads, size, "query"), rotary()],
        key=[heads(config.num_key_value_heads, size, "key"), rotary()],
        value=[heads(config.num_key_value_heads, size, "value")],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return pre_norm(name, lambda part: offset_rms_norm(epsilon, part), self_attention, mlp)


CONSTANTS = {"attention_bias": False, "use_bidirectional_attention": False}


def complete_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Adds what Transformers takes where a `config.json` is silent."""
    own = {
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    activation = keys.get("hidden_activation") or keys.get("hidden_act", "gelu_pytorch_tanh")
    if activation == "gelu":  # the first releases say so, and mean its approximation by tanh
        activation = "gelu_pytorch_tanh"
    both = {"hidden_act": activation, "hidden_activation": activation}
    return complete_common_keys(own | keys | both)


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    config_class=Config,
    build=build,
    config_keys={**COMMON_KEYS, "hidden_activation": None},
    config_constants=CONSTANTS,
    complete_keys=complete_keys,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="gemma",
    gguf_offset=["*norm.weight"],
)
