"""Llama 2, 3, 3.1-3.3, SmolLM2: RMSNorm before each branch, RoPE, grouped queries, gated SiLU.

Llama 3.1 and later stretch RoPE (`Llama3Scaling`). SmolLM2 and the small Llama 3.2 tie the head to
the embedding. References: [Llama 2](https://arxiv.org/abs/2307.09288),
[Llama 3](https://arxiv.org/abs/2407.21783), [SmolLM2](https://arxiv.org/abs/2502.02737).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import keras

from functional_llm.backbones.family import (
    COMMON_KEYS,
    ROPE_BUFFERS,
    DecoderConfig,
    Family,
    complete_common_keys,
    dense_rows,
)
from functional_llm.backbones.keras_hub import llamas
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.blocks.attention import PartFunction, Product, attention, heads
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of a Llama, beside those of `DecoderConfig`."""

    attention_bias: bool
    mlp_bias: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    decoder = partial(build_decoder, bias=config.attention_bias, mlp_bias=config.mlp_bias)
    return build_with_one_rope(config, decoder, ["full_attention"] * config.num_layers)


def build_decoder(
    config: DecoderConfig,
    name: str,
    rotate: PartFunction | None = None,
    bias: bool = False,
    mlp_bias: bool = False,
) -> CompositeLayer:
    """Returns one decoder layer. What turns queries and keys is `rotary()`, unless it is given."""
    epsilon, rotate = config.layer_norm_epsilon, rotate or rotary()
    self_attention = build_attention(config, rotate, bias)
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation, mlp_bias)
    return pre_norm(name, lambda part: rms_norm(epsilon, part), self_attention, mlp)


def build_attention(
    config: DecoderConfig,
    rotate: PartFunction,
    bias: bool,
    product: Product | None = None,
    of_queries: Sequence[PartFunction] = (),
) -> CompositeLayer:
    """Returns the attention of a decoder layer, for this family and its kin.

    `of_queries` are parts behind the one that turns, on queries alone.
    """
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    return attention(
        query=[heads(queries, size, "query", bias), rotate, *of_queries],
        key=[heads(keys, size, "key", bias), rotate],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
        product=product,
    )


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    return complete_common_keys({"attention_bias": False, "mlp_bias": False} | keys)


_LAYER = "model.layers.{}"
# Tensor of a checkpoint -> variable, with the transform between them.
WEIGHTS = [
    ("model.embed_tokens.weight", "token_embedding/embeddings", "same"),
    (f"{_LAYER}.input_layernorm.weight", "decoder_{}/attention_norm/scale", "same"),
    *dense_rows(f"{_LAYER}.self_attn.q_proj", "decoder_{}/attention/query"),
    *dense_rows(f"{_LAYER}.self_attn.k_proj", "decoder_{}/attention/key"),
    *dense_rows(f"{_LAYER}.self_attn.v_proj", "decoder_{}/attention/value"),
    *dense_rows(f"{_LAYER}.self_attn.o_proj", "decoder_{}/attention/output"),
    (f"{_LAYER}.post_attention_layernorm.weight", "decoder_{}/mlp_norm/scale", "same"),
    *dense_rows(f"{_LAYER}.mlp.gate_proj", "decoder_{}/mlp/gate"),
    *dense_rows(f"{_LAYER}.mlp.up_proj", "decoder_{}/mlp/up"),
    *dense_rows(f"{_LAYER}.mlp.down_proj", "decoder_{}/mlp/down"),
    ("model.norm.weight", "final_norm/scale", "same"),
    ("lm_head.weight", "head/kernel", "transpose"),
]

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    models="Llama 2, 3, 3.1–3.3, SmolLM2",
    real_weights="SmolLM2 135M, stories260K",
    config_class=Config,
    build=build,
    config_keys={**COMMON_KEYS, "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    complete_keys=complete_keys,
    weights=WEIGHTS,
    ignored=ROPE_BUFFERS,
    gguf_architecture="llama",
    gguf_ignored=("expert_count", "expert_used_count"),  # 0, or it is a Mixtral
    gguf_permuted={"q_proj": "num_query_heads", "k_proj": "num_key_value_heads"},
    keras_hub=llamas.LLAMA,
)
