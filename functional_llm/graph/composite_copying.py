"""Copies of layers and graphs with weights of their own.

Layers are copied by their config, so that classes need not be registered. `memo` is that of
`copy.deepcopy`: the id of an original -> its copy.
"""

import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeAlias

import keras

from functional_llm.graph.bodies import Body, LayerSequence
from functional_llm.graph.input_specs import inputs_like
from functional_llm.graph.layer_paths import map_layers
from functional_llm.graph.types import Layer, Nested

Memo: TypeAlias = dict[int, Any]


def copy_layer(layer: Layer, memo: Memo) -> Layer:
    """Returns a copy of a layer. One in a graph gets its weights from `copy_graph`."""
    if id(layer) not in memo:
        if _copies_itself(layer):
            memo[id(layer)] = copy.deepcopy(layer, memo)
        elif isinstance(layer, keras.Sequential):
            memo[id(layer)] = keras.models.clone_model(
                layer, clone_function=lambda inner: copy_layer(inner, memo)
            )
        elif isinstance(layer, keras.Model) and hasattr(layer, "inputs"):
            memo[id(layer)] = copy_graph(layer, memo)
        else:
            memo[id(layer)] = type(layer).from_config(layer.get_config())
    return memo[id(layer)]


def copy_graph(graph: keras.Model, memo: Memo) -> keras.Model:
    """Returns a copy of a functional model and of all layers in it."""
    new_graph = clone_graph(graph, lambda layer: copy_layer(layer, memo))
    for layer in graph.layers:
        if id(layer) in memo and not _copies_itself(layer):
            pairs = zip(layer.variables, memo[id(layer)].variables, strict=True)
            for variable, new_variable in pairs:
                # A copy: training one model donates its arrays, which would delete the other's.
                new_variable.assign(keras.ops.copy(variable))
    return new_graph


def copy_attributes(attributes: dict[str, Any], memo: Memo) -> dict[str, Any]:
    """Returns copies of what is set on a layer."""
    map_layers(lambda _, layer: copy_layer(layer, memo), attributes)
    # Plain containers: Keras's tracking ones would take their layer along.
    return copy.deepcopy(map_layers(lambda _, layer: layer, attributes), memo)


def copy_body(body: Body | None, layer: Layer, new: Layer, memo: Memo) -> Body | None:
    """Returns a body for the copy of a layer that is not built yet.

    Args:
        body: The body of `layer`.
        layer: The original.
        new: Its copy.
        memo: The copies made so far.
    """
    if isinstance(body, LayerSequence):
        return LayerSequence([copy_layer(part, memo) for part in body.layers])
    if isinstance(body, MethodType) and body.__self__ is layer:
        return getattr(new, body.__name__)
    return body


def clone_graph(graph: keras.Model, clone_function: Callable[[Layer], Layer]) -> keras.Model:
    """`keras.models.clone_model`, with optional inputs kept optional.

    Args:
        graph: Functional model.
        clone_function: Layer -> the layer to put in its place.
    """

    def call(layer: Layer, *args: Nested, **kwargs: Nested) -> Nested:
        # Keras notes the mask as an argument of the call, though nobody gave it: what comes in the
        # layer's place may not take one. The tensors carry it anyway.
        if "mask" in kwargs and "mask" not in inspect.signature(layer.call).parameters:
            del kwargs["mask"]
        return layer(*args, **kwargs)

    return keras.models.clone_model(
        graph,
        input_tensors=inputs_like(graph),
        clone_function=clone_function,
        call_function=call,
    )


def _copies_itself(layer: Layer) -> bool:
    """Whether a layer says how it is copied, weights included, as a CompositeLayer does."""
    return hasattr(layer, "__deepcopy__")
