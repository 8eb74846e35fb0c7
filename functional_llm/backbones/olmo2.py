"""OLMo 2: a Llama with norms behind its branches, and one over all queries, one over all keys.

No norm stands before a branch. Reference: [OLMo 2](https://arxiv.org/abs/2501.00656).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import keras

from functional_llm.backbones import gemma2, llama, qwen3
from functional_llm.backbones.family import COMMON_KEYS, DecoderConfig, Family, complete_common_keys
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.blocks.attention import Part, attention, split_heads
from functional_llm.blocks.decoder import norm_behind_branches
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of an OLMo 2, beside those of `DecoderConfig`."""

    attention_bias: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_with_one_rope(config, build_decoder, ["full_attention"] * config.num_layers)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    norm = partial(rms_norm, config.layer_norm_epsilon)
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return norm_behind_branches(name, norm, self_attention(config, config.attention_bias), mlp)


def self_attention(
    config: DecoderConfig, bias: bool, projected: Sequence[Part] = ()
) -> CompositeLayer:
    """Returns the attention of this family and its kin.

    `projected` are parts on queries, keys and values before they are split into heads.
    """
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    epsilon = config.layer_norm_epsilon

    def parts(num_heads: int, part: str, *norms: Part) -> list[Part]:
        project = keras.layers.Dense(num_heads * size, use_bias=bias, name=part)
        return [project, *norms, *projected, split_heads(num_heads, size, part)]

    return attention(
        query=[*parts(queries, "query", rms_norm(epsilon, "query_norm")), rotary()],
        key=[*parts(keys, "key", rms_norm(epsilon, "key_norm")), rotary()],
        value=parts(keys, "value"),
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
    )


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    return complete_common_keys({"rms_norm_eps": 1e-5, "attention_bias": False} | keys)


CONFIG_KEYS: dict[str, str | type] = {**COMMON_KEYS, "attention_bias": "attention_bias"}
# The rows of norms before the branches have no variables.
WEIGHTS = [*gemma2.WEIGHTS, *qwen3.QK_NORMS]

FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    models="OLMo 2",
    config_class=Config,
    build=build,
    config_keys=CONFIG_KEYS,
    complete_keys=complete_keys,
    weights=WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="olmo2",
)
