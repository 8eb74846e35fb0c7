"""BLOOM: ALiBi in the place of positions, and a LayerNorm right behind the embedding.

Biases everywhere but on the head, which is the embedding. Checkpoints hold a query, a key and a
value of each head in turn, in one tensor. References: [BLOOM](https://arxiv.org/abs/2211.05100),
[ALiBi](https://arxiv.org/abs/2108.12409).
"""

from dataclasses import dataclass

from functional_llm.backbones import gpt2, gpt_neox
from functional_llm.backbones.family import Family, Rows, layer_norm_rows
from functional_llm.backbones.keras_hub import gpts
from functional_llm.blocks.attention import alibi_slopes
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.norm import layer_norm
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(gpt2.Config):
    """The numbers of a BLOOM: those of a GPT-2."""


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    norm = layer_norm(config.layer_norm_epsilon, "embedding_norm")
    return gpt2.build_stack(config, norm, alibi_slopes(config.num_heads))


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults, and what no key says."""
    own = {"layer_norm_epsilon": 1e-5, "seq_length": 2048, "tie_word_embeddings": True}
    fixed = {"activation": "gelu_approximate", "intermediate_dim": 4 * keys["hidden_size"]}
    return own | keys | fixed


AROUND = [
    ("transformer.word_embeddings.weight", "token_embedding/embeddings", "same"),
    *layer_norm_rows("transformer.ln_f", "final_norm"),
    ("lm_head.weight", "head/kernel", "transpose"),
]


def weights(config: Config) -> Rows:
    """Returns the table: how a tensor falls into its parts depends on the number of heads."""
    layer = "transformer.h.{}"
    return [
        *AROUND,
        *layer_norm_rows("transformer.word_embeddings_layernorm", "embedding_norm"),
        *layer_norm_rows(f"{layer}.input_layernorm", "decoder_{}/attention_norm"),
        *gpt_neox.layer_rows(layer, "self_attention", config.num_heads),
        *layer_norm_rows(f"{layer}.post_attention_layernorm", "decoder_{}/mlp_norm"),
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
    keras_hub=gpts.BLOOM,
)
