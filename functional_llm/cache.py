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
