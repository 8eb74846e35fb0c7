"""What families with multi-head latent attention share: numbers, attention, keys, tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras

from functional_llm.backbones.family import (
    COMMON_KEYS,
    ModelConfig,
    RotaryConfig,
    check_given,
    dense_rows,
)
from functional_llm.backbones.stacks import build_of_types
from functional_llm.backbones.transforms import Rows, Transform, fused, heads_first, transposed
from functional_llm.blocks.attention import Part, PartFunction, heads
from functional_llm.blocks.language_model import Graph, LayerType
from functional_llm.blocks.latent_attention import (
    latent_attention,
    latent_scale,
    latent_shapes,
    on_last_channels,
    with_shared_key,
)
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import Rope
from functional_llm.blocks.rope_scaling import RopeScaling
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON
from functional_llm.layers.latent import LatentProduct

_EPSILON = 1e-6  # of the norms of latents, whatever that of the others is


@dataclass(frozen=True, kw_only=True)
class LatentSizes(ModelConfig):
    """The numbers of a model with latent attention, whether it has RoPE or not.

    Queries are made of a latent, too, if it has a `query_latent_dim`. A head's key has `key_dim`
    numbers of its own, and `rotary_dim` that all heads share.
    """

    num_query_heads: int
    query_latent_dim: int | None
    latent_dim: int
    key_dim: int
    rotary_dim: int
    value_dim: int
    attention_bias: bool


@dataclass(frozen=True, kw_only=True)
class LatentConfig(LatentSizes, RotaryConfig):
    """The numbers of a model with latent attention and RoPE."""


def build_attention(
    config: LatentSizes, rotate: Sequence[PartFunction], scaling: RopeScaling | None = None
) -> CompositeLayer:
    """Returns the attention of a decoder layer.

    Args:
        config: The numbers of the model.
        rotate: RoPE, or nothing.
        scaling: Of RoPE.
    """
    bias, size = config.attention_bias, config.key_dim + config.rotary_dim
    dense = partial(keras.layers.Dense, use_bias=bias)
    query: list[Part] = [
        heads(config.num_query_heads, size, "query"),
        *map(on_last_channels, rotate),
    ]
    if config.query_latent_dim is not None:
        down = dense(config.query_latent_dim, name="query_latent")
        query = [down, rms_norm(_EPSILON, "query_latent_norm"), *query]
    latent = with_shared_key(
        config.latent_dim,
        dense(config.latent_dim + config.rotary_dim, name="latent"),
        rms_norm(_EPSILON, "latent_norm"),
        rotate,
    )
    product = LatentProduct(
        config.num_query_heads,
        config.rotary_dim,
        config.value_dim,
        latent_scale(size, scaling),
        name="product",
    )
    return latent_attention(
        query, [latent], product, output=dense(config.hidden_dim, name="output")
    )


def build_around(config: LatentConfig, layers: Sequence[CompositeLayer], **others: Any) -> Graph:
    """Returns the graph of layers that keep latents.

    Args:
        config: The numbers of the model.
        layers: Its decoder layers.
        **others: Other arguments of `causal_lm`.
    """
    rope = Rope(config.rotary_dim, config.rope_max_wavelength, config.rope_scaling)
    kept = latent_shapes(config.latent_dim, config.rotary_dim)
    of_one_type = [("full_attention", layer) for layer in layers]
    return build_of_types(
        config, of_one_type, {"full_attention": (LayerType(rope), kept)}, **others
    )


CONFIG_KEYS: dict[str, str | type] = {
    **{key: x for key, x in COMMON_KEYS.items() if key not in ("num_key_value_heads", "head_dim")},
    "q_lora_rank": "query_latent_dim",
    "kv_lora_rank": "latent_dim",
    "qk_nope_head_dim": "key_dim",
    "qk_rope_head_dim": "rotary_dim",
    "v_head_dim": "value_dim",
    "attention_bias": "attention_bias",
    "num_key_value_heads": int,
    "qk_head_dim": int,
}
CONFIG_IGNORED = {"head_dim": "qk_rope_head_dim"}


# Without which Transformers makes no model.
NO_NULLS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out, and checks sizes."""
    keys = {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "attention_bias": False,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        **keys,
    }
    check_given(keys, NO_NULLS)
    num_heads, size = keys["num_attention_heads"], keys["qk_nope_head_dim"]
    size += keys["qk_rope_head_dim"]
    for key, expected in (("num_key_value_heads", num_heads), ("qk_head_dim", size)):
        if keys.get(key) not in (None, expected):
            raise ValueError(
                f"config.json: expected {key}={expected}, as the other sizes have it, received "
                f"{keys[key]}."
            )
    return keys


