"""Layers that compute the same from equal weights and inputs, so that one may stand for others."""

from collections.abc import Iterable
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import tree

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.keras_private import calls, is_of_each
from functional_llm.graph.types import Layer

Key: TypeAlias = Any  # nested tuples

# Packages whose layers say in their config all that they compute.
_SAYING_ALL = ("keras", "functional_llm")
_NOT_COMPUTED = ("name", "trainable")
_PLAIN = (bool, int, float, str, bytes, type(None))


def program_key(layer: Layer) -> Key:
    """Returns what is equal for layers that compute the same from equal weights and inputs.

    A layer that holds one of a user's classes, which may compute by more than its config says, or
    one with a `call` of its own, has a key that no other layer has.

    Args:
        layer: A built layer; the key is of it as it is now.

    Returns:
        A hashable value.
    """
    return _operation(layer)


def _operation(operation: keras.Operation) -> Key:
    cls, attributes = type(operation), vars(operation)
    if isinstance(operation, CompositeLayer) and "call" not in attributes:
        if operation.graph is not None and cls.call is CompositeLayer.call:
            return ("graph", cls.__call__, _dtypes(operation), _graph(operation.graph))
    if "call" in attributes or cls.__module__.partition(".")[0] not in _SAYING_ALL:
        return ("only", id(operation))
    if isinstance(operation, keras.layers.Layer):
        config = operation.get_config()
        weights = tuple((tuple(x.shape), x.dtype) for x in operation.variables)
        said = {key: x for key, x in config.items() if key not in _NOT_COMPUTED}
        return (cls, _dtypes(operation), _value(said), weights)
    return (cls, _value({key: x for key, x in attributes.items() if not is_of_each(key)}))


def _dtypes(layer: Layer) -> Key:
    return layer.dtype_policy.name, layer.autocast


def _graph(graph: keras.Model) -> Key:
    numbers: dict[int, int] = {}

    def number(tensors: Iterable[keras.KerasTensor]) -> Key:
        specs = []
        for x in tensors:
            numbers[id(x)] = len(numbers)
            specs.append((tuple(x.shape), x.dtype))
        return tuple(specs)

    def named(x: object) -> object:
        return ("tensor", numbers[id(x)]) if isinstance(x, keras.KerasTensor) else x

    inputs = number(graph.inputs)
    made = [
        (
            _operation(call.operation),
            _value(tree.map_structure(named, (call.args, call.kwargs))),
            number(call.outputs),
        )
        for call in calls(graph)
    ]
    return inputs, tuple(made), tuple(numbers[id(x)] for x in graph.outputs)


def _value(x: object) -> Key:
    if isinstance(x, _PLAIN):
        return type(x).__name__, x
    if isinstance(x, dict):
        return tuple((key, _value(item)) for key, item in x.items())
    if isinstance(x, (list, tuple)):
        return type(x).__name__, *map(_value, x)
    if isinstance(x, np.ndarray):
        return x.shape, str(x.dtype), x.tobytes()
    return "only", id(x)
