"""The loss of a language model, for Keras's `fit`.

Shapes: B batch, T tokens, C tokens of a chunk, D model, V vocabulary.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import keras

from functional_llm.graph.freezing import Freezable
from functional_llm.graph.keeping_values import KeepsValues
from functional_llm.graph.precision import FullFloat32, full_float32
from functional_llm.graph.types import Nested, Tensor
from functional_llm.training.accumulation import TokenMean
from functional_llm.training.checked_data import ChecksData, check_batch
from functional_llm.training.cross_entropy import cross_entropy
from functional_llm.training.rematerialize import Values, rematerialize
from functional_llm.xla.rewriter import optimize_for_cpu

State: TypeAlias = tuple[Values, ...]  # of a compiled model: weights, optimizer, metrics
Logs: TypeAlias = dict[str, jax.Array]


def check_trainable(backbone: keras.Model) -> None:
    """Raises a ValueError if no weight of a model trains."""
    if not backbone.trainable_variables:
        raise ValueError(
            "Expected trainable weights, received a model whose weights are all frozen. Freeze "
            "fewer of them, or add an adapter with `functional_llm.peft`. Nothing trains in a "
            "model whose own `trainable` is False: set that of its layers."
        )


class LossModel(ChecksData, KeepsValues, Freezable, FullFloat32, keras.Model):
    """A backbone with its loss, for `fit`, `evaluate` and any Keras callback.

    It is the backbone's own graph, cut in two at the hidden states. It shares the backbone's
    weights and what is frozen among them: training this model trains the backbone. The head and the
    cross-entropy run for a few tokens at a time, forward and backward, and only for tokens that
    have a label.

    ```python
    model = LossModel(backbone)
    model.compile(optimizer)
    model.fit(batches, validation_data=held_out)
    ```

    It takes the data that `backbone.fit` takes: inputs, labels (B, T), weights (B, T) or (B,). A
    negative label is none, and padding has none; without labels, each token's label is the next one
    of its example. The loss is the weighted mean over the tokens of a step, which has several
    batches if the optimizer has `gradient_accumulation_steps`. The metrics `loss` and `token_loss`,
    which leaves out the losses that layers add, are means over all tokens since the metrics were
    reset; `batch_loss` and `batch_weight` are the loss of the last batch, and its sum of weights.

    Args:
        backbone: A model with the inputs and outputs of a Backbone.
        chunk_size: C, the tokens whose logits exist at a time; chosen for the device and the
            vocabulary unless it is given.
        remat: What is computed again in the backward pass instead of being kept. `"nothing"`;
            `"products"`: all of a decoder layer but its products with weights, mainly attention;
            `"layer"`: whole decoder layers, for the least memory and about a third more time.
            `False` and `True` are the first and the last. On CPUs, see `REMAT_XLA_FLAG`.
    """

    def __init__(
        self,
        backbone: keras.Model,
        chunk_size: int | None = None,
        remat: bool | str = "nothing",
    ) -> None:
        super().__init__(name=f"{backbone.name}_loss")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"Expected a chunk size of at least 1, received {chunk_size}.")
        hidden, logits = backbone.output["hidden"], backbone.output["logits"]
        trunk = keras.Model(backbone.input, hidden)
        self.backbone = backbone
        self.trunk = rematerialize(trunk, remat)
        self.head = keras.Model(hidden, logits)
        self.chunk_size = chunk_size
        self.total_loss = keras.metrics.Mean(name="total_loss")
        self.token_loss = keras.metrics.Mean(name="token_loss")
        self.batch_loss = Latest(name="batch_loss")
        self.batch_weight = Latest(name="batch_weight")
        self._token_mean: TokenMean | None = None
        self.built = True

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """Those of the backbone."""
        return self.backbone.trainable_variables

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """Those of the backbone."""
        return self.backbone.trainable_weights

    @property
    def product_dtype(self) -> str:
        """The dtype of the hidden states."""
        return str(self.backbone.output["hidden"].dtype)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return self.backbone.output["logits"].shape[-1]

    def compile(self, optimizer: Any = "rmsprop", **kwargs: Any) -> None:
        """Sets the optimizer; arguments as for `keras.Model.compile`, without a loss."""
        super().compile(optimizer, **kwargs)
        inner = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        accumulates = getattr(inner, "gradient_accumulation_steps", None) is not None
        self._token_mean = TokenMean(self.optimizer) if accumulates else None

    def call(self, inputs: Nested, training: bool | None = None) -> Tensor:
        """Returns the hidden states (B, T, D)."""
        return self.trunk(self.backbone.complete_inputs(inputs), training=training)

    def train_step(self, state: State, data: Nested) -> tuple[Logs, State]:
        """Returns the logs and the state after a step; Keras compiles it."""
        return optimize_for_cpu(self._train_step)(state, data)

    def _train_step(self, state: State, data: Nested) -> tuple[Logs, State]:
        check_trainable(self.backbone)
        if self._token_mean is None:
            return super().train_step(state, data)
        trainable, fixed, optimizer, metrics = state
        count = jnp.sum(self._targets(*keras.utils.unpack_x_y_sample_weight(data))[1])
        state = trainable, fixed, self._token_mean.begin_batch(optimizer, count), metrics
        logs, (trainable, fixed, after, metrics) = super().train_step(state, data)
        return logs, (trainable, fixed, self._token_mean.end_batch(optimizer, after), metrics)

    def test_step(self, state: State, data: Nested) -> tuple[Logs, State]:
        """Returns the logs and the state after an evaluation; Keras compiles it."""
        return optimize_for_cpu(super().test_step)(state, data)

    def get_metrics_result(self) -> Logs:
        """Returns the values of the metrics; Keras calls it."""
        results = super().get_metrics_result()
        results["loss"] = results.pop("total_loss")  # Keras's own mean counts each batch alike
        return results

    def compute_loss_and_updates(
        self,
        trainable_variables: Values,
        non_trainable_variables: Values,
        metrics_variables: Values,
        x: Nested,
        y: Tensor | None,
        sample_weight: Tensor | None,
        training: bool = False,
        optimizer_variables: Values | None = None,
    ) -> tuple[jax.Array, Nested]:
        """Returns the loss whose gradient is taken, and the new values; Keras calls it."""
        loss, updates = super().compute_loss_and_updates(
            trainable_variables,
            non_trainable_variables,
            metrics_variables,
            x,
            y,
            sample_weight,
            training,
            optimizer_variables,
        )
        if optimizer_variables is not None and self._token_mean is not None:
            count = jnp.sum(self._targets(x, y, sample_weight)[1])
            loss = loss * self._token_mean.factor(optimizer_variables, count)
        return loss, updates

    def compute_loss(
        self,
        x: Nested = None,
        y: Tensor | None = None,
        y_pred: Tensor = None,
        sample_weight: Tensor | None = None,
        training: bool = True,
    ) -> jax.Array:
        """Returns the mean loss of a batch, plus the losses that layers add."""
        labels_BT, weights_BT = self._targets(x, y, sample_weight)
        weight = jnp.sum(weights_BT)
        shares_BT = weights_BT / jnp.maximum(weight, 1e-9)
        with full_float32(self.product_dtype):
            loss, losses_BT = cross_entropy(
                self.head, y_pred, labels_BT, shares_BT, self.chunk_size, training
            )
        total = sum(self.losses, loss)
        self.total_loss.update_state(total, sample_weight=weight)
        self.token_loss.update_state(losses_BT, sample_weight=weights_BT)
        self.batch_loss.update_state(loss)
        self.batch_weight.update_state(weight)
        return total

    def _targets(
        self, x: Nested, y: Tensor | None, sample_weight: Tensor | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns labels (B, T), -1 where there is none, and the weights of their losses."""
        inputs = self.backbone.complete_inputs(x)
        positions_BT = jnp.asarray(inputs["positions"])
        shape = positions_BT.shape
        labels = _next_tokens(inputs) if y is None else jnp.asarray(y)
        if labels.shape != shape or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"Expected labels of the shape of token_ids, {shape}, integers, received "
                f"{labels.shape} of {labels.dtype}. The label of a token is the id of the next one."
            )
        check_batch(None, labels, self.vocabulary_size)
        labels_BT = jnp.where(positions_BT >= 0, labels.astype("int32"), -1)
        weights_BT = (labels_BT >= 0).astype("float32")
        if sample_weight is not None:
            weights = jnp.asarray(sample_weight, "float32")
            weights = weights[:, None] if weights.ndim == 1 else weights
            sizes = zip(weights.shape, shape, strict=False)
            if weights.ndim != 2 or any(n not in (1, m) for n, m in sizes):
                raise ValueError(
                    f"Expected sample weights of the shape {shape[:1]} or {shape}, received "
                    f"{weights.shape}."
                )
            weights_BT = weights_BT * weights
        return labels_BT, weights_BT


def _next_tokens(inputs: dict[str, Nested]) -> jax.Array:
    """Returns each token's successor in its example (B, T), -1 for the last ones."""
    ids_BT, positions_BT = jnp.asarray(inputs["token_ids"]), jnp.asarray(inputs["positions"])
    follows_BT = positions_BT[:, 1:] == positions_BT[:, :-1] + 1
    if inputs.get("segment_ids") is not None:
        segments_BT = jnp.asarray(inputs["segment_ids"])
        follows_BT &= segments_BT[:, 1:] == segments_BT[:, :-1]
    labels_BT = jnp.where(follows_BT, ids_BT[:, 1:], -1)
    return jnp.pad(labels_BT, ((0, 0), (0, 1)), constant_values=-1)


@keras.saving.register_keras_serializable("functional_llm")
class Latest(keras.metrics.Metric):
    """The last value, where `Mean` gives the mean since the last reset."""

    def __init__(self, name: str | None = None, dtype: str | None = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.value = self.add_variable((), initializer="zeros", name="value")

    def update_state(self, value: Tensor, sample_weight: Tensor | None = None) -> None:
        self.value.assign(value)

    def result(self) -> jax.Array:
        return self.value.value
