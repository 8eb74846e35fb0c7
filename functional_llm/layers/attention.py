"""The three layers that depend on whether an input is given. All other layers are stock Keras.

Shapes: B batch, T query tokens, S key slots, N query heads, K key/value heads, G = N / K queries
per key head, H head size.

A *slot* holds the key and value of one token, and that token's position: -1 if the slot is empty.
Whether a query sees a slot depends on their positions (and segments) alone, so that padding, ragged
batches, chunks and rings need no masks of their own. A padding token has position -1: it sees
nothing, and no token sees it.
"""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops, tree

from functional_llm.graph.types import JSON, Nested, Tensor
from functional_llm.layers.cache import store_token, store_tokens

PACKAGE = "functional_llm"


@keras.saving.register_keras_serializable(PACKAGE)
class AttentionMask(keras.layers.Layer):
    """Which slots each query token sees: causal, within a window, within its own segment.

    Args:
        window: Number of positions a token sees, itself included; `None` for all up to itself.
    """

    def __init__(self, window: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window = window

    def call(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compares positions.

        Args:
            inputs: `query_positions` (B, T) int32; `slot_positions` (B, S) int32, -1 if empty;
                `segment_ids` (B, T) int32 or `None`: a token sees only its own segment. With
                segments, the slots must be the query tokens themselves. `mask` (B, T, S) boolean or
                `None`: a token sees no slot at which it is `False`.

        Returns:
            Boolean mask (B, T, S).
        """
        query_BT1 = ops.expand_dims(inputs["query_positions"], 2)
        slot_B1S = ops.expand_dims(inputs["slot_positions"], 1)
        mask_BTS = ops.logical_and(slot_B1S >= 0, slot_B1S <= query_BT1)
        if self.window is not None:
            mask_BTS = ops.logical_and(mask_BTS, query_BT1 - slot_B1S < self.window)
        segments_BT = inputs.get("segment_ids")
        if segments_BT is not None:
            same_BTT = ops.expand_dims(segments_BT, 2) == ops.expand_dims(segments_BT, 1)
            mask_BTS = ops.logical_and(mask_BTS, same_BTT)
        if inputs.get("mask") is not None:
            mask_BTS = ops.logical_and(mask_BTS, inputs["mask"])
        return mask_BTS

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> keras.KerasTensor:
        batch, queries = inputs["query_positions"].shape
        return keras.KerasTensor((batch, queries, inputs["slot_positions"].shape[1]), dtype="bool")

    def get_config(self) -> JSON:
        return {**super().get_config(), "window": self.window}


@keras.saving.register_keras_serializable(PACKAGE)
class KVCacheLookup(keras.layers.Layer):
    """Joins what was computed for the new tokens with what the cache holds of earlier ones.

    The token at position p belongs in slot p modulo the number of slots, so that a cache with fewer
    slots than tokens is a ring, which keeps the latest ones. Padding is not stored.
    """

    def call(self, inputs: Mapping[str, Nested]) -> tuple[Nested, Nested]:
        """Looks up and stores.

        Args:
            inputs: `new`: nested structure of (B, T, ...) tensors; `positions`: (B, T) int32
                positions of the new tokens, -1 for padding; `cache`: the same structure of
                (B, S, ...) tensors, or `None`.

        Returns:
            What the queries may look at, (B, S', ...), and the cache after the new tokens. Without
            a cache both are the new tokens (S' = T). With one new token both are the updated
            cache (S' = S). With several, the queries look at the old cache and the new tokens side
            by side (S' = S + T): storing the last of them in a ring may overwrite what the first
            of them still see.
        """
        return look_up(inputs["new"], inputs["cache"], inputs["positions"])

    def compute_output_spec(self, inputs: Mapping[str, Nested]) -> tuple[Nested, Nested]:
        new, cache = inputs["new"], inputs["cache"]
        if all(x is None for x in tree.flatten(cache)):
            cache = new
        return tree.map_structure(_unknown_slots, new), tree.map_structure(_same_spec, cache)


def look_up(new: Nested, cache: Nested, positions_BT: Tensor) -> tuple[Nested, Nested]:
    """Returns what queries may look at, and the cache with new tokens, as `KVCacheLookup`."""
    if all(x is None for x in tree.flatten(cache)):
        return new, new
    if positions_BT.shape[1] == 1:
        updated = tree.map_structure(lambda n, c: store_token(n, c, positions_BT), new, cache)
        return updated, updated
    visible = tree.map_structure(lambda n, c: ops.concatenate([c, n], axis=1), new, cache)
    updated = tree.map_structure(lambda n, c: store_tokens(n, c, positions_BT), new, cache)
    return visible, updated


def _same_spec(x: Tensor) -> keras.KerasTensor:
    return keras.KerasTensor(x.shape, x.dtype)


def _unknown_slots(x: Tensor) -> keras.KerasTensor:
    return keras.KerasTensor((x.shape[0], None, *x.shape[2:]), x.dtype)


@keras.saving.register_keras_serializable(PACKAGE)
class AttentionDotProduct(keras.layers.Layer):
    """Scaled dot-product attention over masked slots, grouped queries included.

    Args:
        scale: Factor on the scores. Defaults to 1 / sqrt(H).
        soft_cap: Bounds the scores to (-soft_cap, soft_cap) by tanh; `None` for no bound.

    Reference:
        [Attention Is All You Need](https://arxiv.org/abs/1706.03762), section 3.2.1;
        [GQA](https://arxiv.org/abs/2305.13245); soft cap:
        [Gemma 2](https://arxiv.org/abs/2408.00118), section 2.
    """

    def __init__(
        self, scale: float | None = None, soft_cap: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.scale = scale
        self.soft_cap = soft_cap

    def call(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Attends.

        Args:
            inputs: `query` (B, T, N, H); `key` and `value` (B, S, K, H), of which query head n uses
                head n // G; `mask` (B, T, S) boolean.

        Returns:
            (B, T, N, H).
        """
        q_BTNH, k_BSKH, v_BSKH = inputs["query"], inputs["key"], inputs["value"]
        kv_heads, head_dim = k_BSKH.shape[2:]
        groups = q_BTNH.shape[2] // kv_heads
        q_BTKGH = _reshape(q_BTNH, (kv_heads, groups, head_dim))
        scale = head_dim**-0.5 if self.scale is None else self.scale
        # With keys and values first, and tokens before groups, `jnp.einsum` computes the result in
        # the order that is written. In other orders it transposes the result: all the scores here.
        scores_BKTGS = ops.einsum("bskh,btkgh->bktgs", k_BSKH, q_BTKGH * scale)
        # Softmax in float32 whatever the model's precision, as the reference implementations do.
        scores_BKTGS = ops.cast(scores_BKTGS, "float32")
        if self.soft_cap is not None:
            scores_BKTGS = ops.tanh(scores_BKTGS / self.soft_cap) * self.soft_cap
        mask_B1T1S = ops.expand_dims(inputs["mask"], (1, 3))
        # Not -inf: a padding token sees nothing, and its softmax would be NaN.
        scores_BKTGS = ops.where(mask_B1T1S, scores_BKTGS, -1e30)
        # The softmax is divided after the product with the values: the product is small, and the
        # gradient needs no more than the sums. The maximum only keeps the exponentials in range.
        highest_BKTG1 = ops.max(ops.stop_gradient(scores_BKTGS), axis=-1, keepdims=True)
        # The divisor is the sum, in float32, of the rounded weights, because those are multiplied
        # with the values. So the unrounded weights never go to memory.
        weights_BKTGS = ops.cast(ops.exp(scores_BKTGS - highest_BKTG1), v_BSKH.dtype)
        sums_BKTG = ops.sum(ops.cast(weights_BKTGS, "float32"), axis=-1)
        attended_BTKGH = ops.einsum("bskh,bktgs->btkgh", v_BSKH, weights_BKTGS)
        sums_BTKG1 = ops.expand_dims(ops.transpose(sums_BKTG, (0, 2, 1, 3)), -1)
        attended_BTKGH = ops.cast(attended_BTKGH, "float32") / sums_BTKG1
        attended_BTKGH = ops.cast(attended_BTKGH, v_BSKH.dtype)
        return _reshape(attended_BTKGH, (kv_heads * groups, v_BSKH.shape[3]))

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> keras.KerasTensor:
        shape = (*inputs["query"].shape[:3], inputs["value"].shape[3])
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self) -> JSON:
        return {**super().get_config(), "scale": self.scale, "soft_cap": self.soft_cap}


def _reshape(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Returns (B, T, *sizes)."""
    # Of a KerasTensor, `ops.reshape` cannot leave both B and T open.
    if isinstance(x, keras.KerasTensor):
        return keras.layers.Reshape((-1, *sizes), dtype=x.dtype)(x)
    return ops.reshape(x, (*ops.shape(x)[:2], *sizes))
