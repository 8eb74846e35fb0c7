"""Caches: plain nested dicts of arrays that a model takes and returns.

Shapes: B batch, S slots.
"""

from typing import Any

import keras
from keras import ops, tree


def make_cache(model: keras.Model, batch_size: int, num_slots: int) -> Any:
    """Returns an empty cache for a model.

    Args:
        model: A Backbone, or any functional model with the input "cache".
        batch_size: B.
        num_slots: S: how many positions fit, unless a layer keeps a fixed number of slots.

    Returns:
        Nested dict of (B, S, ...) arrays: zeros, and -1 for the positions in the slots.
    """

    def empty(spec: keras.KerasTensor) -> Any:
        shape = (batch_size, spec.shape[1] or num_slots, *spec.shape[2:])
        is_tag = keras.backend.is_int_dtype(spec.dtype)
        return ops.full(shape, -1 if is_tag else 0, dtype=spec.dtype)

    return tree.map_structure(empty, model.input["cache"])


def truncate_cache(cache: Any, length: int) -> Any:
    """Returns the cache without the tokens at positions from `length` on."""
    tags = cache["positions"]
    return {**cache, "positions": ops.where(tags < length, tags, -1)}


def grow_cache(cache: Any, num_slots: int) -> Any:
    """Returns the cache with at least so many slots; the new ones are empty."""

    def grow(x: Any, fill: int) -> Any:
        missing = max(0, num_slots - x.shape[1])
        widths = [(0, missing) if axis == 1 else (0, 0) for axis in range(len(x.shape))]
        return ops.pad(x, widths, constant_values=fill) if missing else x

    grown = tree.map_structure(lambda x: grow(x, 0), cache)
    return {**grown, "positions": grow(cache["positions"], -1)}
