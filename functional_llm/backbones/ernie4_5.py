"""ERNIE 4.5 0.3B: a Llama whose RoPE turns pairs of neighbouring channels; a tied head.

The head size is a number of its own. Reference:
[ERNIE 4.5](https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import llama
from functional_llm.backbones.family import COMMON_KEYS, DecoderConfig, Family, complete_common_keys
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary_pairs
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of an ERNIE 4.5, beside those of `DecoderConfig`."""

    use_bias: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return llama.build_stack(config, build_decoder, ["full_attention"] * config.num_layers)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    epsilon, bias = config.layer_norm_epsilon, config.use_bias
    self_attention = attention(
        query=[heads(queries, size, "query", bias), rotary_pairs()],
        key=[heads(keys, size, "key", bias), rotary_pairs()],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation, bias)
    return pre_norm(name, lambda part: rms_norm(epsilon, part), self_attention, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0}
    own |= {"use_bias": False, "tie_word_embeddings": True}
    keys = own | {"num_key_value_heads": 2, "head_dim": 128} | keys
    return complete_common_keys(keys)


FAMILY = Family(
    model_type="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    models="ERNIE 4.5 0.3B",
    config_class=Config,
    build=build,
    config_keys={**COMMON_KEYS, "use_bias": "use_bias"},
    config_nulls=("num_key_value_heads", "head_dim"),
    complete_keys=complete_keys,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="ernie4_5",
)
