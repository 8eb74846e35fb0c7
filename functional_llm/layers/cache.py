"""Caches: plain nested dicts of arrays that a model takes and returns.

A cache holds a group for each type of layers: `positions`, which token's position each slot holds,
and what each layer keeps. A group whose layers see a window is a ring of that many slots.

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
        num_slots: S: how many positions fit. Layers that see a window get no more slots than that.

    Returns:
        Nested dict of (B, S, ...) arrays: zeros, and -1 for the positions in the slots.
    """

    def empty(spec: keras.KerasTensor) -> Any:
        slots = min(num_slots, spec.shape[1] or num_slots)
        is_tag = keras.backend.is_int_dtype(spec.dtype)
        return ops.full((batch_size, slots, *spec.shape[2:]), -1 if is_tag else 0, dtype=spec.dtype)

    return tree.map_structure(empty, model.input["cache"])


def num_slots(cache: Any) -> int:
    """Returns S of the largest group: how many positions fit."""
    return max(group["positions"].shape[1] for group in cache.values())


def fitting_slots(model: keras.Model, num_slots: int) -> int:
    """Returns S of the largest group of a cache made for `num_slots`: less if all are rings."""
    groups = model.input["cache"].values()
    return max(min(num_slots, group["positions"].shape[1] or num_slots) for group in groups)


def latest_position(cache: Any) -> Any:
    """Returns the position of each row's last token, (B,); -1 where there is none."""
    # Any group knows: the last token is in every ring.
    return ops.max(next(iter(cache.values()))["positions"], axis=1)


def holds(cache: Any, length: int) -> bool:
    """Whether the cache, cut after `length` tokens, holds all that the next token may see.

    A full cache always does. A ring has lost what was overwritten since.
    """
    for group in cache.values():
        tags = group["positions"]
        needed = min(length, tags.shape[1])
        found = ops.sum((tags >= length - needed) & (tags < length), axis=1)
        if int(ops.min(found)) < needed:
            return False
    return True


def truncate_cache(cache: Any, length: int) -> Any:
    """Returns the cache without the tokens at positions from `length` on."""

    def truncate(group: Any) -> Any:
        tags = group["positions"]
        return {**group, "positions": ops.where(tags < length, tags, -1)}

    return {kind: truncate(group) for kind, group in cache.items()}


def grow_cache(model: keras.Model, cache: Any, num_slots: int) -> Any:
    """Returns the cache with at least so many slots; the new ones are empty.

    Args:
        model: The model that the cache belongs to.
        cache: In which no token has overwritten another, except in rings that are as large as
            they get: a slot's token stays in its slot.
        num_slots: As for `make_cache`.
    """

    def grow(x: Any, spec: keras.KerasTensor) -> Any:
        missing = max(0, min(num_slots, spec.shape[1] or num_slots) - x.shape[1])
        widths = [(0, missing) if axis == 1 else (0, 0) for axis in range(len(x.shape))]
        fill = -1 if keras.backend.is_int_dtype(spec.dtype) else 0
        return ops.pad(x, widths, constant_values=fill) if missing else x

    return tree.map_structure(grow, cache, model.input["cache"])
