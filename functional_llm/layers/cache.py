"""Caches: plain nested dicts of arrays that a model takes and returns.

A cache holds a group for each type of layers: `positions`, the position of the token in each slot
(-1 if the slot is empty), and what each layer keeps. A group whose layers see a window is a ring
of that many slots. The token at position p belongs in slot p modulo the number of slots.

Shapes: B batch, T new tokens, S slots.
"""

import math
from typing import TypeAlias

import jax
import keras
import numpy as np
from keras import ops, tree

from functional_llm.graph.types import Nested, Tensor

Group: TypeAlias = dict[str, Nested]  # "positions", and the name of each layer -> what it keeps
Cache: TypeAlias = dict[str, Group]  # the name of a type of layers -> its group


def make_cache(model: keras.Model, batch_size: int, num_slots: int) -> Cache:
    """Returns an empty cache for a model.

    Args:
        model: A Backbone, or any functional model with the input "cache".
        batch_size: B.
        num_slots: S: how many positions fit. Layers that see a window get no more slots than that.

    Returns:
        Nested dict of (B, S, ...) arrays: -1 for the positions, zeros for all else.
    """

    def make(spec: keras.KerasTensor) -> Tensor:
        slots = min(num_slots, spec.shape[1] or num_slots)
        return ops.full((batch_size, slots, *spec.shape[2:]), _empty(spec), dtype=spec.dtype)

    return tree.map_structure(make, model.input["cache"])


def token_sizes(model: keras.Model, tokens: int) -> int:
    """Returns the bytes that a cache takes for so many tokens of one row, windows considered."""
    total = 0
    for spec in tree.flatten(model.input["cache"]):
        slots = min(tokens, spec.shape[1] or tokens)
        itemsize = keras.backend.standardize_dtype(spec.dtype)
        total += slots * math.prod(spec.shape[2:]) * np.dtype(itemsize).itemsize
    return total


def fill_cache(model: keras.Model, new: Cache, positions_BT: Tensor, num_slots: int) -> Cache:
    """Returns a cache with what a model, called without one, returned of its tokens to be kept.

    Args:
        model: As for `make_cache`.
        new: The model's output "cache".
        positions_BT: Positions of the tokens, -1 for padding.
        num_slots: As for `make_cache`.
    """
    empty = make_cache(model, positions_BT.shape[0], num_slots)
    store = jax.jit(store_tokens)  # traced once for all layers
    return tree.map_structure(lambda x, slots: store(x, slots, positions_BT), new, empty)


def num_slots(cache: Cache) -> int:
    """Returns S of the largest group: how many positions fit."""
    return max(group["positions"].shape[1] for group in cache.values())


def capped_num_slots(model: keras.Model, num_slots: int) -> int:
    """Returns S of the largest group that `make_cache` makes: fewer if all groups are rings."""
    groups = model.input["cache"].values()
    return max(min(num_slots, group["positions"].shape[1] or num_slots) for group in groups)


def latest_position(cache: Cache) -> Tensor:
    """Returns the position of each row's last token, (B,); -1 where there is none."""
    # Any group knows: the last token is in every ring.
    return ops.max(next(iter(cache.values()))["positions"], axis=1)


def can_truncate(cache: Cache, length: int) -> bool:
    """Whether the cache, truncated to `length` tokens, holds all that the next token may see.

    A group with a slot for every token always does. A ring has lost what was overwritten since.
    """
    for group in cache.values():
        positions_BS = group["positions"]
        needed = min(length, positions_BS.shape[1])
        is_needed_BS = (positions_BS >= length - needed) & (positions_BS < length)
        if int(ops.min(ops.sum(is_needed_BS, axis=1))) < needed:
            return False
    return True


def truncate_cache(cache: Cache, length: int) -> Cache:
    """Returns the cache without the tokens at positions from `length` on."""

    def truncate(group: Group) -> Group:
        positions_BS = group["positions"]
        return {**group, "positions": ops.where(positions_BS < length, positions_BS, -1)}

    return {kind: truncate(group) for kind, group in cache.items()}


def grow_cache(model: keras.Model, cache: Cache, num_slots: int) -> Cache:
    """Returns the cache with at least so many slots; the new ones are empty.

    Args:
        model: The model that the cache belongs to.
        cache: One in which each token's position is its slot. Only rings that cannot grow any
            further may have overwritten tokens.
        num_slots: As for `make_cache`.
    """

    def grow(x: Tensor, spec: keras.KerasTensor) -> Tensor:
        missing = max(0, min(num_slots, spec.shape[1] or num_slots) - x.shape[1])
        widths = [(0, missing) if axis == 1 else (0, 0) for axis in range(len(x.shape))]
        return ops.pad(x, widths, constant_values=_empty(spec)) if missing else x

    return tree.map_structure(grow, cache, model.input["cache"])


def _empty(spec: keras.KerasTensor) -> int:
    """What an empty slot holds: integers are positions."""
    return -1 if keras.backend.is_int_dtype(spec.dtype) else 0


def store_token(new: Tensor, cache: Tensor, positions_B1: Tensor) -> Tensor:
    """Stores one new token a row, in place; padding leaves its slot as it was.

    Args:
        new: (B, 1, ...).
        cache: (B, S, ...).
        positions_B1: Positions of the new tokens, -1 for padding.

    Returns:
        (B, S, ...), in the cache's dtype.
    """
    rows, slots = ops.shape(cache)[:2]
    position_B = positions_B1[:, 0]
    # There is no slot of this number: JAX drops what is written there.
    slot_B = ops.where(position_B >= 0, position_B % slots, slots)
    row_B = ops.arange(rows, dtype="int32")
    new_B = ops.cast(new, cache.dtype)[:, 0]
    return (
        ops.convert_to_tensor(cache)
        .at[row_B, slot_B]
        .set(new_B, mode="drop", unique_indices=True, indices_are_sorted=True)
    )


def store_tokens(new: Tensor, cache: Tensor, positions_BT: Tensor) -> Tensor:
    """Stores new tokens: each slot gets the last of those that belong in it, if there is one.

    Args:
        new: (B, T, ...).
        cache: (B, S, ...).
        positions_BT: Positions of the new tokens, -1 for padding.

    Returns:
        (B, S, ...), in the cache's dtype.
    """
    # By gathering and not by scattering: two tokens of one call may belong in the same slot of a
    # ring, and which write of a scatter comes last is not defined.
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
