"""The arithmetic of sampling: thresholds without a sort, probabilities as integers, the draw.

Shape suffixes: B batch, V vocabulary, C blocks of the vocabulary, W tokens of a block. An axis
written 1 is kept for broadcasting.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_BLOCK = 256


def ordered_image(logits_BV: jax.Array) -> jax.Array:
    """Returns float32 numbers as uint32 in the same order."""
    # The sign bit of positive numbers is set; all bits of negative ones are flipped.
    logits_BV = jnp.where(logits_BV == 0, jnp.float32(0), logits_BV)  # -0.0 equals 0.0
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)


def largest_image(holds: Callable[[jax.Array], jax.Array], batch_size: int) -> jax.Array:
    """Returns each row's largest uint32 for which `holds`, which must be true up to some number."""

    # One reduction over the vocabulary a bit: to sort 49152 logits takes twenty times as long.
    def add_bit(step: jax.Array, image_B1: jax.Array) -> jax.Array:
        candidate_B1 = image_B1 | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(holds(candidate_B1), candidate_B1, image_B1)

    return jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((batch_size, 1), jnp.uint32))


def relative_probabilities(logits_BV: jax.Array) -> jax.Array:
    """Returns the probabilities divided by the largest one."""
    top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    # The top is 1 even if a tiny temperature made it infinite.
    return jnp.where(logits_BV == top_B1, jnp.float32(1), jnp.exp(logits_BV - top_B1))


def integer_probabilities(logits_BV: jax.Array) -> jax.Array:
    """Returns probabilities in units of 2^-31, as uint32; one below 2^-32 becomes 0."""
    # Sums of integers are exact, so that the last entry of a cumulative sum is the total.
    relative_BV = relative_probabilities(logits_BV)
    scale_B1 = jnp.float32(2**31) / jnp.sum(relative_BV, axis=-1, keepdims=True)
    return jnp.round(relative_BV * scale_B1).astype(jnp.uint32)


def draw(mass_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Draws a token for each row, with these probabilities."""
    # By inverting the cumulative sum, first for the block, then for the token within it. That takes
    # one random number a row; `jax.random.categorical` takes V of them, and ten times as long.
    padding = -mass_BV.shape[-1] % _BLOCK
    mass_BCW = jnp.pad(mass_BV, ((0, 0), (0, padding))).reshape(mass_BV.shape[0], -1, _BLOCK)
    # All of one type: with 64 bits switched on, JAX would widen sums of integers.
    end_BC = jnp.cumsum(jnp.sum(mass_BCW, axis=-1, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)

    def draw_below(key: jax.Array, total: jax.Array) -> jax.Array:
        return jax.random.randint(key, (), jnp.uint32(0), total, jnp.uint32)

    point_B1 = jax.vmap(draw_below)(keys_B, end_BC[:, -1])[:, None]
    block_B1 = jnp.sum(end_BC <= point_B1, axis=-1, keepdims=True, dtype=jnp.int32)
    mass_BW = jnp.take_along_axis(mass_BCW, block_B1[:, :, None], axis=1)[:, 0]
    sum_B1 = jnp.sum(mass_BW, -1, keepdims=True, dtype=jnp.uint32)
    start_B1 = jnp.take_along_axis(end_BC, block_B1, axis=1) - sum_B1
    end_BW = start_B1 + jnp.cumsum(mass_BW, axis=-1, dtype=jnp.uint32)
    token_B1 = jnp.sum(end_BW <= point_B1, axis=-1, keepdims=True, dtype=jnp.int32)
    # NaN logits have no sum to draw from; they must not give an id outside the vocabulary.
    last = jnp.int32(mass_BV.shape[-1] - 1)
    return jnp.clip(block_B1 * jnp.int32(_BLOCK) + token_B1, 0, last)[:, 0]
