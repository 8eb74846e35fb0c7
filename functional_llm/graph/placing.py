"""Values and data straight to the devices that they belong on."""

import jax
import keras
import numpy as np

from functional_llm.graph.types import Nested, Tensor


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


def num_parts(rows: int) -> int:
    """Returns in how many parts the rows of a batch lie on the devices; 1 if they do not divide."""
    distribution = keras.distribution.distribution()
    parts: int = 1 if distribution is None else distribution.num_model_replicas
    return parts if rows % parts == 0 else 1


def place_rows(data: Nested, rows: int) -> Nested:
    """Returns arrays, each device with its rows of them; as they are if they do not divide.

    Args:
        data: Arrays whose first axis is that of the rows.
        rows: How many there are.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or num_parts(rows) == 1:
        return data
    return jax.tree.map(
        lambda x: keras.distribution.distribute_tensor(x, distribution.get_data_layout(x.shape)),
        data,
    )
