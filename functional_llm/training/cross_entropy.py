"""The cross-entropy of a language model's head, computed without ever holding all its logits.

Shapes: B batch, T tokens, N = B * T tokens in a row, C tokens of a chunk, D model, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import keras

from functional_llm.graph.types import Tensor
from functional_llm.training.rematerialize import Values

# The head's trainable values, hidden states (X, C, D) of X chunks, the head's other values, labels
# and weights (X, C).
_Arguments: TypeAlias = tuple[Values, jax.Array, Values, jax.Array, jax.Array]
# Of the scan over chunks. Each adds to the sum of the head's gradients and renews its states.
_Carry: TypeAlias = tuple[Values, Values]
_Chunk: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]  # hidden states, labels, weights
_ChunkResult: TypeAlias = tuple[jax.Array, jax.Array | None]  # losses, gradient of hidden states
_Rest: TypeAlias = tuple[jax.Array, Values]  # losses, states


def cross_entropy(
    head: keras.Model,
    hidden_BTD: Tensor,
    labels_BT: Tensor,
    weights_BT: Tensor,
    chunk_size: int,
    training: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of the tokens' cross-entropies, and each of them (B, T), in float32.

    The sum has gradients. They are computed with it, while a chunk's logits exist; the backward
    pass only scales them. The losses of the tokens have no gradients.

    Args:
        head: Functional model from hidden states (1, C, D) to logits (1, C, V).
        hidden_BTD: Hidden states.
        labels_BT: Integers; negative for tokens without a label, whose loss is 0.
        weights_BT: Factors of the tokens' losses in the sum.
        chunk_size: C, the tokens whose logits exist at a time.
        training: Whether dropout in the head is active.

    Reference:
        [Liger Kernel](https://arxiv.org/abs/2410.10989), section 3.2, FusedLinearCrossEntropy.
    """
    batch, length, width = hidden_BTD.shape
    total = batch * length
    size = min(chunk_size, total)
    labels_N = jnp.reshape(jnp.asarray(labels_BT, "int32"), total)
    # Tokens with a label first: the chunks after them have nothing to compute.
    order_N = jnp.argsort(labels_N < 0, stable=True)
    padding = (0, -total % size)
    padded_N = jnp.pad(order_N, padding)
    hidden_XCD = jnp.reshape(hidden_BTD, (total, width))[padded_N].reshape(-1, size, width)
    labels_XC = jnp.pad(labels_N[order_N], padding, constant_values=-1).reshape(-1, size)
    weights_XC = jnp.reshape(weights_BT, total)[padded_N].reshape(-1, size)
    trainable = [variable.value for variable in head.trainable_variables]
    fixed = [variable.value for variable in head.non_trainable_variables]
    loss, (losses_XC, state) = _chunks(head, training)(
        trainable, hidden_XCD, fixed, labels_XC, weights_XC
    )
    for index, value in zip(_state_indices(head), state, strict=True):
        head.non_trainable_variables[index].assign(value)
    losses_N = jnp.zeros(total, "float32").at[order_N].set(jnp.reshape(losses_XC, -1)[:total])
    return loss, jnp.reshape(losses_N, (batch, length))


def _chunks(head: keras.Model, training: bool) -> Callable[[*_Arguments], tuple[jax.Array, _Rest]]:
    """Returns a function that runs the chunks one after the other and has its own gradients.

    It returns the weighted sum of the losses; and, without gradients, each loss (X, C) and the
    head's new states. XLA leaves out the gradients that nobody asks for, such as those of a frozen
    embedding.
    """
    states = _state_indices(head)

    def logits(
        state: Values, fixed: Values, trainable: Values, hidden_CD: jax.Array
    ) -> tuple[jax.Array, Values]:
        values = list(fixed)
        for index, value in zip(states, state, strict=True):
            values[index] = value
        logits_1CV, values = head.stateless_call(
            trainable, values, hidden_CD[None], training=training
        )
        return logits_1CV[0].astype("float32"), [values[index] for index in states]

    def run(
        is_training_step: bool, *arguments: *_Arguments
    ) -> tuple[tuple[jax.Array, _Rest], tuple[Values, jax.Array | None]]:
        trainable, hidden_XCD, fixed, labels_XC, weights_XC = arguments

        def chunk(carry: _Carry, inputs: _Chunk) -> tuple[_Carry, _ChunkResult]:
            hidden_CD, labels_C, weights_C = inputs
            sums, state = carry
            function = partial(logits, state, fixed)
            if not is_training_step:
                logits_CV, state = function(trainable, hidden_CD)
                return (sums, state), (_losses(logits_CV, labels_C, weights_C)[0], None)
            logits_CV, pull, state = jax.vjp(function, trainable, hidden_CD, has_aux=True)
            losses_C, gradient_CV = _losses(logits_CV, labels_C, weights_C)
            gradients, gradient_CD = pull(gradient_CV)
            return (jax.tree.map(jnp.add, sums, gradients), state), (losses_C, gradient_CD)

        def skip(carry: _Carry, inputs: _Chunk) -> tuple[_Carry, _ChunkResult]:
            hidden_CD, labels_C, _ = inputs
            gradient_CD = jnp.zeros_like(hidden_CD) if is_training_step else None
            return carry, (jnp.zeros(labels_C.shape, "float32"), gradient_CD)

        def step(carry: _Carry, inputs: _Chunk) -> tuple[_Carry, _ChunkResult]:
            return jax.lax.cond(jnp.any(inputs[1] >= 0), chunk, skip, carry, inputs)

        sums = jax.tree.map(jnp.zeros_like, trainable if is_training_step else [])
        carry = sums, [fixed[index] for index in states]
        inputs = hidden_XCD, labels_XC, weights_XC
        (sums, state), (losses_XC, gradient_XCD) = jax.lax.scan(step, carry, inputs)
        return (jnp.sum(losses_XC * weights_XC), (losses_XC, state)), (sums, gradient_XCD)

    @jax.custom_vjp
    def chunks(*arguments: *_Arguments) -> tuple[jax.Array, _Rest]:
        return run(False, *arguments)[0]

    def backward(
        gradients: tuple[Values, jax.Array], cotangents: tuple[jax.Array, _Rest]
    ) -> tuple[Values, jax.Array, None, None, None]:
        scale = cotangents[0]  # that of the sum
        scaled, scaled_XCD = jax.tree.map(lambda x: x * scale.astype(x.dtype), gradients)
        return scaled, scaled_XCD, None, None, None

    chunks.defvjp(partial(run, True), backward)
    return chunks


def _losses(
    logits_CV: jax.Array, labels_C: jax.Array, weights_C: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each token's cross-entropy, and the gradient of their weighted sum."""
    labels_C1 = labels_C[:, None]
    picked_C = jnp.take_along_axis(logits_CV, jnp.maximum(labels_C1, 0), 1)[:, 0]
    sums_C = jax.nn.logsumexp(logits_CV, axis=1)
    factors_C = jnp.where(labels_C >= 0, weights_C, 0.0)
    is_label_CV = (jnp.arange(logits_CV.shape[1], dtype="int32") == labels_C1).astype("float32")
    gradient_CV = (jnp.exp(logits_CV - sums_C[:, None]) - is_label_CV) * factors_C[:, None]
    return jnp.where(labels_C >= 0, sums_C - picked_C, 0.0), gradient_CV


def _state_indices(head: keras.Model) -> list[int]:
    """Which of the non-trainable variables are states, such as those of dropout's generators."""
    weights = {id(variable) for variable in head.weights}
    return [i for i, v in enumerate(head.non_trainable_variables) if id(v) not in weights]
