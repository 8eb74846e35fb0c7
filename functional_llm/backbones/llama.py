"""Llama 2, 3, 3.1-3.3, SmolLM2: RMSNorm before each branch, RoPE, grouped queries, gated SiLU.

Llama 3.1 and later stretch RoPE (`Llama3Scaling`). SmolLM2 and the small Llama 3.2 tie the head to
the embedding. References: [Llama 2](https://arxiv.org/abs/2307.09288),
[Llama 3](https://arxiv.org/abs/2407.21783), [SmolLM2](https://arxiv.org/abs/2502.02737).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from functional_llm.backbones.family import COMMON_KEYS, Family, complete_common_keys, dense_rows
from functional_llm.blocks.attention import attention, heads, key_value_shapes
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph, LayerType, causal_lm
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import Rope, RopeScaling, rotary
from functional_llm.graph.composite import CompositeLayer


@dataclass(frozen=True, kw_only=True)
class Config:
    """The numbers of a Llama."""

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
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = [build_decoder(config, f"decoder_{i}") for i in range(config.num_layers)]
    return build_stack(config, [("full_attention", layer) for layer in layers])


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    epsilon, bias = config.layer_norm_epsilon, config.attention_bias
    self_attention = attention(
        query=[heads(queries, size, "query", bias), rotary()],
        key=[heads(keys, size, "key", bias), rotary()],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation, config.mlp_bias)
    return pre_norm(name, lambda part: rms_norm(epsilon, part), self_attention, mlp)


def build_stack(
    config: Any, layers: Sequence[tuple[str, CompositeLayer]], window: int | None = None
) -> Graph:
    """Returns the graph around decoder layers that share one RoPE, for this family and its kin.

    A layer comes with its type, "full_attention" or "sliding_attention", which sees the window.
    """
    rope = Rope(config.head_dim, config.rope_max_wavelength, config.rope_scaling)
    return causal_lm(
        vocabulary_size=config.vocabulary_size,
        hidden_dim=config.hidden_dim,
        layer_types={
            "full_attention": LayerType(rope),
            "sliding_attention": LayerType(rope, window),
        },
        layers=layers,
        keeps=key_value_shapes(config.num_key_value_heads, config.head_dim),
        final_norm=rms_norm(config.layer_norm_epsilon, "final_norm"),
        tie_word_embeddings=config.tie_word_embeddings,
    )


def complete_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Adds what Transformers takes where a `config.json` is silent."""
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
    config_class=Config,
    build=build,
    config_keys={**COMMON_KEYS, "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    complete_keys=complete_keys,
    weights=WEIGHTS,
    ignored=["*.rotary_emb.inv_freq"],  # buffers of old checkpoints
    gguf_architecture="llama",
    gguf_permuted={"q_proj": "num_query_heads", "k_proj": "num_key_value_heads"},
)
