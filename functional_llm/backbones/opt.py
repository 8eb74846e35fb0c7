"""OPT: a GPT-2 with a ReLU MLP, whose learned positions begin in the third row of their table.

OPT 350M normalises behind each branch, and its embeddings are narrower than its layers. Reference:
[OPT](https://arxiv.org/abs/2205.01068).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras

from functional_llm.backbones import family
from functional_llm.backbones.family import Family, MultiHeadConfig, dense_rows, layer_norm_rows
from functional_llm.backbones.keras_hub import gpts
from functional_llm.backbones.stacks import build_alike
from functional_llm.blocks.attention import Part, apply_parts, attention, heads
from functional_llm.blocks.decoder import post_norm, pre_norm
from functional_llm.blocks.language_model import Graph, LayerType, learned_positions
from functional_llm.blocks.mlp import mlp
from functional_llm.blocks.norm import bare_layer_norm, layer_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON

_OFFSET = 2  # rows of the table of positions that no token has


@dataclass(frozen=True, kw_only=True)
class Config(MultiHeadConfig):
    """The numbers of an OPT, beside those of `MultiHeadConfig`."""

    embedding_dim: int
    use_bias: bool
    norms_have_weights: bool
    norm_before: bool
    layer_norm_epsilon: float = 1e-5  # no config.json says another


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    wide, narrow = config.hidden_dim, config.embedding_dim
    positions = learned_positions(config.max_sequence_length, wide, _OFFSET)
    begin: list[Part] = []
    end: list[Part] = []
    if config.norm_before:
        end.append(_norm(config)("final_norm"))
    if narrow != wide:
        begin.append(keras.layers.Dense(wide, use_bias=False, name="project_in"))
        end.append(keras.layers.Dense(narrow, use_bias=False, name="project_out"))
    return build_alike(
        config,
        build_decoder,
        lambda epsilon, name: lambda x, inputs: apply_parts(end, x, inputs),
        LayerType(),
        hidden_dim=narrow,
        embedding_parts=[*begin, positions],
    )


def _norm(config: Config) -> Callable[[str], Part]:
    epsilon, bare = config.layer_norm_epsilon, not config.norms_have_weights
    return lambda name: bare_layer_norm(epsilon) if bare else layer_norm(epsilon, name)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    size, bias = config.head_dim, config.use_bias
    self_attention = attention(
        query=[heads(config.num_heads, size, "query", bias)],
        key=[heads(config.num_heads, size, "key", bias)],
        value=[heads(config.num_heads, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
    )
    plain = mlp(config.intermediate_dim, config.hidden_dim, config.activation, bias)
    order = pre_norm if config.norm_before else post_norm
    return order(name, _norm(config), self_attention, plain)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: dict[str, Any] = {"max_position_embeddings": 2048, "activation_function": "relu"}
    own |= {"word_embed_proj_dim": keys["hidden_size"], "ffn_dim": 3072}
    own |= dict.fromkeys(["enable_bias", "do_layer_norm_before", _WEIGHTED], True)
    return own | {"tie_word_embeddings": True} | keys


_WEIGHTED = "layer_norm_elementwise_affine"
_MODEL, _LAYER = "model.decoder", "model.decoder.layers.{}"
WEIGHTS = [
    (f"{_MODEL}.embed_tokens.weight", "token_embedding/embeddings", "same"),
    (f"{_MODEL}.embed_positions.weight", "position_embedding/embeddings", "same"),
    (f"{_MODEL}.project_in.weight", "project_in/kernel", "transpose"),
    *layer_norm_rows(f"{_LAYER}.self_attn_layer_norm", "decoder_{}/attention_norm"),
    *family.attention_rows(f"{_LAYER}.self_attn", "out_proj"),
    *layer_norm_rows(f"{_LAYER}.final_layer_norm", "decoder_{}/mlp_norm"),
    *dense_rows(f"{_LAYER}.fc1", "decoder_{}/mlp/up"),
    *dense_rows(f"{_LAYER}.fc2", "decoder_{}/mlp/down"),
    *layer_norm_rows(f"{_MODEL}.final_layer_norm", "final_norm"),
    (f"{_MODEL}.project_out.weight", "project_out/kernel", "transpose"),
    ("lm_head.weight", "head/kernel", "transpose"),
]

FAMILY = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    models="OPT",
    config_class=Config,
    build=build,
    config_keys={
        "vocab_size": "vocabulary_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_dim",
        "ffn_dim": "intermediate_dim",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_sequence_length",
        "activation_function": "activation",
        "tie_word_embeddings": "tie_word_embeddings",
        "word_embed_proj_dim": "embedding_dim",
        "enable_bias": "use_bias",
        _WEIGHTED: "norms_have_weights",
        "do_layer_norm_before": "norm_before",
    },
    config_constants={"_remove_final_layer_norm": False},  # of files from before 2022-06
    complete_keys=complete_keys,
    weights=WEIGHTS,
    ignored=["*decoder.version"],
    keras_hub=gpts.OPT,
)
