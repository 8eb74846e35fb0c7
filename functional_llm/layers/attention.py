"""The three layers that depend on whether an input is there. Everything else is stock Keras.

Shapes: B batch, T query tokens, S key slots, N query heads, K key/value heads, G = N / K queries
per key head, H head size.

A *slot* holds the key and value of one token, and carries that token's position as a tag: -1 if
the slot is empty. A query sees a slot by comparing positions, nothing else: so padding, ragged
batches, chunks and rings need no masks of their own. A padding token has position -1: it sees
nothing, and nobody sees it.
"""

from typing import Any

import keras
from keras import ops, tree

PACKAGE = "functional_llm"


@keras.saving.register_keras_serializable(PACKAGE)
class AttentionMask(keras.layers.Layer):
    """Which slots each query token sees: causal, within a window, within its own segment.

    Args:
        window: Number of positions a token sees, itself included; `None` for all before it.
    """

    def __init__(self, window: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window = window

    def call(self, inputs: dict[str, Any]) -> Any:
        """Compares positions.

        Args:
            inputs: `query_positions` (B, T) int32; `slot_positions` (B, S) int32, -1 where empty;
                `segment_ids` (B, T) int32 or `None`: packed examples do not see each other
                (only where the slots are the query tokens themselves).

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
        return mask_BTS

    def compute_output_spec(self, inputs: dict[str, Any]) -> keras.KerasTensor:
        batch, queries = inputs["query_positions"].shape
        return keras.KerasTensor((batch, queries, inputs["slot_positions"].shape[1]), dtype="bool")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "window": self.window}


@keras.saving.register_keras_serializable(PACKAGE)
class KVCacheLookup(keras.layers.Layer):
    """Joins what was computed for the new tokens with what the cache holds of earlier ones.

    The token at position p belongs into slot p modulo the number of slots. A cache with fewer
    slots than tokens is thereby a ring that keeps the latest ones. Padding is not stored.
    """

    def call(self, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Looks up and stores.

        Args:
            inputs: `new`: nested structure of (B, T, ...) tensors; `positions`: (B, T) int32
                positions of the new tokens, -1 for padding; `cache`: the same structure of
                (B, S, ...) tensors, or `None`.

        Returns:
            What the queries may look at, (B, S', ...), and the cache after the new tokens. Without
            a cache both are the new tokens (S' = T). With one new token both are the updated
            cache (S' = S). With several, the queries look at the old cache and the new tokens side
            by side (S' = S + T), for a ring may lose in this very call what the first of them
            still see.
        """
        new, cache = inputs["new"], inputs["cache"]
        if all(x is None for x in tree.flatten(cache)):
            return new, new
        positions_BT = inputs["positions"]
        if positions_BT.shape[1] == 1:
            updated = tree.map_structure(lambda n, c: _store_one(n, c, positions_BT), new, cache)
            return updated, updated
        visible = tree.map_structure(lambda n, c: ops.concatenate([c, n], axis=1), new, cache)
        updated = tree.map_structure(lambda n, c: store(n, c, positions_BT), new, cache)
        return visible, updated

    def compute_output_spec(self, inputs: dict[str, Any]) -> tuple[Any, Any]:
        new, cache = inputs["new"], inputs["cache"]
        if all(x is None for x in tree.flatten(cache)):
            cache = new
        return tree.map_structure(_unknown_slots, new), tree.map_structure(_same_spec, cache)


def _same_spec(x: Any) -> keras.KerasTensor:
    return keras.KerasTensor(x.shape, x.dtype)


def _unknown_slots(x: Any) -> keras.KerasTensor:
    return keras.KerasTensor((x.shape[0], None, *x.shape[2:]), x.dtype)


def _store_one(new: Any, cache: Any, positions_B1: Any) -> Any:
    """Writes one token a row in place; where it is padding, what was there is written back."""
    batch, slots = ops.shape(cache)[:2]
    position_B = positions_B1[:, 0]
    index_B2 = ops.stack([ops.arange(batch, dtype="int32"), position_B % slots], axis=1)
    old = ops.take_along_axis(
        cache, ops.reshape(index_B2[:, 1], (batch, 1) + (1,) * (cache.ndim - 2)), axis=1
    )
    keep = ops.reshape(position_B >= 0, (batch,) + (1,) * (cache.ndim - 1))
    value = ops.where(keep, ops.cast(new, cache.dtype), old)
    return ops.scatter_update(cache, index_B2, value[:, 0])


def store(new: Any, cache: Any, positions_BT: Any) -> Any:
    """Fills every slot with the last new token that belongs there, if any does.

    By gathering rather than scattering: two tokens of one call may belong into the same slot of
    a ring, and which write of a scatter comes last is not defined.

    Args:
        new: (B, T, ...).
        cache: (B, S, ...).
        positions_BT: Positions of the new tokens, -1 for padding.

    Returns:
        (B, S, ...), in the cache's dtype.
    """
    slots = ops.shape(cache)[1]
    latest_B1 = ops.max(positions_BT, axis=1, keepdims=True)
    stays_BT = ops.logical_and(positions_BT >= 0, positions_BT > latest_B1 - slots)
    slot_BT = ops.where(stays_BT, positions_BT % slots, -1)
    hits_BST = ops.expand_dims(slot_BT, 1) == ops.reshape(
        ops.arange(slots, dtype="int32"), (1, slots, 1)
    )
    trailing = (1,) * (cache.ndim - 2)
    source_BS = ops.reshape(ops.argmax(hits_BST, axis=2), (-1, slots, *trailing))
    filled_BS = ops.reshape(ops.any(hits_BST, axis=2), (-1, slots, *trailing))
    moved = ops.take_along_axis(ops.cast(new, cache.dtype), source_BS, axis=1)
    return ops.where(filled_BS, moved, cache)


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

    def call(self, inputs: dict[str, Any]) -> Any:
        """Attends.

        Args:
            inputs: `query` (B, T, N, H); `key` and `value` (B, S, K, H), query head n uses
                key head n // G; `mask` (B, T, S) boolean.

        Returns:
            (B, T, N, H).
        """
        q_BTNH, k_BSKH, v_BSKH = inputs["query"], inputs["key"], inputs["value"]
        kv_heads, head_dim = k_BSKH.shape[2:]
        groups = q_BTNH.shape[2] // kv_heads
        q_BTKGH = _reshape(q_BTNH, (kv_heads, groups, head_dim))
        scale = head_dim**-0.5 if self.scale is None else self.scale
        # Keys and values first: in the other order `jnp.einsum` makes the result turned round
        # and transposes it, all the scores here. So it would if groups came before tokens.
        scores_BKTGS = ops.einsum("bskh,btkgh->bktgs", k_BSKH, q_BTKGH * scale)
        # Softmax in float32 whatever the model's precision, as the reference implementations do.
        scores_BKTGS = ops.cast(scores_BKTGS, "float32")
        if self.soft_cap is not None:
            scores_BKTGS = ops.tanh(scores_BKTGS / self.soft_cap) * self.soft_cap
        mask_B1T1S = ops.expand_dims(inputs["mask"], (1, 3))
        # Finite, so that a padding token, which sees nothing, gives numbers and not NaN.
        scores_BKTGS = ops.where(mask_B1T1S, scores_BKTGS, -1e30)
        # Softmax, divided after the product: the sum over slots is all that the gradient needs,
        # and what is divided is small. The maximum only keeps the exponentials in range.
        highest_BKTG1 = ops.max(ops.stop_gradient(scores_BKTGS), axis=-1, keepdims=True)
        # Rounded first and summed up then, in float32: what is divided by is the sum of the very
        # weights that are multiplied with, and the unrounded ones never go to memory.
        weights_BKTGS = ops.cast(ops.exp(scores_BKTGS - highest_BKTG1), v_BSKH.dtype)
        sums_BKTG = ops.sum(ops.cast(weights_BKTGS, "float32"), axis=-1)
        attended_BTKGH = ops.einsum("bskh,bktgs->btkgh", v_BSKH, weights_BKTGS)
        sums_BTKG1 = ops.expand_dims(ops.transpose(sums_BKTG, (0, 2, 1, 3)), -1)
        attended_BTKGH = ops.cast(attended_BTKGH, "float32") / sums_BTKG1
        attended_BTKGH = ops.cast(attended_BTKGH, v_BSKH.dtype)
        return _reshape(attended_BTKGH, (kv_heads * groups, v_BSKH.shape[3]))

    def compute_output_spec(self, inputs: dict[str, Any]) -> keras.KerasTensor:
        shape = (*inputs["query"].shape[:3], inputs["value"].shape[3])
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self.scale, "soft_cap": self.soft_cap}


def _reshape(x: Any, sizes: tuple[int, ...]) -> Any:
    """Returns (B, T, *sizes). Symbolically `ops.reshape` cannot leave both B and T open."""
    if isinstance(x, keras.KerasTensor):
        return keras.layers.Reshape((-1, *sizes), dtype=x.dtype)(x)
    return ops.reshape(x, (*ops.shape(x)[:2], *sizes))
