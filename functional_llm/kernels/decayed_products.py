"""Products of queries and keys of a chunk of tokens, with what decays between the two.

Of a query at token I and a key at J before it, sum over channels (query * key * exp(sum of decays
behind J, up to I)). Decays are logarithms of at most 0. Only sums of them are taken, and no
difference: one of two sums over all tokens has lost its digits where a token decays much, and the
two factors into which it would fall, exp(sum up to I) exp(-sum up to J), overflow.

Shapes: C tokens, I and J two of them, H channels; L is 1 where all channels decay alike, else H.
`[...]` are axes that the tensors share.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from keras import ops


@dataclass(frozen=True)
class Products:
    """Products of a chunk, and the sums of decays from its begin and to its end.

    Args:
        scores: Of queries and keys [..., I, J]. Above the diagonal stands anything finite.
        likeness: Of keys and keys, alike.
        since: Up to each token, its own among them [..., C, L].
        until: Behind each token [..., C, L].
    """

    scores: Any
    likeness: Any
    since: Any
    until: Any


def by_pairs(query: Any, key: Any, decay: Any) -> Products:
    """The definition, in `keras.ops`: each pair of tokens has a sum for each of L.

    Args:
        query: [..., C, H], of any number of tokens.
        key: [..., C, H].
        decay: [..., C, L].
    """
    turned, decay_LC = ops.swapaxes(key, -1, -2), ops.swapaxes(decay, -1, -2)
    places = ops.cumsum(ops.ones_like(decay_LC), axis=-1)
    is_before = ops.expand_dims(places, -1) > ops.expand_dims(places, -2)
    between = ops.where(is_before, ops.expand_dims(decay_LC, -1), 0.0)
    sums = ops.cumsum(between, axis=-2)  # [..., L, I, J]
    pairs = ops.exp(sums)
    if decay.shape[-1] == 1:
        scores, likeness = (ops.matmul(x, turned) * pairs[..., 0, :, :] for x in (query, key))
    else:
        turned = ops.expand_dims(turned, -2) * pairs
        scores, likeness = (
            ops.sum(ops.expand_dims(ops.swapaxes(x, -1, -2), -1) * turned, axis=-3)
            for x in (query, key)
        )
    until = ops.swapaxes(sums[..., -1, :], -1, -2)
    return Products(scores, likeness, ops.cumsum(decay, axis=-2), until)


def by_halves(query: Any, key: Any, decay: Any) -> Products:
    """The same in matrix products: none has a decay for each pair and channel.

    Of two neighbouring halves, what decays from a token of the first to one of the second is what
    decays to the end of the first, and from the begin of the second: a factor of each. Each pair
    is in two such halves of one size, 1, 2, 4, ... tokens. One product has the pairs of all halves
    of a size, and others, which do not count. (To put blocks together instead, as the inverse of a
    matrix does, makes programs of whose gradients XLA's for CPUs crash.)

    Args:
        query: [..., C, H], C a power of two.
        key: [..., C, H].
        decay: [..., C, H].
    """
    key = jnp.broadcast_to(key, decay.shape)
    both = jnp.stack([jnp.broadcast_to(query, decay.shape), key])
    length, size = decay.shape[-2:]
    products = jnp.sum(both * key, axis=-1)[..., None] * jnp.eye(length, dtype=decay.dtype)
    # From the begin of each half up to a token, and behind it to the end.
    since, until, rows = decay, jnp.zeros_like(decay), 1
    while rows < length:
        pairs = (both * jnp.exp(since)) @ jnp.swapaxes(key * jnp.exp(until), -1, -2)
        half = np.arange(length) // rows
        is_between = (half[:, None] % 2 == 1) & (half[None] == half[:, None] - 1)
        products = jnp.where(is_between, pairs, products)
        since, until = (x.reshape(*x.shape[:-2], -1, 2, rows, size) for x in (since, until))
        whole = since[..., -1:, :]  # of each half: what is behind a first one, before a second
        nothing = jnp.zeros_like(whole[..., :1, :, :])
        since += jnp.concatenate([nothing, whole[..., :1, :, :]], axis=-3)
        until += jnp.concatenate([whole[..., 1:, :, :], nothing], axis=-3)
        since, until = since.reshape(decay.shape), until.reshape(decay.shape)
        rows *= 2
    scores, likeness = products
    return Products(scores, likeness, since, until)
