"""Values straight to the devices that they belong on."""

import jax
import keras
import numpy as np

from functional_llm.graph.types import Tensor


def assign(variable: keras.Variable, value: np.ndarray | Tensor) -> None:
    """Assigns a value; with a distribution, each device receives its own part and no other.

    `Variable.assign` puts all of an array onto the first device before it divides it.

    Args:
        variable: What to assign to.
        value: Of its shape.
    """
    distribution = keras.distribution.distribution()
    if distribution is not None and isinstance(value, np.ndarray):
        sharding = distribution.get_variable_layout(variable).backend_layout
        value = value.astype(jax.numpy.dtype(variable.dtype), copy=False)
        value = jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
    variable.assign(value)
