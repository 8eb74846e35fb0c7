"""Models that keep their values when `fit`, `evaluate` or `predict` fails."""

from functools import wraps
from typing import Any

import keras

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

    @wraps(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        with kept_values(self):  # type: ignore[arg-type]
            return super().fit(*args, **kwargs)  # type: ignore[misc]

    @wraps(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with kept_values(self):  # type: ignore[arg-type]
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    @wraps(keras.Model.predict)
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with kept_values(self):  # type: ignore[arg-type]
            return super().predict(*args, **kwargs)  # type: ignore[misc]
