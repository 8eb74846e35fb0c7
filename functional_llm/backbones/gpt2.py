"""GPT-2: learned positions, LayerNorm with a bias, biases on every Dense, a plain GELU MLP.

Checkpoints hold queries, keys and values as one tensor, and kernels as (in, out). Reference:
[Language Models are Unsupervised Multitask Learners](https://openai.com/research/better-language-models).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import keras

from functional_llm.backbones.family import Family, MultiHeadConfig, dense_rows, layer_norm_rows
from functional_llm.backbones.keras_hub import gpts
from functional_llm.backbones.stacks import build_alike
from functional_llm.blocks.attention import Part, attention, heads
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph, LayerType, learned_positions
from functional_llm.blocks.mlp import mlp
from functional_llm.blocks.norm import layer_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON
from functional_llm.layers.attention import AttentionDotProduct


@dataclass(frozen=True, kw_only=True)
class Config(MultiHeadConfig):
    """The numbers of a GPT-2, which are those of `MultiHeadConfig`."""


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_stack(config, learned_positions(config.max_sequence_length, config.hidden_dim))


def build_stack(
    config: Config, embedding_part: Part, slopes: Sequence[float] | None = None
) -> Graph:
    """Returns the graph with a part behind the embedding, for this family and BLOOM.

    `slopes` are those of ALiBi, one a head, if there are any.
    """
    decoder, parts = partial(build_decoder, slopes=slopes), [embedding_part]
    return build_alike(config, decoder, layer_norm, LayerType(), embedding_parts=parts)


def build_decoder(config: Config, name: str, slopes: Sequence[float] | None) -> CompositeLayer:
    """Returns one decoder layer."""
    epsilon, size = config.layer_norm_epsilon, config.head_dim
    self_attention = attention(
        query=[heads(config.num_heads, size, "query", use_bias=True)],
        key=[heads(config.num_heads, size, "key", use_bias=True)],
        value=[heads(config.num_heads, size, "value", use_bias=True)],
        output=keras.layers.Dense(config.hidden_dim, name="output"),
        product=AttentionDotProduct(slopes=slopes, name="dot_product"),
    )
    plain = mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return pre_norm(name, lambda part: layer_norm(epsilon, part), self_attention, plain)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
    inner = keys.get("n_inner", 4 * keys["n_embd"])
    return own | {"tie_word_embeddings": True} | keys | {"n_inner": inner}


_LAYER = "transformer.h.{}"
WEIGHTS = [
    ("transformer.wte.weight", "token_embedding/embeddings", "same"),
    ("transformer.wpe.weight", "position_embedding/embeddings", "same"),
    *layer_norm_rows(f"{_LAYER}.ln_1", "decoder_{}/attention_norm"),
    *dense_rows(f"{_LAYER}.attn.c_attn", "decoder_{}/attention/query", "last_axis", "last_axis"),
    *dense_rows(f"{_LAYER}.attn.c_attn", "decoder_{}/attention/key", "last_axis", "last_axis"),
    *dense_rows(f"{_LAYER}.attn.c_attn", "decoder_{}/attention/value", "last_axis", "last_axis"),
    *dense_rows(f"{_LAYER}.attn.c_proj", "decoder_{}/attention/output", "same"),
    *layer_norm_rows(f"{_LAYER}.ln_2", "decoder_{}/mlp_norm"),
    *dense_rows(f"{_LAYER}.mlp.c_fc", "decoder_{}/mlp/up", "same"),
    *dense_rows(f"{_LAYER}.mlp.c_proj", "decoder_{}/mlp/down", "same"),
    *layer_norm_rows("transformer.ln_f", "final_norm"),
    ("lm_head.weight", "head/kernel", "transpose"),
]

FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    models="GPT-2, DistilGPT-2",
    config_class=Config,
    build=build,
    config_keys={
        "vocab_size": "vocabulary_size",
        "n_layer": "num_layers",
        "n_embd": "hidden_dim",
        "n_inner": "intermediate_dim",
        "n_head": "num_heads",
        "layer_norm_epsilon": "layer_norm_epsilon",
        "n_positions": "max_sequence_length",
        "activation_function": "activation",
        "tie_word_embeddings": "tie_word_embeddings",
    },
    config_aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    config_constants={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "n_special": 0,  # no tokens beyond the vocabulary
        "predict_special_tokens": True,
    },
    complete_keys=complete_keys,
    weights=WEIGHTS,
    ignored=["*attn.bias", "*attn.masked_bias"],  # buffers with the causal mask
    base_prefix="transformer.",
    gguf_architecture="gpt2",
    gguf_keys={
        "block_count": "n_layer",
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "vocab_size": "vocab_size",
    },
    gguf_transposed=["*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"],
    keras_hub=gpts.GPT2,
)
