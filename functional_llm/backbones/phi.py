"""Phi 1, 1.5, 2: attention and MLP side by side behind one LayerNorm, biases everywhere.

RoPE turns a part of each head; the head of the model has a bias, too. References:
[Textbooks Are All You Need](https://arxiv.org/abs/2306.11644),
[Phi-1.5](https://arxiv.org/abs/2309.05463).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import starcoder2
from functional_llm.backbones.family import (
    ROPE_BUFFERS,
    Family,
    PartialRotaryConfig,
    complete_common_keys,
    dense_rows,
    layer_norm_rows,
    renamed_keys,
)
from functional_llm.backbones.stacks import build_alike, with_rope
from functional_llm.blocks.attention import Part, attention, heads
from functional_llm.blocks.decoder import parallel
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import mlp
from functional_llm.blocks.norm import layer_norm
from functional_llm.blocks.rope import on_first_channels, rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(PartialRotaryConfig):
    """The numbers of a Phi, beside those of `PartialRotaryConfig`."""

    use_query_key_norm: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_alike(config, build_decoder, layer_norm, with_rope(config), head_bias=True)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    epsilon, rotate = config.layer_norm_epsilon, on_first_channels(rotary())

    def norms(part: str) -> list[Part]:
        return [layer_norm(epsilon, f"{part}_norm")] if config.use_query_key_norm else []

    self_attention = attention(
        query=[heads(queries, size, "query", use_bias=True), *norms("query"), rotate],
        key=[heads(keys, size, "key", use_bias=True), *norms("key"), rotate],
        value=[heads(keys, size, "value", use_bias=True)],
        output=keras.layers.Dense(config.hidden_dim, name="output"),
    )
    plain = mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return parallel(name, [layer_norm(epsilon, "norm")], self_attention, plain)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {"layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "qk_layernorm": False}
    return complete_common_keys(own | {"partial_rotary_factor": 0.5} | keys)


_LAYER = "model.layers.{}"
WEIGHTS = [
    ("model.embed_tokens.weight", "token_embedding/embeddings", "same"),
    *layer_norm_rows(f"{_LAYER}.input_layernorm", "decoder_{}/norm"),
    *(row for row in starcoder2.ATTENTION if "o_proj" not in row[0]),
    *layer_norm_rows(f"{_LAYER}.self_attn.q_layernorm", "decoder_{}/attention/query_norm"),
    *layer_norm_rows(f"{_LAYER}.self_attn.k_layernorm", "decoder_{}/attention/key_norm"),
    *dense_rows(f"{_LAYER}.self_attn.dense", "decoder_{}/attention/output"),
    *dense_rows(f"{_LAYER}.mlp.fc1", "decoder_{}/mlp/up"),
    *dense_rows(f"{_LAYER}.mlp.fc2", "decoder_{}/mlp/down"),
    *layer_norm_rows("model.final_layernorm", "final_norm"),
    *dense_rows("lm_head", "head"),
]

FAMILY = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    models="Phi 1, 1.5, 2",
    config_class=Config,
    build=build,
    config_keys={
        **renamed_keys(rms_norm_eps="layer_norm_eps"),
        "partial_rotary_factor": "partial_rotary_factor",
        "qk_layernorm": "use_query_key_norm",
    },
    config_constants={"tie_word_embeddings": False},  # the bias is that of a head of its own
    complete_keys=complete_keys,
    weights=WEIGHTS,
    ignored=ROPE_BUFFERS,
    gguf_architecture="phi2",
    gguf_keys={"attention.layer_norm_epsilon": "layer_norm_eps"},
)
