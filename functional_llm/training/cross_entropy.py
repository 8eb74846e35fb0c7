"""The cross-entropy of a language model's head, computed without ever holding all its logits.

Shapes: B batch, T tokens, R parts of the batch, each on devices of its own (1 without a
distribution), N = B * T / R tokens of a part in a row, C tokens of a chunk, X chunks, D model,
V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import keras

from functional_llm.graph.placing import num_parts, place_rows
from functional_llm.graph.types import Tensor
from functional_llm.training.rematerialize import Values

# A chunk is two products with the head, and passes over its logits that XLA fuses; what it costs
# besides is the sum of the head's gradients, read and written once a chunk. On a GPU the second
# product, of (C, V) with (V, D), has C * D / 128^2 tiles: at C = 512, D = 2048 only 64 for the 132
# processors of an H100. And where the head trains, 12 bytes a weight move for each chunk: at 512
# about 0.9 ms of an H100's memory beside 1.1 ms of products. At 2048, 256 tiles and a quarter.
# The price is memory: compiled for an H100, D = 2048, V = 128256, 8192 tokens, bfloat16, a frozen
# head, C = 512, 1024, 2048, 4096, 8192 take 184, 317, 576, 1118, 2135 MB; a trained one takes 1650
# MB (its gradients), up to 4096. So: as many as 2^28 logits have room for, 0.5 GB in bfloat16.
_LOGITS = 1 << 28
_FEWEST = 512  # and what CPUs take, where the products of 512 rows are as fast as they get
_MOST = 8192
_TILE = 128  # rows

# The head's trainable values, hidden states (X, R, C, D), the head's other values, labels and
# weights (X, R, C).
_Arguments: TypeAlias = tuple[Values, jax.Array, Values, jax.Array, jax.Array]
# Of the scan over chunks. Each adds to the sum of the head's gradients and renews its states.
_Carry: TypeAlias = tuple[Values, Values]
_Chunk: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]  # hidden states, labels, weights
_ChunkResult: TypeAlias = tuple[jax.Array, jax.Array | None]  # losses, gradient of hidden states
_Rest: TypeAlias = tuple[jax.Array, Values]  # losses, states


def choose_chunk_size(platform: str, vocabulary_size: int, tokens: int) -> int:
    """Returns how many tokens' logits to compute at a time, where nobody has said it.

    The chunks of a step are of one size, so that the last one is not mostly padding.

    Args:
        platform: `"cpu"`, `"gpu"` or `"tpu"`, as `jax.default_backend()` says it.
        vocabulary_size: V.
        tokens: N, of one step.
    """
    most = _FEWEST
    if platform != "cpu":
        room = max(1, _LOGITS // vocabulary_size)
        most = min(_MOST, max(_FEWEST, 1 << (room.bit_length() - 1)))
    chunks = -(-tokens // most)
    even = -(-tokens // chunks)
    return min(most, tokens, -(-even // _TILE) * _TILE)


def cross_entropy(
    head: keras.Model,
    hidden_BTD: Tensor,
    labels_BT: Tensor,
    weights_BT: Tensor,
    chunk_size: int | None,
    training: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of the tokens' cross-entropies, and each of them (B, T), in float32.

    The sum has gradients. They are computed with it, while a chunk's logits exist; the backward
    pass only scales them. The losses of the tokens have no gradients.

    Args:
        head: Functional model from hidden states (R, C, D) to logits (R, C, V).
        hidden_BTD: Hidden states.
        labels_BT: Integers; negative for tokens without a label, whose loss is 0.
        weights_BT: Factors of the tokens' losses in the sum.
        chunk_size: C, the tokens of a part whose logits exist at a time; `None` for
            `choose_chunk_size`.
        training: Whether dropout in the head is active.

    Reference:
        [Liger Kernel](https://arxiv.org/abs/2410.10989), section 3.2, FusedLinearCrossEntropy.
    """
    batch, length, width = hidden_BTD.shape
    # Each part is sorted and computed where it lies: in one order of all of them, every device
    # would receive all hidden states, and compute all chunks.
    parts = num_parts(batch)
    total = batch // parts * length
    if chunk_size is None:
        chunk_size = choose_chunk_size(jax.default_backend(), head.output.shape[-1], total)
    size = min(chunk_size, total)
    labels_RN = _in_parts(jnp.asarray(labels_BT, "int32"), parts)
    # Tokens with a label first: the chunks after them have nothing to compute.
    order_RN = jnp.argsort(labels_RN < 0, axis=1, stable=True)
    padding = ((0, 0), (0, -total % size))
    padded_RN = jnp.pad(order_RN, padding)

    def in_chunks(x_RN: jax.Array) -> jax.Array:
        return jnp.swapaxes(jnp.reshape(x_RN, (parts, -1, size, *x_RN.shape[2:])), 0, 1)

    hidden_RND = _in_parts(hidden_BTD, parts)
    hidden_XRCD = in_chunks(jnp.take_along_axis(hidden_RND, padded_RN[..., None], axis=1))
    ordered_RN = jnp.take_along_axis(labels_RN, order_RN, axis=1)
    labels_XRC = in_chunks(jnp.pad(ordered_RN, padding, constant_values=-1))
    weights_XRC = in_chunks(jnp.take_along_axis(_in_parts(weights_BT, parts), padded_RN, axis=1))
    trainable = [variable.value for variable in head.trainable_variables]
    fixed = [variable.value for variable in head.non_trainable_variables]
    loss, (losses_XRC, state) = _chunks(head, training)(
        trainable, hidden_XRCD, fixed, labels_XRC, weights_XRC
    )
    for index, value in zip(_state_indices(head), state, strict=True):
        head.non_trainable_variables[index].assign(value)
    losses_RN = jnp.reshape(jnp.swapaxes(losses_XRC, 0, 1), (parts, -1))[:, :total]
    losses_RN = jnp.take_along_axis(losses_RN, jnp.argsort(order_RN, axis=1), axis=1)
    return loss, jnp.reshape(losses_RN, (batch, length))


