"""The decoder layer, and what stands around a stack of them.

Shapes: B batch, T tokens, S slots, D model, K key/value heads, H head size.
"""

from collections.abc import Sequence
from typing import Any

import keras

from functional_llm.blocks.attention import Part, apply_parts
from functional_llm.composite import CompositeLayer
from functional_llm.layers import AttentionMask, KVCacheLookup


def decoder(name: str, branches: Sequence[Sequence[Part]]) -> CompositeLayer:
    """Residual branches in order: `x = x + branch(x)` for each.

    A branch is a list of parts, such as `[rms_norm(...), attention(...)]`; a part that is a
    CompositeLayer with a cache receives the block's inputs, any other only `x`.

    Args:
        name: Name of the layer.
        branches: Lists of parts.

    Returns:
        Layer from `{"x", "positions", "mask", "rotation", "cache"}` to `{"x", "cache"}`.
    """

    def body(inputs: dict[str, Any]) -> dict[str, Any]:
        x, caches = inputs["x"], {}
        for branch in branches:
            y = x
            for part in branch:
                if isinstance(part, CompositeLayer) and part.name in inputs["cache"]:
                    result = part({**inputs, "x": y, "cache": inputs["cache"][part.name]})
                    y, caches[part.name] = result["x"], result["cache"]
                else:
                    y = apply_parts([part], y, inputs)
            x = x + y
        return {"x": x, "cache": caches}

    return CompositeLayer(body, name=name)


def token_inputs(caches: dict[str, Any]) -> dict[str, Any]:
    """Returns the symbolic inputs of a language model.

    Args:
        caches: Layer name -> nested structure of the shapes a layer keeps per batch and slot.

    Returns:
        `token_ids` and `positions` (B, T) int32; `segment_ids` (B, T) int32, optional; `cache`,
        optional: `positions` (B, S) int32, the position of the token in each slot, and what each
        layer keeps, (B, S, ...).
    """

    def make(name: str, shape: tuple[int, ...], dtype: str | None = None, **kwargs: Any) -> Any:
        return keras.Input((None, *shape), dtype=dtype, name=name, **kwargs)

    def leaves(shapes: Any, name: str) -> Any:
        if isinstance(shapes, dict):
            return {key: leaves(value, f"{name}_{key}") for key, value in shapes.items()}
        return make(name, shapes, dtype=keras.config.dtype_policy().compute_dtype, optional=True)

    cache = {"positions": make("cache_positions", (), "int32", optional=True)}
    return {
        "token_ids": make("token_ids", (), "int32"),
        "positions": make("positions", (), "int32"),
        "segment_ids": make("segment_ids", (), "int32", optional=True),
        "cache": {**cache, **leaves(caches, "cache")},
    }


def attention_mask(inputs: dict[str, Any], window: int | None = None) -> tuple[Any, Any]:
    """Returns the mask (B, T, S) of the inputs, and the cache's positions after them (B, S)."""
    slot_positions, kept = KVCacheLookup(name="position_lookup")(
        {
            "new": inputs["positions"],
            "cache": inputs["cache"]["positions"],
            "positions": inputs["positions"],
        }
    )
    mask = AttentionMask(window, name="attention_mask")(
        {
            "query_positions": inputs["positions"],
            "slot_positions": slot_positions,
            "segment_ids": inputs["segment_ids"],
        }
    )
    return mask, kept
