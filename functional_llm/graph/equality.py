"""Whether two graphs compute the same."""

from collections.abc import Callable, Iterable

import keras
import numpy as np
from keras import tree

from functional_llm.graph.keras_private import Call, calls
from functional_llm.graph.selection import inner_graph, inner_layers
from functional_llm.graph.types import JSON, Layer

# Keys of a config that do not change what a layer computes.
_IGNORED = (
    "name",
    "trainable",
    "dtype",
    "kernel_initializer",
    "bias_initializer",
    "embeddings_initializer",
    "quantization_config",
)


def same_graph(
    model: Layer, other: Layer, origin: Callable[[Layer], Layer] = lambda layer: layer
) -> bool:
    """Whether two graphs make the same calls, in the same order, at any depth.

    Args:
        model: A functional model or a built CompositeLayer.
        other: Another one.
        origin: Layer of `model` -> the layer to compare in its place.
    """
    graph, other_graph = inner_graph(model), inner_graph(other)
    own_calls, other_calls = list(calls(graph)), list(calls(other_graph))
    if len(own_calls) != len(other_calls):
        return False
    tensors = _number(graph.inputs, {})
    other_tensors = _number(other_graph.inputs, {})
    for call, other_call in zip(own_calls, other_calls, strict=True):
        a, b = origin(call.operation), other_call.operation
        same_arguments = _arguments(call, tensors) == _arguments(other_call, other_tensors)
        if not isinstance(a, type(b)) or not same_arguments:
            return False
        is_graph = inner_layers(a) is not None
        if is_graph and not same_graph(a, b, origin):
            return False
        if not is_graph and a is call.operation and _config(a) != _config(b):
            return False
        _number(call.outputs, tensors)
        _number(other_call.outputs, other_tensors)
    outputs = [tensors[id(x)] for x in tree.flatten(graph.output)]
    return outputs == [other_tensors[id(x)] for x in tree.flatten(other_graph.output)]


def _number(tensors: Iterable[keras.KerasTensor], numbers: dict[int, int]) -> dict[int, int]:
    for x in tensors:
        numbers[id(x)] = len(numbers)
    return numbers


def _arguments(call: Call, numbers: dict[int, int]) -> str:
    def name(x: object) -> object:
        if isinstance(x, keras.KerasTensor):
            return f"tensor {numbers[id(x)]}"
        return np.asarray(x).tolist() if hasattr(x, "shape") else x

    return repr(tree.map_structure(name, (call.args, call.kwargs)))


def _config(operation: keras.Operation) -> JSON:
    config = operation.get_config()
    return {key: x for key, x in config.items() if key not in _IGNORED}
