"""Words for types that Keras leaves open."""

from typing import Any, TypeAlias

import keras

Tensor: TypeAlias = Any  # an array of the backend, a variable, or a KerasTensor
Nested: TypeAlias = Any  # a nested structure of tensors, or of whatever the docstring says
Layer: TypeAlias = keras.layers.Layer
JSON: TypeAlias = dict[str, Any]  # an object as `json` reads it
