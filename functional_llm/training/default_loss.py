"""What `compile` means for a language model: its own loss, unless another is given."""

import inspect
from dataclasses import dataclass
from typing import Any

import keras

from functional_llm.graph.types import JSON, Nested
from functional_llm.training.checked_data import ChecksData
from functional_llm.training.loss import Logs, LossModel, State
from functional_llm.training.rematerialize import remat_name


@dataclass(frozen=True)
class _Held:
    """Holds a model where Keras does not look for layers."""

    model: LossModel


class LanguageModelLoss(ChecksData):
    """A mixin for models: `compile` without a loss trains them as language models.

    Put this class before `keras.Model`. Steps are those of a `LossModel`, which never holds the
    logits of all tokens.
    """

    _loss_model: _Held | None = None

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        *,
        chunk_size: int | None = None,
        remat: bool | str = "nothing",
        **kwargs: Any,
    ) -> None:
        """Prepares `fit` and `evaluate`.

        ```python
        backbone.compile("adamw")
        backbone.fit(token_ids, labels)  # or without labels: each token predicts the next one
        ```

        Args:
            optimizer: As for `keras.Model.compile`.
            loss: `None` for the loss of a language model: the mean cross-entropy over all tokens
                with a label of a step (also with `gradient_accumulation_steps`). A negative label
                is none, and padding has none. Another loss receives the logits (B, T, V).
            loss_weights: As for `keras.Model.compile`.
            metrics: Metrics of the logits. They need a loss that receives the logits, too.
            weighted_metrics: As `metrics`.
            chunk_size: The tokens whose logits exist at a time, without another loss. Chosen for
                the device and the vocabulary unless it is given.
            remat: What is computed again in the backward pass, without another loss, for less
                memory: `"nothing"`, `"products"` or `"layer"`, as for `LossModel`.
            **kwargs: As for `keras.Model.compile`.

        Raises:
            ValueError: If a loss takes logits for probabilities or comes with `remat`, or metrics
                come without a loss.
        """
        self._loss_model = None
        others = {"loss_weights": loss_weights, "metrics": metrics}
        others |= {"weighted_metrics": weighted_metrics, **kwargs}
        if loss is not None:
            _check_takes_logits(loss)
            if remat_name(remat) != "nothing":
                raise ValueError(
                    f"Expected remat={remat!r} without a loss: the steps of another loss are "
                    "Keras's own. Leave out the loss, or `remat`."
                )
            super().compile(optimizer, loss, **others)  # type: ignore[misc]
            return
        if metrics or weighted_metrics:
            raise ValueError(
                "Expected no metrics beside the default loss, which never computes all logits. "
                f"Received: {metrics or weighted_metrics!r}. For metrics of logits, name the loss: "
                "loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
            )
        super().compile(optimizer, **others)  # type: ignore[misc]
        model = LossModel(self, chunk_size, remat)
        model.compile(self.optimizer, auto_scale_loss=False)  # type: ignore[attr-defined]
        self._loss_model = _Held(model)

    def compile_from_config(self, config: JSON) -> None:
        """Compiles as a model was from which the config comes; Keras calls it."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:  # type: ignore[attr-defined]
            self.optimizer.build(self.trainable_variables)  # type: ignore[attr-defined]

    @property
    def takes_token_labels(self) -> bool:
        """Whether labels are ids: another loss may take others."""
        return self._steps is not None

    @property
    def _steps(self) -> LossModel | None:
        """The model whose steps `fit` runs; a rewired model has the attribute of its original."""
        held = self._loss_model
        return None if held is None or held.model.backbone is not self else held.model

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The metrics of the loss."""
        steps = self._steps
        return super().metrics if steps is None else steps.metrics  # type: ignore[misc]

    def get_metrics_result(self) -> Logs:
        """Returns the values of the metrics; Keras calls it."""
        steps = self._steps
        if steps is None:
            return super().get_metrics_result()  # type: ignore[misc]
        return _loss_only(steps.get_metrics_result())

    def train_step(self, state: State, data: Nested) -> tuple[Logs, State]:
        """Returns the logs and the state after a step; Keras compiles it."""
        steps = self._steps
        if steps is None:
            return super().train_step(state, data)  # type: ignore[misc]
        logs, state = steps.train_step(state, data)
        return _loss_only(logs), state

    def test_step(self, state: State, data: Nested) -> tuple[Logs, State]:
        """Returns the logs and the state after an evaluation; Keras compiles it."""
        steps = self._steps
        if steps is None:
            return super().test_step(state, data)  # type: ignore[misc]
        logs, state = steps.test_step(state, data)
        return _loss_only(logs), state


def _loss_only(logs: Logs) -> Logs:
    return {"loss": logs["loss"]}


def _check_takes_logits(loss: Any) -> None:
    """Raises an error at a loss that takes what it receives for probabilities."""
    is_many = isinstance(loss, (list, dict)) and "class_name" not in loss
    for one in keras.tree.flatten(loss) if is_many else [loss]:
        function = keras.losses.get(one)
        if isinstance(function, keras.losses.Loss):
            from_logits = function.get_config().get("from_logits")
        else:
            parameter = inspect.signature(function).parameters.get("from_logits")
            from_logits = None if parameter is None else parameter.default
        if from_logits is False:
            raise ValueError(
                "Expected a loss that takes logits, which is what a Backbone returns. Received: "
                f"{one!r}, which takes probabilities. Pass no loss for the loss of a language "
                "model, or keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
            )
