"""Llama 2, 3, 3.1-3.3, SmolLM2: RMSNorm before each branch, RoPE, grouped queries, gated SiLU.

Llama 3.1 and later stretch RoPE (`Llama3Scaling`). SmolLM2 and the small Llama 3.2 tie the head to
the embedding. References: [Llama 2](https://arxiv.org/abs/2307.09288),
[Llama 3](https://arxiv.org/abs/2407.21783), [SmolLM2](https://arxiv.org/abs/2502.02737).
"""

from dataclasses import dataclass
from typing import Any

import keras

from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import attention_mask, decoder, token_inputs
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import RopeScaling, rotary, rotation


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


def build(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the inputs and outputs of the graph."""
    kept = (config.num_key_value_heads, config.head_dim)
    names = [f"decoder_{i}" for i in range(config.num_layers)]
    inputs = token_inputs({name: {"attention": {"key": kept, "value": kept}} for name in names})
    embedding = keras.layers.ReversibleEmbedding(
        config.vocabulary_size, config.hidden_dim, name="token_embedding"
    )
    x = embedding(inputs["token_ids"])
    mask, slot_positions = attention_mask(inputs)
    turn = rotation(
        inputs["positions"], config.head_dim, config.rope_max_wavelength, config.rope_scaling
    )
    shared = {"positions": inputs["positions"], "mask": mask, "rotation": turn}
    cache = {"positions": slot_positions}
    for name in names:
        result = build_decoder(config, name)({"x": x, "cache": inputs["cache"][name], **shared})
        x, cache[name] = result["x"], result["cache"]
    x = rms_norm(config.layer_norm_epsilon, "final_norm")(x)
    if config.tie_word_embeddings:
        logits = embedding(x, reverse=True)
    else:
        logits = keras.layers.Dense(config.vocabulary_size, use_bias=False, name="head")(x)
    return inputs, {"logits": logits, "hidden": x, "cache": cache}


def build_decoder(config: Config, name: str) -> keras.layers.Layer:
    """Returns one decoder layer."""
    epsilon, bias, size = config.layer_norm_epsilon, config.attention_bias, config.head_dim
    queries, keys = config.num_query_heads, config.num_key_value_heads
    self_attention = attention(
        query=[heads(queries, size, "query", bias), rotary()],
        key=[heads(keys, size, "key", bias), rotary()],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation, config.mlp_bias)
    return decoder(
        name,
        [
            [rms_norm(epsilon, "attention_norm"), self_attention],
            [rms_norm(epsilon, "mlp_norm"), mlp],
        ],
    )


# Hugging Face's name of each config key -> ours. RoPE and the activation need more than a name.
CONFIG_KEYS = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_dim",
    "intermediate_size": "intermediate_dim",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "max_sequence_length",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "tie_word_embeddings": "tie_word_embeddings",
}


def config_defaults(keys: dict[str, Any]) -> dict[str, Any]:
    """What Transformers takes where a `config.json` is silent."""
    heads_ = keys["num_attention_heads"]
    return {
        "num_key_value_heads": heads_,
        "head_dim": keys["hidden_size"] // heads_,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
    }


# Tensor of a checkpoint -> variable, with the transform between them.
WEIGHTS = [
    ("model.embed_tokens.weight", "token_embedding/embeddings", "same"),
    ("model.layers.{}.input_layernorm.weight", "decoder_{}/attention_norm/scale", "same"),
    ("model.layers.{}.self_attn.q_proj.weight", "decoder_{}/attention/query/kernel", "transpose"),
    ("model.layers.{}.self_attn.q_proj.bias", "decoder_{}/attention/query/bias", "same"),
    ("model.layers.{}.self_attn.k_proj.weight", "decoder_{}/attention/key/kernel", "transpose"),
    ("model.layers.{}.self_attn.k_proj.bias", "decoder_{}/attention/key/bias", "same"),
    ("model.layers.{}.self_attn.v_proj.weight", "decoder_{}/attention/value/kernel", "transpose"),
    ("model.layers.{}.self_attn.v_proj.bias", "decoder_{}/attention/value/bias", "same"),
    ("model.layers.{}.self_attn.o_proj.weight", "decoder_{}/attention/output/kernel", "transpose"),
    ("model.layers.{}.self_attn.o_proj.bias", "decoder_{}/attention/output/bias", "same"),
    ("model.layers.{}.post_attention_layernorm.weight", "decoder_{}/mlp_norm/scale", "same"),
    ("model.layers.{}.mlp.gate_proj.weight", "decoder_{}/mlp/gate/kernel", "transpose"),
    ("model.layers.{}.mlp.gate_proj.bias", "decoder_{}/mlp/gate/bias", "same"),
    ("model.layers.{}.mlp.up_proj.weight", "decoder_{}/mlp/up/kernel", "transpose"),
    ("model.layers.{}.mlp.up_proj.bias", "decoder_{}/mlp/up/bias", "same"),
    ("model.layers.{}.mlp.down_proj.weight", "decoder_{}/mlp/down/kernel", "transpose"),
    ("model.layers.{}.mlp.down_proj.bias", "decoder_{}/mlp/down/bias", "same"),
    ("model.norm.weight", "final_norm/scale", "same"),
    ("lm_head.weight", "head/kernel", "transpose"),
]

# Buffers that old checkpoints carry, and a tied head that is in the file all the same.
IGNORED = ["*.rotary_emb.inv_freq"]
COPIES_IF_TIED = {"lm_head.weight": "model.embed_tokens.weight"}

# Projections whose rows llama.cpp reorders, and the field with their number of heads.
GGUF_PERMUTED = {"q_proj": "num_query_heads", "k_proj": "num_key_value_heads"}