def written_keys(config: LatentSizes) -> JSON:
    """Returns what Transformers needs in a `config.json` beside `CONFIG_KEYS`."""
    return {"num_key_value_heads": config.num_query_heads}


def _by_heads(config: LatentSizes) -> Transform:
    """Returns the transform of a tensor with keys and values of each head."""
    return fused(config.num_query_heads)[0]


_SELF = "model.layers.{}.self_attn"
_OURS = "decoder_{}/attention"


def attention_rows(config: LatentSizes) -> Rows:
    """Returns the rows of the attention's tensors."""
    query = "q_proj" if config.query_latent_dim is None else "q_b_proj"
    return [
        *dense_rows(f"{_SELF}.q_a_proj", f"{_OURS}/query_latent"),
        (f"{_SELF}.q_a_layernorm.weight", f"{_OURS}/query_latent_norm/scale", "same"),
        (f"{_SELF}.{query}.weight", f"{_OURS}/query/kernel", "transpose"),
        *dense_rows(f"{_SELF}.kv_a_proj_with_mqa", f"{_OURS}/latent"),
        (f"{_SELF}.kv_a_layernorm.weight", f"{_OURS}/latent_norm/scale", "same"),
        (f"{_SELF}.kv_b_proj.weight", f"{_OURS}/product/key/kernel", _by_heads(config)),
        (f"{_SELF}.kv_b_proj.weight", f"{_OURS}/product/value/kernel", _by_heads(config)),
        *dense_rows(f"{_SELF}.o_proj", f"{_OURS}/output"),
    ]


# Key of a GGUF file -> that of a config.json.
GGUF_KEYS = {
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.key_length": "qk_head_dim",
    "attention.value_length": "v_head_dim",
    "rope.dimension_count": "qk_rope_head_dim",
}


def gguf_given(keys: JSON) -> JSON:
    """Returns the keys of a GGUF file with the sizes of the heads that are expanded.

    Newer files have those under names of their own, and what llama.cpp computes with, one key of
    latent size, under the usual ones. YaRN's number is a tenth of `mscale_all_dim`, which stands
    for `mscale`, too: llama.cpp turns by plain cosines.
    """
    own = {f"attention.{x}_length": f"attention.{x}_length_mla" for x in ("key", "value")}
    sizes = {key: keys[theirs] for key, theirs in own.items() if theirs in keys}
    others = {*own.values(), "attention.head_count_kv"}
    given = {key: x for key, x in keys.items() if key not in others} | sizes
    multiplier = "rope.scaling.yarn_log_multiplier"
    if multiplier in given:
        scale = round(10 * given[multiplier], 6)  # of a float32
        given |= {multiplier: scale, "rope.scaling.yarn_mscale": scale}
    return given


def gguf_rows(config: LatentSizes) -> Rows:
    """Returns the rows of keys and values in GGUF files: apart, or as in checkpoints."""
    keys, values = f"{_OURS}/product/key/kernel", f"{_OURS}/product/value/kernel"
    of_values = heads_first(config.num_query_heads, config.value_dim)
    return [
        ("blk.{}.attn_kv_b.weight", keys, _by_heads(config)),
        ("blk.{}.attn_kv_b.weight", values, _by_heads(config)),
        ("blk.{}.attn_k_b.weight", keys, heads_first(config.num_query_heads, config.key_dim)),
        ("blk.{}.attn_v_b.weight", values, transposed(of_values)),
    ]
