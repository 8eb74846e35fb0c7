"""Clones of a graph: the same calls, of other layers or on other inputs."""

import inspect
from collections.abc import Callable

import keras
from keras import tree

from functional_llm.graph.input_specs import inputs_like
from functional_llm.graph.types import Layer, Nested


def clone_graph(
    graph: keras.Model,
    clone_function: Callable[[Layer], Layer],
    inputs: Nested = None,
    replace: Callable[[object], object] = lambda x: x,
) -> keras.Model:
    """`keras.models.clone_model`, with optional inputs kept optional.

    Args:
        graph: Functional model.
        clone_function: Layer -> the layer to put in its place.
        inputs: Symbolic inputs in the structure of the graph's. Defaults to new ones.
        replace: Argument of a call -> what to give in its place.
    """

    def call(layer: Layer, *args: Nested, **kwargs: Nested) -> Nested:
        # Keras notes the mask as an argument of the call, though nobody gave it: what comes in the
        # layer's place may not take one. The tensors carry it anyway.
        if "mask" in kwargs and "mask" not in inspect.signature(layer.call).parameters:
            del kwargs["mask"]
        args, kwargs = tree.map_structure(replace, (args, kwargs))
        return layer(*args, **kwargs)

    return keras.models.clone_model(
        graph,
        input_tensors=inputs_like(graph) if inputs is None else inputs,
        clone_function=clone_function,
        call_function=call,
    )
