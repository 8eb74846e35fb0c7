"""Command R, Aya: attention and MLP side by side behind one LayerNorm without bias.

RoPE turns pairs of neighbouring channels; logits are multiplied by a number; the head is tied.
Command R+ normalises every head's queries and keys with a norm of its own. Reference:
[Command R](https://docs.cohere.com/docs/command-r).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import llama, starcoder2
from functional_llm.backbones.family import (
    ROPE_BUFFERS,
    DecoderConfig,
    Family,
    complete_common_keys,
    renamed_keys,
)
from functional_llm.backbones.stacks import build_alike, with_rope
from functional_llm.blocks.attention import Part, attention, heads
from functional_llm.blocks.decoder import parallel
from functional_llm.blocks.language_model import Graph, scale
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import LayerNormOfHeads, layer_norm_without_bias
from functional_llm.blocks.rope import rotary_pairs
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class SharedConfig(DecoderConfig):
    """The numbers of a Cohere or Cohere 2, beside those of `DecoderConfig`."""

    attention_bias: bool
    logit_scale: float


@dataclass(frozen=True, kw_only=True)
class Config(SharedConfig):
    """The numbers of a Cohere, beside those of `SharedConfig`."""

    use_query_key_norm: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    norm, parts = layer_norm_without_bias, [scale(config.logit_scale)]
    return build_alike(config, build_decoder, norm, with_rope(config), logit_parts=parts)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    epsilon = config.layer_norm_epsilon

    def turned(part: str) -> list[Part]:
        norm = LayerNormOfHeads(epsilon, name=f"{part}_norm")
        return [*([norm] if config.use_query_key_norm else []), rotary_pairs()]

    return build_layer(config, name, turned("query"), turned("key"))


def build_layer(
    config: SharedConfig, name: str, query: list[Part], key: list[Part]
) -> CompositeLayer:
    """Returns a decoder layer with these parts behind queries and keys, for this and Cohere 2."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    bias = config.attention_bias
    self_attention = attention(
        query=[heads(queries, size, "query", bias), *query],
        key=[heads(keys, size, "key", bias), *key],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    norm = layer_norm_without_bias(config.layer_norm_epsilon, "norm")
    return parallel(name, [norm], self_attention, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {"max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "rope_theta": 500000.0}
    own |= {"attention_bias": False, "logit_scale": 0.0625, "tie_word_embeddings": True}
    # The context that the model was trained on stands under this key, which llama.cpp reads, too.
    context = {"max_position_embeddings": keys[_CONTEXT]} if _CONTEXT in keys else {}
    return complete_common_keys(own | {"use_qk_norm": False} | keys | context)


_CONTEXT = "model_max_length"
_LAYER = "model.layers.{}"
WEIGHTS = [
    ("model.embed_tokens.weight", "token_embedding/embeddings", "same"),
    (f"{_LAYER}.input_layernorm.weight", "decoder_{}/norm/gamma", "same"),
    *starcoder2.ATTENTION,
    (f"{_LAYER}.self_attn.q_norm.weight", "decoder_{}/attention/query_norm/scale", "same"),
    (f"{_LAYER}.self_attn.k_norm.weight", "decoder_{}/attention/key_norm/scale", "same"),
    *(row for row in llama.WEIGHTS if ".mlp." in row[0]),
    ("model.norm.weight", "final_norm/gamma", "same"),
    ("lm_head.weight", "head/kernel", "transpose"),
]
CONFIG_KEYS: dict[str, str | type] = {
    **renamed_keys(rms_norm_eps="layer_norm_eps"),
    "attention_bias": "attention_bias",
    "logit_scale": "logit_scale",
}

FAMILY = Family(
    model_type="cohere",
    architecture="CohereForCausalLM",
    models="Command R, R+, Aya 23",
    config_class=Config,
    build=build,
    config_keys={**CONFIG_KEYS, "use_qk_norm": "use_query_key_norm", _CONTEXT: int},
    config_nulls=("num_key_value_heads", "layer_norm_eps", "logit_scale"),
    complete_keys=complete_keys,
    weights=WEIGHTS,
    ignored=ROPE_BUFFERS,
    gguf_architecture="command-r",
    gguf_keys={"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"},
)
