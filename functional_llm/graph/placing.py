"""Values and data straight to the devices that they belong on, and back."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import keras
import numpy as np

from functional_llm.graph.keras_values import sharding_of
from functional_llm.graph.types import Nested, Tensor

Box: TypeAlias = tuple[slice, ...]  # of an array: a part along each axis


def assign(variable: keras.Variable, value: np.ndarray | Tensor) -> None:
    """Assigns a value; with a distribution, each device receives its own part and no other.

    `Variable.assign` puts all of an array onto the first device before it divides it.

    Args:
        variable: What to assign to.
        value: Of its shape.
    """
    if isinstance(value, np.ndarray):
        dtype = jax.numpy.dtype(variable.dtype)
        if keras.distribution.distribution() is None:
            # Unlike NumPy, it moves the numbers of a transposed matrix tile by tile.
            value = jax.device_put(value.astype(dtype, copy=False))
        else:
            value = jax.make_array_from_callback(
                value.shape, sharding_of(variable), lambda box: value[box].astype(dtype, copy=False)
            )
    variable.assign(value)


def own_boxes(variable: keras.Variable) -> list[Box] | None:
    """Returns the parts of a variable that lie on devices of this process; `None` for all of it.

    Args:
        variable: Of a model; it need not have a value.
    """
    if keras.distribution.distribution() is None:
        return None
    boxes = sharding_of(variable).addressable_devices_indices_map(tuple(variable.shape)).values()
    return list({str(box): box for box in boxes if box is not None}.values())


def to_numpy(value: Tensor) -> np.ndarray:
    """Returns an array or a variable as NumPy, whole.

    Where its parts lie on devices of several processes, all of them must ask for it.
    """
    value = getattr(value, "value", value)
    if isinstance(value, jax.Array) and not (
        value.is_fully_addressable or value.is_fully_replicated
    ):
        sharding: Any = value.sharding
        whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        value = jax.jit(_same, out_shardings=whole)(value)
    return np.asarray(keras.ops.convert_to_numpy(value))


def _same(value: jax.Array) -> jax.Array:
    return value


def num_parts(rows: int) -> int:
    """Returns in how many parts the rows of a batch lie on the devices; 1 if they do not divide."""
    distribution = keras.distribution.distribution()
    parts: int = 1 if distribution is None else distribution.num_model_replicas
    return parts if rows % parts == 0 else 1


def own_rows(data: Nested, rows: int) -> Nested:
    """Returns of the arrays of a batch what lies on devices of this process, which Keras asks for.

    Args:
        data: Arrays whose first axis is that of the rows, the same in all processes.
        rows: How many there are.

    Raises:
        ValueError: If they do not divide over the devices.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return data
    parts = distribution.num_model_replicas
    if rows % parts:
        raise ValueError(
            f"Expected a batch whose rows divide over {parts} devices, received {rows} rows. Take "
            f"a multiple of {parts}."
        )
    layout = distribution.get_data_layout((rows,)).backend_layout
    boxes: Sequence[Box] = list(layout.addressable_devices_indices_map((rows,)).values())
    start = min(box[0].indices(rows)[0] for box in boxes)
    stop = max(box[0].indices(rows)[1] for box in boxes)
    return jax.tree.map(lambda x: x[start:stop], data)


def place_rows(data: Nested, rows: int) -> Nested:
    """Returns arrays, each device with its rows of them; as they are if they do not divide.

    Several processes have each to know then that what they have is the same.

    Args:
        data: Arrays whose first axis is that of the rows, the same in all processes.
        rows: How many there are.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return data
    is_split = num_parts(rows) > 1

    def place(x: Any) -> Any:
        if not is_split and (jax.process_count() == 1 or not isinstance(x, np.ndarray)):
            return x
        layout: Any = keras.distribution.TensorLayout([None] * x.ndim, distribution.device_mesh)
        if is_split:
            layout = distribution.get_data_layout(x.shape)
        if isinstance(x, np.ndarray):
            return jax.make_array_from_callback(x.shape, layout.backend_layout, x.__getitem__)
        return keras.distribution.distribute_tensor(x, layout)

    return jax.tree.map(place, data)
