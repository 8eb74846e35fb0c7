"""LFM2, LFM2.5: short convolutions between two gates in most layers, attention in the others.

Queries and keys of each head have a norm. The width of the MLPs may be given by a rule, as in the
first Llama. References: [LFM2](https://arxiv.org/abs/2511.23404).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import family, lfm2_keys, qwen3
from functional_llm.backbones.family import DecoderConfig, Family
from functional_llm.backbones.stacks import build_of_types, with_rope
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.attention import key_value_shapes
from functional_llm.blocks.convolution import convolution_shapes, gated_convolution
from functional_llm.blocks.decoder import NamedPart, pre_norm
from functional_llm.blocks.language_model import Graph, LayerType, StateType
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of an LFM2, beside those of `DecoderConfig`."""

    layer_types: tuple[str, ...]
    convolution_width: int
    convolution_bias: bool


def build(config: Config, mlps: Sequence[NamedPart] | None = None) -> Graph:
    """Returns the inputs and outputs of the graph.

    Args:
        config: The numbers of the model.
        mlps: What is in the place of the MLP of each layer; `None` for gated ones.
    """
    kinds, width = config.layer_types, config.intermediate_dim
    mlps = mlps or [gated_mlp(width, config.hidden_dim, config.activation) for _ in kinds]
    norm = partial(rms_norm, config.layer_norm_epsilon)
    layers = []
    for i, kind in enumerate(kinds):
        convolves = kind == "conv"
        mixer = convolution(config) if convolves else qwen3.self_attention(config, bias=False)
        layers.append(pre_norm(f"decoder_{i}", norm, mixer, mlps[i]))
    return build_stack(config, layers, {"full_attention": with_rope(config)})


def convolution(config: Config) -> CompositeLayer:
    """Returns the convolution of this family and its kin."""
    return gated_convolution(config.convolution_width, config.hidden_dim, config.convolution_bias)


def build_stack(
    config: Config, layers: Sequence[CompositeLayer], types: Mapping[str, LayerType]
) -> Graph:
    """Returns the graph of layers that keep a state where their type is "conv".

    Args:
        config: The numbers of the model.
        layers: Its decoder layers.
        types: The types of the others.
    """
    state = convolution_shapes(config.convolution_width, config.hidden_dim)
    attends = key_value_shapes(config.num_key_value_heads, config.head_dim)
    attending = {kind: (layer_type, attends) for kind, layer_type in types.items()}
    named = list(zip(config.layer_types, layers, strict=True))
    return build_of_types(config, named, {"conv": (StateType(), state), **attending})


def written_keys(config: Config) -> JSON:
    """Returns the rule for the width of MLPs: that it is as given."""
    rule = {"block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0}
    return {"block_auto_adjust_ff_dim": False, **rule}


_LAYER = "model.layers.{}"
_NORM, _CONV, _ATTENTION = (f"{_LAYER}.{x}" for x in ("operator_norm.weight", "conv", "self_attn"))
_MLP = {"w1": "gate", "w3": "up", "w2": "down"}
WEIGHTS: Rows = [
    ("model.embed_tokens.weight", "token_embedding/embeddings", "same"),
    (_NORM, "decoder_{}/attention_norm/scale", "same"),
    (_NORM, "decoder_{}/convolution_norm/scale", "same"),
    *family.dense_rows(f"{_CONV}.in_proj", "decoder_{}/convolution/input"),
    (f"{_CONV}.conv.weight", "decoder_{}/convolution/convolution/kernel", "depthwise"),
    (f"{_CONV}.conv.bias", "decoder_{}/convolution/convolution/bias", "same"),
    *family.dense_rows(f"{_CONV}.out_proj", "decoder_{}/convolution/output"),
    *family.attention_rows(_ATTENTION, "out_proj"),
    (f"{_ATTENTION}.q_layernorm.weight", "decoder_{}/attention/query_norm/scale", "same"),
    (f"{_ATTENTION}.k_layernorm.weight", "decoder_{}/attention/key_norm/scale", "same"),
    (f"{_LAYER}.ffn_norm.weight", "decoder_{}/mlp_norm/scale", "same"),
    *family.all_dense_rows(f"{_LAYER}.feed_forward", "decoder_{}/mlp", _MLP),
    ("model.embedding_norm.weight", "final_norm/scale", "same"),
    ("lm_head.weight", "head/kernel", "transpose"),
]


def gguf_rows(config: Config) -> Rows:
    """Returns the kernels of convolutions, which llama.cpp's files hold as matrices."""
    return [(source, target, "transpose") for source, target, how in WEIGHTS if how == "depthwise"]


FAMILY = Family(
    model_type="lfm2",
    architecture="Lfm2ForCausalLM",
    models="LFM2 350M–2.6B, LFM2.5",
    config_class=Config,
    build=build,
    config_keys=lfm2_keys.CONFIG_KEYS,
    config_aliases={"tie_embedding": "tie_word_embeddings"},
    config_ignored=lfm2_keys.IGNORED,
    config_constants={"hidden_act": "silu", "block_use_swiglu": True, "use_pos_enc": True},
    layer_types=("full_attention", "conv"),
    complete_keys=lfm2_keys.complete_keys,
    written_keys=written_keys,
    weights=WEIGHTS,
    ignored=family.ROPE_BUFFERS,
    gguf_architecture="lfm2",
    gguf_keys={
        "attention.layer_norm_rms_epsilon": "norm_eps",
        "shortconv.l_cache": "conv_L_cache",
    },
    gguf_defaults=lambda keys: {"block_auto_adjust_ff_dim": False},
    gguf_rows=gguf_rows,
)
