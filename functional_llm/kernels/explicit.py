"""Attention as it is defined: all scores at once, in the operations of Keras, on any backend.

Shapes: B batch, T query tokens, S key slots, N query heads, K key/value heads, H head size of
queries and keys, V that of values, G = N / K queries per key head.
"""

from dataclasses import dataclass

import keras
from keras import ops

from functional_llm.kernels.mask import Mask, Tensor


@dataclass(frozen=True)
class Scoring:
    """How a score is made of a query and a key: known when a program is made.

    Args:
        scale: Factor on the product of query and key.
        soft_cap: Bounds that to (-soft_cap, soft_cap) by tanh; `None` for no bound.
    """

    scale: float
    soft_cap: float | None = None


def attend_explicitly(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKV: Tensor,
    mask: Mask,
    scoring: Scoring,
    sinks_N: Tensor | None = None,
    slopes_N: Tensor | None = None,
) -> Tensor:
    """Returns the mean of the values that each query sees, weighted by the softmax of its scores.

    This is the definition: every other kernel is compared with it, values and gradients. A query
    that sees no slot may get anything that is finite.

    Args:
        q_BTNH: Queries. Query head n uses key head n // G.
        k_BSKH: Keys.
        v_BSKV: Values.
        mask: Which slots each query sees.
        scoring: How scores are made.
        sinks_N: A score for each head that counts in the softmax, for nothing to be seen.
        slopes_N: Each head's factor on the distance to a slot, which is subtracted from the score.

    Returns:
        (B, T, N, V), in the dtype of the values.

    Reference:
        [Attention Is All You Need](https://arxiv.org/abs/1706.03762), section 3.2.1;
        [GQA](https://arxiv.org/abs/2305.13245); soft cap:
        [Gemma 2](https://arxiv.org/abs/2408.00118), section 2; sinks:
        [gpt-oss](https://arxiv.org/abs/2508.10925), section 2.3; slopes:
        [ALiBi](https://arxiv.org/abs/2108.12409), section 3.
    """
    kv_heads, head_dim = k_BSKH.shape[2:]
    groups = q_BTNH.shape[2] // kv_heads
    q_BTKGH = _reshape(q_BTNH, (kv_heads, groups, head_dim))
    # With keys and values first, and tokens before groups, `jnp.einsum` computes the result in
    # the order that is written. In other orders it transposes the result: all the scores here.
    scores_BKTGS = ops.einsum("bskh,btkgh->bktgs", k_BSKH, q_BTKGH * scoring.scale)
    # Softmax in float32 whatever the model's precision, as the reference implementations do.
    scores_BKTGS = ops.cast(scores_BKTGS, "float32")
    if scoring.soft_cap is not None:
        scores_BKTGS = ops.tanh(scores_BKTGS / scoring.soft_cap) * scoring.soft_cap
    if slopes_N is not None:
        slopes_K1G1 = ops.reshape(ops.cast(slopes_N, "float32"), (kv_heads, 1, groups, 1))
        scores_BKTGS = scores_BKTGS - ops.expand_dims(distances(mask), (1, 3)) * slopes_K1G1
    mask_B1T1S = ops.expand_dims(mask.visible(), (1, 3))
    # Not -inf: a padding token sees nothing, and its softmax would be NaN.
    scores_BKTGS = ops.where(mask_B1T1S, scores_BKTGS, -1e30)
    # The softmax is divided after the product with the values: the product is small, and the
    # gradient needs no more than the sums. The maximum only keeps the exponentials in range.
    highest_BKTG1 = ops.max(ops.stop_gradient(scores_BKTGS), axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks_K1G1 = ops.reshape(ops.cast(sinks_N, "float32"), (kv_heads, 1, groups, 1))
        highest_BKTG1 = ops.maximum(highest_BKTG1, ops.stop_gradient(sinks_K1G1))
    # The divisor is the sum, in float32, of the rounded weights, because those are multiplied
    # with the values. So the unrounded weights never go to memory.
    weights_BKTGS = ops.cast(ops.exp(scores_BKTGS - highest_BKTG1), v_BSKV.dtype)
    sums_BKTG1 = ops.sum(ops.cast(weights_BKTGS, "float32"), axis=-1, keepdims=True)
    if sinks_N is not None:
        sums_BKTG1 = sums_BKTG1 + ops.exp(sinks_K1G1 - highest_BKTG1)
    attended_BTKGV = ops.einsum("bskv,bktgs->btkgv", v_BSKV, weights_BKTGS)
    sums_BTKG1 = ops.transpose(sums_BKTG1, (0, 2, 1, 3, 4))
    attended_BTKGV = ops.cast(attended_BTKGV, "float32") / sums_BTKG1
    attended_BTKGV = ops.cast(attended_BTKGV, v_BSKV.dtype)
    return _reshape(attended_BTKGV, (kv_heads * groups, v_BSKV.shape[3]))


def distances(mask: Mask) -> Tensor:
    """Returns by how many positions each slot is behind the query, (B, T, S), in float32."""
    if mask.slot_positions is None:
        raise ValueError(
            "Slopes (ALiBi) need to know how far away each slot is. Expected a mask with "
            "`query_positions` and `slot_positions`, received booleans only."
        )
    query_BT1, slot_B1S = (
        ops.expand_dims(ops.cast(x, "float32"), axis)
        for x, axis in ((mask.query_positions, 2), (mask.slot_positions, 1))
    )
    return query_BT1 - slot_B1S


def _reshape(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Returns (B, T, *sizes)."""
    # Of a KerasTensor, `ops.reshape` cannot leave both B and T open.
    if isinstance(x, keras.KerasTensor):
        return keras.layers.Reshape((-1, *sizes), dtype=x.dtype)(x)
    return ops.reshape(x, (*ops.shape(x)[:2], *sizes))
