"""Whether two graphs compute the same."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import tree

from functional_llm.graph.rewiring import calls
from functional_llm.graph.selection import inner_graph, inner_layers

# What does not change a formula.
_IGNORED = (
    "name",
    "trainable",
    "dtype",
    "kernel_initializer",
    "bias_initializer",
    "embeddings_initializer",
    "quantization_config",
)


def same_graph(model: Any, other: Any, origin: Callable[[Any], Any] = lambda layer: layer) -> bool:
    """Whether two graphs make the same calls, in the same order, at any depth.

    Args:
        model: A functional model or a built CompositeLayer.
        other: Another one.
        origin: What to take for a layer of `model`, if not the layer itself.
    """
    graph, other_graph = inner_graph(model), inner_graph(other)
    nodes, other_nodes = list(calls(graph)), list(calls(other_graph))
    if len(nodes) != len(other_nodes):
        return False
    tensors = _number(graph.inputs, {})
    other_tensors = _number(other_graph.inputs, {})
    for node, other_node in zip(nodes, other_nodes, strict=True):
        a, b = origin(node.operation), other_node.operation
        if not isinstance(a, type(b)) or _arguments(node, tensors) != _arguments(
            other_node, other_tensors
        ):
            return False
        is_graph = inner_layers(a) is not None
        if is_graph and not same_graph(a, b, origin):
            return False
        if not is_graph and a is node.operation and _config(a) != _config(b):
            return False
        _number(node.outputs, tensors)
        _number(other_node.outputs, other_tensors)
    outputs = [tensors[id(x)] for x in tree.flatten(graph.output)]
    return outputs == [other_tensors[id(x)] for x in tree.flatten(other_graph.output)]


def _number(tensors: Any, numbers: dict[int, int]) -> dict[int, int]:
    for x in tensors:
        numbers[id(x)] = len(numbers)
    return numbers


def _arguments(node: Any, numbers: dict[int, int]) -> str:
    def name(x: Any) -> Any:
        if isinstance(x, keras.KerasTensor):
            return f"tensor {numbers[id(x)]}"
        return np.asarray(x).tolist() if hasattr(x, "shape") else x

    arguments = node.arguments
    return repr(tree.map_structure(name, (arguments.args, arguments.kwargs)))


def _config(operation: Any) -> dict[str, Any]:
    config = operation.get_config()
    return {key: x for key, x in config.items() if key not in _IGNORED}
