"""Multi-head latent attention as parts in order.

Shapes: B batch, T tokens, D model, N heads, R latent, P rotated key that all heads share, H the
rest of a key, V value.
"""

import math
from collections.abc import Sequence

import keras
from keras import ops

from functional_llm.blocks.attention import (
    Inputs,
    Part,
    PartFunction,
    Shapes,
    apply_parts,
)
from functional_llm.blocks.rope_scaling import RopeScaling, YarnScaling
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Nested, Tensor
from functional_llm.layers.attention import KVCacheLookup
from functional_llm.layers.latent import LatentProduct


def latent_shapes(latent_dim: int, rotary_dim: int) -> Shapes:
    """Returns what a decoder layer with one `latent_attention` keeps of a token.

    One vector (R + P): the latent, and behind it the rotated key.
    """
    return {"attention": {"latent": (latent_dim + rotary_dim,)}}


def latent_attention(
    query: Sequence[Part],
    latent: Sequence[Part],
    product: LatentProduct,
    output: keras.layers.Layer,
) -> CompositeLayer:
    """Self-attention over the new tokens and those in the cache, which keeps latents.

    Args:
        query: Parts from (B, T, D) to (B, T, N, H + P).
        latent: Parts from (B, T, D) to (B, T, R + P).
        product: What attends.
        output: Layer from (B, T, N * V) to (B, T, D).

    Returns:
        Layer from `{"x": (B, T, D), "positions", "mask", "rotation", "cache"}` to
        `{"x": (B, T, D), "cache": {"latent"}}`.

    Reference:
        [DeepSeek-V2](https://arxiv.org/abs/2405.04434), section 2.1.
    """

    def body(inputs: Inputs) -> dict[str, Nested]:
        x = inputs["x"]
        q_BTNH = apply_parts(query, x, inputs)
        visible, cache = KVCacheLookup(name="kv_cache_lookup")(
            {
                "new": {"latent": apply_parts(latent, x, inputs)},
                "cache": inputs["cache"],
                "positions": inputs["positions"],
            }
        )
        attended = product({"query": q_BTNH, **visible, "mask": inputs["mask"]})
        merge = keras.layers.Reshape((-1, math.prod(attended.shape[2:])), name="merge_heads")
        return {"x": output(merge(attended)), "cache": cache}

    return CompositeLayer(body, name="attention", autocast=False)  # a cache keeps its dtypes


def with_shared_key(
    latent_dim: int, down: keras.layers.Layer, norm: Part, rotate: Sequence[Part]
) -> PartFunction:
    """Part from (B, T, D) to (B, T, R + P): a norm of the latent, and behind it the shared key.

    Args:
        latent_dim: R.
        down: Layer from (B, T, D) to (B, T, R + P).
        norm: Of the latent.
        rotate: Parts of the key, (B, T, 1, P).
    """

    def make(x: Tensor, inputs: Inputs) -> Tensor:
        x = down(x)
        key = apply_parts(rotate, ops.expand_dims(x[..., latent_dim:], 2), inputs)
        latent = apply_parts([norm], x[..., :latent_dim], inputs)
        return ops.concatenate([latent, ops.squeeze(key, axis=2)], axis=-1)

    return make


def on_last_channels(rotate: PartFunction) -> PartFunction:
    """Part that rotates as many last channels as the rotation has angles for, and keeps the rest.

    Args:
        rotate: `rotary()` or `rotary_pairs()`.
    """

    def rotate_some(x: Tensor, inputs: Inputs) -> Tensor:
        size = x.shape[-1] - inputs["rotation"]["cos"].shape[-1]
        return ops.concatenate([x[..., :size], rotate(x[..., size:], inputs)], axis=-1)

    return rotate_some


def latent_scale(size: int, scaling: RopeScaling | None) -> float:
    """Returns the factor on scores: YaRN with `mscale_all_dim` makes them larger.

    Args:
        size: H + P.
        scaling: Of RoPE.

    Reference:
        [DeepSeek-V2](https://github.com/deepseek-ai/DeepSeek-V2), `DeepseekV2Attention`.
    """
    factor = 1.0
    if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
        factor = scaling.magnitude_at(scaling.mscale_all_dim)
    return size**-0.5 * factor**2
