"""The loss of a language model, computed without ever holding all its logits.

Shapes: B batch, T tokens, N = B * T tokens in a row, C tokens of a chunk, D model, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import keras

from functional_llm.products import with_fast_products
from functional_llm.training.rematerialize import rematerialize


class LossModel(keras.Model):
    """A backbone with its loss, for `fit`, `evaluate` and any Keras callback.

    It is the backbone's own graph, cut in two at the hidden states, and shares its weights:
    training this model trains the backbone. The head and the cross-entropy run for a few tokens at
    a time, forward and backward, and only for tokens that have a label.

    ```python
    model = LossModel(backbone)
    model.compile(optimizer)
    model.fit(batches, validation_data=held_out)
    ```

    Data are those that `backbone.fit` takes too: inputs, labels (B, T), weights (B, T). The loss is
    the weighted mean over the tokens of a batch; the metric `token_loss` the one over all tokens
    seen since the metrics were reset, and `batch_loss` that of the last batch.

    Args:
        backbone: A model with the inputs and outputs of a Backbone.
        chunk_size: C.
        remat: Compute each decoder layer again in the backward pass instead of keeping what is
            inside it: less memory, about a third more time. On CPUs, see `SAVING_FLAG`.
    """

    def __init__(self, backbone: keras.Model, chunk_size: int = 512, remat: bool = False) -> None:
        super().__init__(name=f"{backbone.name}_loss")
        if chunk_size < 1:
            raise ValueError(f"Expected a chunk size of at least 1, received {chunk_size}.")
        hidden, logits = backbone.output["hidden"], backbone.output["logits"]
        trunk = keras.Model(backbone.input, hidden)
        self.backbone = backbone
        self.trunk = rematerialize(trunk) if remat else trunk
        self.head = keras.Model(hidden, logits)
        self.chunk_size = chunk_size
        self.token_loss = keras.metrics.Mean(name="token_loss")
        self.batch_loss = Latest(name="batch_loss")
        self.built = True

    # What is frozen in a model is the model's own affair (see `rewire`).
    @property
    def trainable_variables(self) -> list[keras.Variable]:
        return self.backbone.trainable_variables

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        trainable = {id(variable) for variable in self.trainable_variables}
        return [variable for variable in self.variables if id(variable) not in trainable]

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        return self.backbone.trainable_weights

    @property
    def non_trainable_weights(self) -> list[keras.Variable]:
        trainable = {id(variable) for variable in self.trainable_weights}
        return [variable for variable in self.weights if id(variable) not in trainable]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Returns the hidden states (B, T, D)."""
        return self.trunk(self.backbone.complete_inputs(inputs), training=training)

    def train_step(self, state: Any, data: Any) -> Any:
        """Returns the logs and the state after a step; Keras compiles it."""
        return with_fast_products(super().train_step)(state, data)

    def test_step(self, state: Any, data: Any) -> Any:
        """Returns the logs and the state after an evaluation; Keras compiles it."""
        return with_fast_products(super().test_step)(state, data)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Returns the mean loss of a batch, other losses of the layers added."""
        losses_BT = token_losses(self.head, y_pred, y, self.chunk_size, training)
        weights_BT = (jnp.asarray(y) >= 0).astype("float32")
        if sample_weight is not None:
            weights_BT = weights_BT * jnp.asarray(sample_weight, "float32")
        self.token_loss.update_state(losses_BT, sample_weight=weights_BT)
        loss = jnp.sum(losses_BT * weights_BT) / jnp.maximum(jnp.sum(weights_BT), 1e-9)
        self.batch_loss.update_state(loss)
        return sum(self.losses, loss)


@keras.saving.register_keras_serializable("functional_llm")
class Latest(keras.metrics.Metric):
    """The last value, where `Mean` gives the mean since the last reset."""

    def __init__(self, name: str | None = None, dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.value = self.add_variable((), initializer="zeros", name="value")

    def update_state(self, value: Any, sample_weight: Any = None) -> None:
        self.value.assign(value)

    def result(self) -> Any:
        return self.value.value


def token_losses(
    head: keras.Model, hidden_BTD: Any, labels_BT: Any, chunk_size: int, training: bool
) -> Any:
    """Returns the cross-entropy of each token (B, T) in float32; 0 where its label is negative.

    Args:
        head: Functional model from hidden states (1, C, D) to logits (1, C, V).
        hidden_BTD: Hidden states.
        labels_BT: Integers; negative where nothing is to be learnt.
        chunk_size: C: the logits of so many tokens exist at a time.
        training: Whether layers of the head that care (dropout) are training.
    """
    batch, length, width = hidden_BTD.shape
    total = batch * length
    size = min(chunk_size, total)
    labels_N = jnp.reshape(jnp.asarray(labels_BT, "int32"), total)
    # Tokens with a label first: the chunks after them have nothing to compute.
    order_N = jnp.argsort(labels_N < 0, stable=True)
    padding = (0, -total % size)
    hidden_ND = jnp.reshape(hidden_BTD, (total, width))[jnp.pad(order_N, padding)]
    labels_N = jnp.pad(labels_N[order_N], padding, constant_values=-1)
    trainable = [variable.value for variable in head.trainable_variables]
    fixed = [variable.value for variable in head.non_trainable_variables]
    states = _state_indices(head)

    @jax.checkpoint
    def chunk(state: list[Any], inputs: tuple[Any, Any]) -> tuple[list[Any], Any]:
        hidden_CD, labels_C = inputs
        return jax.lax.cond(jnp.any(labels_C >= 0), compute, skip, state, hidden_CD, labels_C)

    def compute(state: list[Any], hidden_CD: Any, labels_C: Any) -> tuple[list[Any], Any]:
        values = list(fixed)
        for index, value in zip(states, state, strict=True):
            values[index] = value
        logits_1CV, values = head.stateless_call(
            trainable, values, hidden_CD[None], training=training
        )
        logits_CV = logits_1CV[0].astype("float32")
        picked_C = jnp.take_along_axis(logits_CV, jnp.maximum(labels_C, 0)[:, None], 1)[:, 0]
        losses_C = jax.nn.logsumexp(logits_CV, axis=1) - picked_C
        return [values[index] for index in states], jnp.where(labels_C >= 0, losses_C, 0.0)

    def skip(state: list[Any], hidden_CD: Any, labels_C: Any) -> tuple[list[Any], Any]:
        return state, jnp.zeros(labels_C.shape, "float32")

    chunks = (jnp.reshape(hidden_ND, (-1, size, width)), jnp.reshape(labels_N, (-1, size)))
    state, losses = jax.lax.scan(chunk, [fixed[index] for index in states], chunks)
    for index, value in zip(states, state, strict=True):
        head.non_trainable_variables[index].assign(value)
    losses_N = jnp.zeros(total, "float32").at[order_N].set(jnp.reshape(losses, -1)[:total])
    return jnp.reshape(losses_N, (batch, length))


def _state_indices(head: keras.Model) -> list[int]:
    """Which of the non-trainable variables are states, such as those of dropout's generators."""
    weights = {id(variable) for variable in head.weights}
    return [i for i, v in enumerate(head.non_trainable_variables) if id(v) not in weights]
