"""Gemma: norms scaled by 1 + w, a gated GELU, an embedding multiplied by sqrt(D), a tied head.

The head size is a number of its own. Reference: [Gemma](https://arxiv.org/abs/2403.08295).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import keras

from functional_llm.backbones import llama
from functional_llm.backbones.family import (
    COMMON_KEYS,
    AnyConfig,
    DecoderConfig,
    Family,
    complete_common_keys,
)
from functional_llm.backbones.keras_hub import gemmas
from functional_llm.backbones.stacks import build_around, one_rope
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph, LayerType, scale, soft_cap
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import offset_rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of a Gemma, which are those of `DecoderConfig`."""


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    kinds = ["full_attention"] * config.num_layers
    return build_stack(config, build_decoder, kinds, one_rope(config))


def build_stack(
    config: AnyConfig,
    build_decoder: Callable[[AnyConfig, str], CompositeLayer],
    kinds: Sequence[str],
    layer_types: Mapping[str, LayerType],
    final_logit_soft_cap: float | None = None,
) -> Graph:
    """Returns the graph around decoder layers, `kinds` their types, for this family and its kin."""
    layers = [(kind, build_decoder(config, f"decoder_{i}")) for i, kind in enumerate(kinds)]
    return build_around(
        config,
        layers,
        layer_types,
        offset_rms_norm,
        embedding_parts=[scale(config.hidden_dim**0.5)],
        logit_parts=[soft_cap(cap) for cap in [final_logit_soft_cap] if cap is not None],
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


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    activation = keys.get("hidden_act", "gelu_pytorch_tanh")
    if activation == "gelu":  # of the first releases, which mean its approximation by tanh
        activation = "gelu_pytorch_tanh"
    return complete_common_keys(own | keys | {"hidden_act": activation})


def written_keys(config: Config) -> JSON:
    """Returns what Transformers needs: `complete_keys` says what "gelu" means to it."""
    return {"hidden_act": "gelu_python"} if config.activation == "gelu" else {}


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    models="Gemma",
    config_class=Config,
    build=build,
    config_keys=COMMON_KEYS,
    config_ignored={"hidden_activation": "hidden_act"},
    config_constants=CONSTANTS,
    complete_keys=complete_keys,
    written_keys=written_keys,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="gemma",
    gguf_offset=["*norm.weight"],
    keras_hub=gemmas.GEMMA,
)
