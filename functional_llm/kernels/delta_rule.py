"""The gated delta rule: one definition as a loop-free product, and in chunks, which costs less.

A state is a matrix from keys to values. Each token first lets it decay, then corrects what it
returns for the token's key, then reads it by the token's query:

    state = decay * state
    state = state + key (rate * (value - key state))
    x = query state

All channels of a key decay alike, as in Gated Delta Networks, or each by itself, as in Kimi Delta
Attention. A chunk of tokens is a few matrix products and the solution of one triangular system;
`decayed_products` has what decays between its tokens.

Shapes: B batch, T tokens, K key heads, G value heads a key head, H size of keys, V of values; C
tokens of a chunk, I and J two of them; n chunks. L is 1 where all channels decay alike, else H.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from keras import ops

from functional_llm.kernels.decayed_products import Products, by_halves, by_pairs
from functional_llm.kernels.inverse import inverse_of_unit_lower

# Of 16 heads of 128 x 128 and 512 tokens on two CPU cores: see benchmarks/LOG.md.
CHUNK = 32
_SMALLEST = 8  # which `inverse_of_unit_lower` begins with


@dataclass(frozen=True)
class DeltaInputs:
    """What the rule takes, all in float32. `[...]` are axes that the tensors share.

    Args:
        query: [..., K, 1, C, H]
        key: [..., K, 1, C, H]
        value: [..., K, G, C, V]
        decay: [..., K, G, C, L], the logarithm, of at most 0.
        rate: [..., K, G, C], from 0 to 1.
        text: [..., 1, 1, C] integers: tokens of one text follow each other, and texts are apart.
            `None` if there is one only.
        text_before: [..., 1, 1, 1], the text that the state before is of.
    """

    query: Any
    key: Any
    value: Any
    decay: Any
    rate: Any
    text: Any = None
    text_before: Any = None


@dataclass(frozen=True)
class _Chunk:
    """What a chunk does to any state: see `_apply`."""

    scores: Any  # of queries and keys [..., I, J]
    query: Any
    key: Any
    decay: Any  # of the state [..., L, 1]


def delta_rule(inputs: DeltaInputs, state: Any) -> tuple[Any, Any]:
    """The definition: all tokens as one chunk, without a loop, in `keras.ops`.

    Args:
        inputs: Of all tokens.
        state: [..., K, G, H, V].

    Returns:
        x [..., K, G, C, V], and the state after the last token.
    """
    chunk, system, right = _prepare(inputs, by_pairs)
    places = ops.cumsum(ops.ones_like(inputs.rate), axis=-1)
    is_one = ops.equal(ops.expand_dims(places, -1), ops.expand_dims(places, -2))
    solved = ops.solve_triangular(system + ops.cast(is_one, system.dtype), right, lower=True)
    return _apply(chunk, solved, state)


def _prepare(
    inputs: DeltaInputs, products: Callable[[Any, Any, Any], Products]
) -> tuple[_Chunk, Any, Any]:
    """Returns what a chunk does, and the system and right sides that give its corrections."""
    places = ops.cumsum(ops.ones_like(inputs.rate), axis=-1)  # also of an unknown number of tokens
    later, earlier = ops.expand_dims(places, -1), ops.expand_dims(places, -2)
    is_seen, is_before = later >= earlier, later > earlier
    decayed = products(inputs.query, inputs.key, inputs.decay)
    since, until = decayed.since, decayed.until
    if inputs.text is not None:
        text_I, text_J = ops.expand_dims(inputs.text, -1), ops.expand_dims(inputs.text, -2)
        is_seen = ops.logical_and(is_seen, text_I == text_J)
        is_before = ops.logical_and(is_before, text_I == text_J)
        since = ops.where(text_I == ops.expand_dims(inputs.text_before, -1), since, -jnp.inf)
        until = ops.where(text_I == text_I[..., -1:, :], until, -jnp.inf)
    since, until = ops.exp(since), ops.exp(until)
    rate = ops.expand_dims(inputs.rate, -1)
    right = ops.concatenate([inputs.value * rate, inputs.key * (since * rate)], axis=-1)
    chunk = _Chunk(
        scores=ops.where(is_seen, decayed.scores, 0.0),
        query=inputs.query * since,
        key=inputs.key * until,
        decay=ops.swapaxes(since[..., -1:, :], -1, -2),
    )
    return chunk, ops.where(is_before, decayed.likeness * rate, 0.0), right


def _apply(chunk: _Chunk, solved: Any, state: Any) -> tuple[Any, Any]:
    """Returns what a chunk reads, and the state behind it."""
    size = state.shape[-1]
    correction = solved[..., :size] - ops.matmul(solved[..., size:], state)
    x = ops.matmul(chunk.query, state) + ops.matmul(chunk.scores, correction)
    new = ops.matmul(ops.swapaxes(chunk.key, -1, -2), correction)
    return x, state * chunk.decay + new


def delta_rule_in_chunks(inputs: DeltaInputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by chunks: what each does to a state at once for all, then one after another.

    Args:
        inputs: Of all tokens, of which there may be any number from 1 on.
        state: (B, K, G, H, V).

    Returns:
        x (B, K, G, T, V), and the state after the last token.
    """
    length = inputs.rate.shape[-1]
    if length == 1:
        return _step(inputs, state)
    size = _SMALLEST
    while size < min(length, CHUNK):
        size *= 2

    def cut(x: jax.Array | None, axis: int, mode: str = "constant") -> jax.Array | None:
        """Returns n chunks (n, ...), padded by what moves no state."""
        if x is None:
            return None
        axis += x.ndim
        widths = [(0, -length % size if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths, mode=mode)
        shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    text = cut(inputs.text, -1, "edge")
    before = inputs.text_before
    if text is not None:
        before = jnp.concatenate([before[None], text[:-1, ..., -1:]])
    parts = DeltaInputs(
        query=cut(inputs.query, -2),
        key=cut(inputs.key, -2),
        value=cut(inputs.value, -2),
        decay=cut(inputs.decay, -2),
        rate=cut(inputs.rate, -1),
        text=text,
        text_before=before,
    )
    # Products by halves cost more where one decay belongs to all channels.
    chunks, system, right = _prepare(parts, by_pairs if parts.decay.shape[-1] == 1 else by_halves)
    solved = inverse_of_unit_lower(system) @ right

    def step(state: jax.Array, chunk: tuple[_Chunk, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, state = _apply(*chunk, state)
        return state, x

    state, x = lax.scan(step, state, (chunks, solved))
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :length, :], state


def _step(inputs: DeltaInputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One token: the state is read once and written once."""
    decay = jnp.exp(inputs.decay)
    if inputs.text is not None:
        decay = jnp.where((inputs.text == inputs.text_before)[..., None], decay, 0.0)
    query, key = inputs.query * decay, inputs.key * decay
    correction = inputs.rate[..., None] * (inputs.value - key @ state)
    likeness = jnp.sum(inputs.query * inputs.key, axis=-1, keepdims=True)
    x = query @ state + likeness * correction
    kept = state * jnp.swapaxes(decay, -1, -2)
    return x, kept + jnp.swapaxes(inputs.key, -1, -2) * correction


jax.tree_util.register_dataclass(_Chunk)
