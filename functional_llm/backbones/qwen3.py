"""Qwen 3: a Qwen 2 that normalises each head's queries and keys before RoPE, without biases.

The head size is a number of its own. Reference: [Qwen3](https://arxiv.org/abs/2505.09388).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import keras

from functional_llm.backbones import llama, qwen2
from functional_llm.backbones.family import DecoderConfig, Family
from functional_llm.backbones.keras_hub import llamas
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.blocks.attention import Part, attention, heads
from functional_llm.blocks.decoder import NamedPart, pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of a Qwen 3, beside those of `DecoderConfig`."""

    attention_bias: bool
    layer_types: tuple[str, ...]
    sliding_window: int | None


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_with_one_rope(config, build_decoder, config.layer_types, config.sliding_window)


def build_decoder(config: Config, name: str, mlp: NamedPart | None = None) -> CompositeLayer:
    """Returns one decoder layer. Its MLP is gated, unless it is given."""
    norm = partial(rms_norm, config.layer_norm_epsilon)
    mlp = mlp or gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return pre_norm(name, norm, self_attention(config, config.attention_bias), mlp)


def self_attention(
    config: DecoderConfig, bias: bool, attended: Sequence[Part] = ()
) -> CompositeLayer:
    """Returns the attention of this family and its kin, with these parts before its output."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    epsilon = config.layer_norm_epsilon
    return attention(
        query=[heads(queries, size, "query", bias), rms_norm(epsilon, "query_norm"), rotary()],
        key=[heads(keys, size, "key", bias), rms_norm(epsilon, "key_norm"), rotary()],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
        attended=attended,
    )


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    return qwen2.complete_keys({"head_dim": 128, "attention_bias": False} | keys)


QK_NORMS = [
    ("model.layers.{}.self_attn.q_norm.weight", "decoder_{}/attention/query_norm/scale", "same"),
    ("model.layers.{}.self_attn.k_norm.weight", "decoder_{}/attention/key_norm/scale", "same"),
]

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    models="Qwen 3",
    config_class=Config,
    build=build,
    config_keys={**qwen2.CONFIG_KEYS, "attention_bias": "attention_bias"},
    config_constants={"use_mrope": False, "mlp_bias": False},
    complete_keys=complete_keys,
    written_keys=qwen2.written_keys,
    weights=[*llama.WEIGHTS, *QK_NORMS],
    ignored=llama.FAMILY.ignored,
    gguf_architecture="qwen3",
    keras_hub=llamas.QWEN3,
)
