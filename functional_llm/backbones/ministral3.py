"""Ministral 3, Devstral 2: a Mistral whose queries grow with their position; RoPE by YaRN.

Reference: [Ministral 3](https://arxiv.org/abs/2601.08584).
"""

from dataclasses import dataclass
from typing import cast

import keras

from functional_llm.backbones import llama, mistral
from functional_llm.backbones.family import Family, complete_common_keys
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import query_scale, rotary
from functional_llm.blocks.rope_scaling import QueryScaledYarn
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(mistral.Config):
    """The numbers of a Ministral 3, which are those of a Mistral.

    Raises:
        ValueError: If `rope_scaling` is no `QueryScaledYarn`.
    """

    def __post_init__(self) -> None:
        if not isinstance(self.rope_scaling, QueryScaledYarn):
            raise ValueError(
                "Expected RoPE of the rope_type yarn for a Ministral 3. Received: "
                f"{self.rope_scaling}."
            )


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return mistral.build_stack(config, build_decoder)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    epsilon, scaling = config.layer_norm_epsilon, cast(QueryScaledYarn, config.rope_scaling)
    scale = query_scale(scaling.original_max_sequence_length, scaling.query_beta)
    self_attention = attention(
        query=[heads(queries, size, "query"), rotary(), scale],
        key=[heads(keys, size, "key"), rotary()],
        value=[heads(keys, size, "value")],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return pre_norm(name, lambda part: rms_norm(epsilon, part), self_attention, mlp)


# What Transformers takes where a file says nothing of RoPE.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 262144, "sliding_window": None}
    own |= {"num_key_value_heads": 8, "head_dim": 128}
    if not keys.get("rope_parameters") and not keys.get("rope_scaling"):
        own["rope_parameters"] = _ROPE
    return complete_common_keys(own | keys)


FAMILY = Family(
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    models="Ministral 3, Devstral 2",
    config_class=Config,
    build=build,
    config_keys=mistral.FAMILY.config_keys,
    config_nulls=("num_key_value_heads", "head_dim"),
    config_constants=mistral.NO_BIASES,
    complete_keys=complete_keys,
    rope_types={"yarn": "yarn_query_scale"},
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    wrappers=mistral.FAMILY.wrappers,
    gguf_architecture="mistral3",
    gguf_told_by="attention.temperature_scale",
    gguf_permuted=llama.FAMILY.gguf_permuted,
)