def _in_parts(x: Tensor, parts: int) -> jax.Array:
    """Returns (B, T, ...) as (R, N, ...), each part where its rows lie."""
    return place_rows(jnp.reshape(x, (parts, -1, *x.shape[2:])), parts)


def _chunks(head: keras.Model, training: bool) -> Callable[[*_Arguments], tuple[jax.Array, _Rest]]:
    """Returns a function that runs the chunks one after the other and has its own gradients.

    It returns the weighted sum of the losses; and, without gradients, each loss (X, R, C) and the
    head's new states. XLA leaves out the gradients that nobody asks for, such as those of a frozen
    embedding.
    """
    states = _state_indices(head)
    config: Any = jax.config
    precision = config.jax_default_matmul_precision  # JAX may trace gradients when it is another

    def logits(
        state: Values, fixed: Values, trainable: Values, hidden_RCD: jax.Array
    ) -> tuple[jax.Array, Values]:
        values = list(fixed)
        for index, value in zip(states, state, strict=True):
            values[index] = value
        with jax.default_matmul_precision(precision):
            logits_RCV, values = head.stateless_call(
                trainable, values, hidden_RCD, training=training
            )
        return logits_RCV.astype("float32"), [values[index] for index in states]

    def run(
        is_training_step: bool, *arguments: *_Arguments
    ) -> tuple[tuple[jax.Array, _Rest], tuple[Values, jax.Array | None]]:
        trainable, hidden_XRCD, fixed, labels_XRC, weights_XRC = arguments

        def chunk(carry: _Carry, inputs: _Chunk) -> tuple[_Carry, _ChunkResult]:
            hidden_RCD, labels_RC, weights_RC = inputs
            sums, state = carry
            function = partial(logits, state, fixed)
            if not is_training_step:
                logits_RCV, state = function(trainable, hidden_RCD)
                return (sums, state), (_losses(logits_RCV, labels_RC, weights_RC)[0], None)
            logits_RCV, pull, state = jax.vjp(function, trainable, hidden_RCD, has_aux=True)
            losses_RC, gradient_RCV = _losses(logits_RCV, labels_RC, weights_RC)
            gradients, gradient_RCD = pull(gradient_RCV)
            return (jax.tree.map(jnp.add, sums, gradients), state), (losses_RC, gradient_RCD)

        def skip(carry: _Carry, inputs: _Chunk) -> tuple[_Carry, _ChunkResult]:
            hidden_RCD, labels_RC, _ = inputs
            gradient_RCD = jnp.zeros_like(hidden_RCD) if is_training_step else None
            return carry, (jnp.zeros(labels_RC.shape, "float32"), gradient_RCD)

        def step(carry: _Carry, inputs: _Chunk) -> tuple[_Carry, _ChunkResult]:
            return jax.lax.cond(jnp.any(inputs[1] >= 0), chunk, skip, carry, inputs)

        sums = jax.tree.map(jnp.zeros_like, trainable if is_training_step else [])
        carry = sums, [fixed[index] for index in states]
        inputs = hidden_XRCD, labels_XRC, weights_XRC
        (sums, state), (losses_XRC, gradient_XRCD) = jax.lax.scan(step, carry, inputs)
        return (jnp.sum(losses_XRC * weights_XRC), (losses_XRC, state)), (sums, gradient_XRCD)

    @jax.custom_vjp
    def chunks(*arguments: *_Arguments) -> tuple[jax.Array, _Rest]:
        return run(False, *arguments)[0]

    def backward(
        gradients: tuple[Values, jax.Array], cotangents: tuple[jax.Array, _Rest]
    ) -> tuple[Values, jax.Array, None, None, None]:
        scale = cotangents[0]  # that of the sum
        scaled, scaled_XRCD = jax.tree.map(lambda x: x * scale.astype(x.dtype), gradients)
        return scaled, scaled_XRCD, None, None, None

    chunks.defvjp(partial(run, True), backward)
    return chunks


def _losses(
    logits_RCV: jax.Array, labels_RC: jax.Array, weights_RC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each token's cross-entropy, and the gradient of their weighted sum."""
    labels_RC1 = labels_RC[..., None]
    picked_RC = jnp.take_along_axis(logits_RCV, jnp.maximum(labels_RC1, 0), -1)[..., 0]
    sums_RC = jax.nn.logsumexp(logits_RCV, axis=-1)
    factors_RC = jnp.where(labels_RC >= 0, weights_RC, 0.0)
    is_label_RCV = (jnp.arange(logits_RCV.shape[-1], dtype="int32") == labels_RC1).astype("float32")
    gradient_RCV = (jnp.exp(logits_RCV - sums_RC[..., None]) - is_label_RCV) * factors_RC[..., None]
    return jnp.where(labels_RC >= 0, sums_RC - picked_RC, 0.0), gradient_RCV


def _state_indices(head: keras.Model) -> list[int]:
    """Which of the non-trainable variables are states, such as those of dropout's generators."""
    weights = {id(variable) for variable in head.weights}
    return [i for i, v in enumerate(head.non_trainable_variables) if id(v) not in weights]
