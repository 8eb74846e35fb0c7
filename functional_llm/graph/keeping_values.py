"""Models that keep their values when `fit`, `evaluate` or `predict` fails."""

from typing import Any

from functional_llm.graph.keras_values import donating, kept_values

TRAINED = (0, 2, 3)  # the groups of a training step's state that it changes: not other weights


class KeepsValues:
    """A mixin for models: after a failure, weights are what they were after the last step.

    With JAX, Keras takes the values out of the variables and gives them to the compiled step; if
    that fails, it leaves the variables without. A layer cannot mend that, only the model that is
    asked to train. Put this class before `keras.Model`: `class MyModel(KeepsValues, keras.Model)`.

    A step that fails while it is compiled, data that cannot be read, and a callback that raises
    change nothing. Nor does a step of `evaluate` or `predict` that fails while it runs, for lack of
    memory, say. Such a step of `fit` writes into the weights that it trains: they are gone with it,
    and reading them is an error that says so. Frozen weights stay.
    """

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.fit`."""
        with kept_values(self):
            return super().fit(*args, **kwargs)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`."""
        with kept_values(self):
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.predict`."""
        with kept_values(self):
            return super().predict(*args, **kwargs)  # type: ignore[misc]

    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.train_on_batch`."""
        with kept_values(self):
            return super().train_on_batch(*args, **kwargs)  # type: ignore[misc]

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.test_on_batch`."""
        with kept_values(self):
            return super().test_on_batch(*args, **kwargs)  # type: ignore[misc]

    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.predict_on_batch`."""
        with kept_values(self):
            return super().predict_on_batch(*args, **kwargs)  # type: ignore[misc]

    def make_train_function(self, force: bool = False) -> Any:
        """Makes the step of `fit`, which writes into what it changes; Keras calls it."""
        with donating(*TRAINED):
            return super().make_train_function(force)  # type: ignore[misc]

    def make_test_function(self, force: bool = False) -> Any:
        """Makes the step of `evaluate`, which writes into no weights; Keras calls it."""
        with donating():
            return super().make_test_function(force)  # type: ignore[misc]

    def make_predict_function(self, force: bool = False) -> Any:
        """Makes the step of `predict`, which writes into no weights; Keras calls it."""
        with donating():
            return super().make_predict_function(force)  # type: ignore[misc]
