"""BLOOM: ALiBi in the place of positions, and a LayerNorm right behind the embedding.

Biases everywhere but on the head, which is the embedding. Checkpoints hold a query, a key and a
value of each head in turn, in one tensor. References: [BLOOM](https://arxiv.org/abs/2211.05100),
[ALiBi](https://arxiv.org/abs/2108.12409).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import gpt_neox
from functional_llm.backbones.family import Family, ModelConfig, Rows, layer_norm_rows
from functional_llm.blocks.attention import alibi_slopes, attention, heads, key_value_shapes
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph, LayerType, causal_lm
from functional_llm.blocks.mlp import mlp
from functional_llm.blocks.norm import layer_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON
from functional_llm.layers.attention import AttentionDotProduct


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """The numbers of a BLOOM, beside those of `ModelConfig`."""

    num_heads: int


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    names = [f"decoder_{i}" for i in range(config.num_layers)]
    return causal_lm(
        vocabulary_size=config.vocabulary_size,
        hidden_dim=config.hidden_dim,
        embedding_parts=[layer_norm(config.layer_norm_epsilon, "embedding_norm")],
        layer_types={"full_attention": LayerType()},
        layers=[("full_attention", build_decoder(config, name)) for name in names],
        keeps=key_value_shapes(config.num_heads, config.hidden_dim // config.num_heads),
        final_norm=layer_norm(config.layer_norm_epsilon, "final_norm"),
        tie_word_embeddings=config.tie_word_embeddings,
    )


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    epsilon, size = config.layer_norm_epsilon, config.hidden_dim // config.num_heads
    self_attention = attention(
        query=[heads(config.num_heads, size, "query", use_bias=True)],
        key=[heads(config.num_heads, size, "key", use_bias=True)],
        value=[heads(config.num_heads, size, "value", use_bias=True)],
        output=keras.layers.Dense(config.hidden_dim, name="output"),
        product=AttentionDotProduct(slopes=alibi_slopes(config.num_heads), name="dot_product"),
    )
    plain = mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return pre_norm(name, lambda part: layer_norm(epsilon, part), self_attention, plain)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults, and what no key says."""
    own = {"layer_norm_epsilon": 1e-5, "seq_length": 2048, "tie_word_embeddings": True}
    fixed = {"activation": "gelu_approximate", "intermediate_dim": 4 * keys["hidden_size"]}
    return own | keys | fixed


def weights(config: Config) -> Rows:
    """Returns the table: how a tensor falls into its parts depends on the number of heads."""
    layer = "transformer.h.{}"
    return [
        ("transformer.word_embeddings.weight", "token_embedding/embeddings", "same"),
        *layer_norm_rows("transformer.word_embeddings_layernorm", "embedding_norm"),
        *layer_norm_rows(f"{layer}.input_layernorm", "decoder_{}/attention_norm"),
        *gpt_neox.layer_rows(layer, "self_attention", config.num_heads),
        *layer_norm_rows(f"{layer}.post_attention_layernorm", "decoder_{}/mlp_norm"),
        *layer_norm_rows("transformer.ln_f", "final_norm"),
        ("lm_head.weight", "head/kernel", "transpose"),
    ]


FAMILY = Family(
    model_type="bloom",
    models="BLOOM",
    architecture="BloomForCausalLM",
    config_class=Config,
    build=build,
    config_keys={
        "vocab_size": "vocabulary_size",
        "n_layer": "num_layers",
        "hidden_size": "hidden_dim",
        "n_head": "num_heads",
        "layer_norm_epsilon": "layer_norm_epsilon",
        "seq_length": "max_sequence_length",  # in some files; Transformers does not read it
        "tie_word_embeddings": "tie_word_embeddings",
    },
    config_aliases={
        "n_embed": "hidden_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    config_constants={
        "apply_residual_connection_post_layernorm": False,
        # What Megatron computed how; Transformers reads the last one only.
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "masked_softmax_fusion": True,
        "offset_alibi": 100,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "slow_but_exact": False,
    },
    complete_keys=complete_keys,
    weights=weights,
    base_prefix="transformer.",
    gguf_architecture="bloom",
    gguf_keys={
        "block_count": "n_layer",
        "context_length": "seq_length",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    gguf_ignored=["attention.head_count_kv", "feed_forward_length"],
)
