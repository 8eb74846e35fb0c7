"""Models that keep their values when `fit`, `evaluate` or `predict` fails."""

from typing import Any

from functional_llm.graph.keras_private import kept_values


class KeepsValues:
    """A mixin for models: after a failure, weights are what they were after the last step.

    With JAX, Keras takes the values out of the variables and gives them to the compiled step; if
    that fails, it leaves the variables without. A layer cannot mend that, only the model that is
    asked to train. Put this class before `keras.Model`: `class MyModel(KeepsValues, keras.Model)`.

    A step that fails while it is compiled, data that cannot be read, and a callback that raises
    change nothing. Where a compiled step fails while it runs, JAX has deleted the weights it was
    given: reading them is an error, and they must be loaded again.
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
